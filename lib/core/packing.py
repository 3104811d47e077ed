# SPDX-License-Identifier: Apache-2.0
"""Pack small unsigned integers into bytes and back, on device.

The stored form is a dense little-endian bitstream along the input (row) axis: code `i` of a
column occupies bits `[i * bits, (i + 1) * bits)`. Eight codes fill `bits` bytes exactly, so every
width from 1 to 8 uses the same few shifts. Viewed as int32 words along the rows this is the layout
of compressed-tensors and of GPTQ; exporters only transpose.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8


def packed_rows(rows: int, bits: int) -> int:
  """Count the bytes that hold `rows` codes of `bits` bits.

  Args:
    rows: number of codes.
    bits: width of one code, 1 to 8.

  Returns:
    The number of bytes, rounded up.

  Example:
    >>> packed_rows(10, 3)
    4
  """
  return -(-rows * bits // 8)


def pack(codes: UInt8[Array, "*batch rows cols"], *, bits: int) -> UInt8[Array, "*batch bytes cols"]:
  """Pack codes along the row axis into a little-endian bitstream.

  Args:
    codes: unsigned codes below `2**bits`.
    bits: width of one code, 1 to 8.

  Returns:
    Bytes of shape (..., packed_rows(rows, bits), cols).

  Raises:
    ValueError: if `bits` is not 1 to 8.

  Example:
    >>> pack(jnp.array([[1], [2], [3]], jnp.uint8), bits=4)[:, 0].tolist()
    [33, 3]
  """
  _check_bits(bits)
  if bits == 8:
    return codes
  *batch, rows, cols = codes.shape
  eights = -(-rows // 8)
  padded = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, eights * 8 - rows), (0, 0)])
  lanes = padded.reshape(*batch, eights, 8, cols).astype(jnp.uint16)
  out = []
  for byte in range(bits):
    word = jnp.zeros((*batch, eights, cols), jnp.uint16)
    for j in range(8):
      shift = j * bits - byte * 8
      if -bits < shift < 8:
        lane = lanes[..., j, :]
        word = word | (lane << shift if shift >= 0 else lane >> -shift)
    out.append((word & 0xFF).astype(jnp.uint8))
  stream = jnp.stack(out, axis=-2).reshape(*batch, eights * bits, cols)
  return jax.lax.slice_in_dim(stream, 0, packed_rows(rows, bits), axis=len(batch))


def unpack(
  stream: UInt8[Array, "*batch bytes cols"], *, bits: int, rows: int
) -> UInt8[Array, "*batch rows cols"]:
  """Unpack a little-endian bitstream into one code a byte.

  Args:
    stream: what `pack` returned.
    bits: width of one code, 1 to 8.
    rows: number of codes a column holds.

  Returns:
    Unsigned codes of shape (..., rows, cols).

  Raises:
    ValueError: if `bits` is not 1 to 8, or the stream is too short for `rows`.

  Example:
    >>> unpack(jnp.array([[33], [3]], jnp.uint8), bits=4, rows=3)[:, 0].tolist()
    [1, 2, 3]
  """
  _check_bits(bits)
  *batch, length, cols = stream.shape
  if length != packed_rows(rows, bits):
    raise ValueError(
      f"a stream of {rows} {bits}-bit codes has {packed_rows(rows, bits)} bytes, not {length}"
    )
  if bits == 8:
    return stream
  eights = -(-rows // 8)
  padded = jnp.pad(stream, [(0, 0)] * len(batch) + [(0, eights * bits - length), (0, 0)])
  lanes = padded.reshape(*batch, eights, bits, cols).astype(jnp.uint16)
  out = []
  for j in range(8):
    byte, shift = divmod(j * bits, 8)
    word = lanes[..., byte, :]
    if shift + bits > 8:
      word = word | (lanes[..., byte + 1, :] << 8)
    out.append(((word >> shift) & (2**bits - 1)).astype(jnp.uint8))
  codes = jnp.stack(out, axis=-2).reshape(*batch, eights * 8, cols)
  return jax.lax.slice_in_dim(codes, 0, rows, axis=len(batch))


def _check_bits(bits: int) -> None:
  if not 1 <= bits <= 8:
    raise ValueError(f"bits={bits} is not a whole number from 1 to 8")
