# SPDX-License-Identifier: Apache-2.0
"""Pack small unsigned integers into bytes and back, on device.

The stored form is a dense little-endian bitstream along the input (row) axis: code `i` of a
column occupies bits `[i * bits, (i + 1) * bits)`. Viewed as int32 words along the rows this is the
layout of compressed-tensors and of GPTQ; exporters only transpose. `period(bits)` codes fill whole
bytes, so every width from 1 to 16 is a few shifts of whole byte rows: `planes` gives the codes as
that many strided planes, which a matrix product can use without interleaving them. Codes of up to
8 bits are uint8, wider ones (indices into tables) uint16.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt8


def packed_rows(rows: int, bits: int) -> int:
  """Count the bytes that hold `rows` codes of `bits` bits.

  Args:
    rows: number of codes.
    bits: width of one code, 1 to 16.

  Returns:
    The number of bytes, rounded up.

  Example:
    >>> packed_rows(10, 3)
    4
  """
  return -(-rows * bits // 8)


def period(bits: int) -> int:
  """Count the codes after which the bitstream is at a byte boundary again.

  Args:
    bits: width of one code, 1 to 16.

  Returns:
    The number of codes.

  Raises:
    ValueError: if `bits` is not 1 to 16.

  Example:
    >>> [period(b) for b in (1, 2, 3, 4, 6, 8)]
    [8, 4, 8, 2, 4, 1]
  """
  _check_bits(bits)
  return 8 // math.gcd(8, bits)


def pack(codes: UInt[Array, "*batch rows cols"], *, bits: int) -> UInt8[Array, "*batch bytes cols"]:
  """Pack codes along the row axis into a little-endian bitstream.

  Args:
    codes: unsigned codes below `2**bits`.
    bits: width of one code, 1 to 16.

  Returns:
    Bytes of shape (..., packed_rows(rows, bits), cols).

  Raises:
    ValueError: if `bits` is not 1 to 16.

  Example:
    >>> pack(jnp.array([[1], [2], [3]], jnp.uint8), bits=4)[:, 0].tolist()
    [33, 3]
  """
  p = period(bits)
  if bits == 8:
    return codes.astype(jnp.uint8)
  *batch, rows, cols = codes.shape
  runs = -(-rows // p)
  lanes = _pad_rows(codes, runs * p).reshape(*batch, runs, p, cols).astype(jnp.uint32)
  out = []
  for byte in range(p * bits // 8):
    word = jnp.zeros((*batch, runs, cols), jnp.uint32)
    for j in range(p):
      shift = j * bits - byte * 8
      if -bits < shift < 8:
        lane = lanes[..., j, :]
        word = word | (lane << shift if shift >= 0 else lane >> -shift)
    out.append((word & 0xFF).astype(jnp.uint8))
  stream = jnp.stack(out, axis=-2).reshape(*batch, runs * len(out), cols)
  return jax.lax.slice_in_dim(stream, 0, packed_rows(rows, bits), axis=len(batch))


def unpack(
  stream: UInt8[Array, "*batch bytes cols"], *, bits: int, rows: int
) -> UInt[Array, "*batch rows cols"]:
  """Unpack a little-endian bitstream into one code an entry, uint8 or, above 8 bits, uint16.

  Args:
    stream: what `pack` returned.
    bits: width of one code, 1 to 16.
    rows: number of codes a column holds.

  Returns:
    Unsigned codes of shape (..., rows, cols).

  Raises:
    ValueError: if `bits` is not 1 to 16, or the stream is too short or too long for `rows`.

  Example:
    >>> unpack(jnp.array([[33], [3]], jnp.uint8), bits=4, rows=3)[:, 0].tolist()
    [1, 2, 3]
  """
  p = period(bits)
  *batch, length, cols = stream.shape
  if length != packed_rows(rows, bits):
    raise ValueError(
      f"a stream of {rows} {bits}-bit codes has {packed_rows(rows, bits)} bytes, not {length}"
    )
  if bits == 8:
    return stream
  found = planes(stream, bits=bits)
  codes = jnp.stack(found, axis=-2).reshape(*batch, found[0].shape[-2] * p, cols)
  return jax.lax.slice_in_dim(codes, 0, rows, axis=len(batch))


def planes(
  stream: UInt8[Array, "*batch bytes cols"], *, bits: int
) -> list[UInt[Array, "*batch runs cols"]]:
  """Split a bitstream into planes: plane j holds the codes j, j + period, j + 2 period, ...

  Only shifts of whole byte rows, so a compiler can fuse it into what consumes the codes.

  Args:
    stream: what `pack` returned; padded with zero bytes to whole periods.
    bits: width of one code, 1 to 16.

  Returns:
    `period(bits)` arrays of codes.

  Raises:
    ValueError: if `bits` is not 1 to 16.

  Example:
    >>> [p[:, 0].tolist() for p in planes(jnp.array([[33], [3]], jnp.uint8), bits=4)]
    [[1, 3], [2, 0]]
  """
  p = period(bits)
  step = p * bits // 8
  *batch, length, cols = stream.shape
  runs = -(-length // step)
  lanes = _pad_rows(stream, runs * step).reshape(*batch, runs, step, cols)
  if bits > 8:
    lanes = lanes.astype(jnp.uint16)
  out = []
  for j in range(p):
    byte, shift = divmod(j * bits, 8)
    code = lanes[..., byte, :] >> shift
    for more in range(1, -(-(shift + bits) // 8)):
      code = code | (lanes[..., byte + more, :] << (8 * more - shift))
    out.append(code & (2**bits - 1))
  return out


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
  missing = rows - x.shape[-2]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def _check_bits(bits: int) -> None:
  if not 1 <= bits <= 16:
    raise ValueError(f"bits={bits} is not a whole number from 1 to 16")
