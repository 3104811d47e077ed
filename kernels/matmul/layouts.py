# SPDX-License-Identifier: Apache-2.0
"""Device layouts of codes, and conversion between them.

Files and leaves hold the canonical bitstream; a backend may want another arrangement. Every layout
is an (encode, decode) pair over plain codes, so each has a reference decoder and `repack` goes from
any to any, exactly.

* `bitstream`: `core.packing`, any width.
* `native`: signed `jnp.int4` (up to 4 bits) or `jnp.int8`, code minus 2**(bits - 1): what XLA
  and Mosaic GPU load without unpacking.
* `out_in`: `native` turned, columns first: as a GPU's tensor core takes weights.
* `e4m3fn`, `e5m2`: 8-bit floats, as they are.
* `u8gs`: 4 bits; byte r of pair i holds row r of group 2i (low) and of group 2i + 1 (high).
* `gs32`: 1 to 5 bits, or 8, units of 128 rows. Word [64 i + r] holds, for unit `i n + j` with
  n = 16 // bits, row 2r at bit `bits j` and row 2r + 1 at bit `16 + bits j`: a shift, a mask and
  an `or` make two bfloat16 `128 + code` lie side by side.
* `gs8`: 1 to 4 bits, units of 128 rows. Word [32 i + r] holds, for unit `i n + j` with
  n = 8 // bits, row 4r + b at bit `8 b + bits j`, all in two's complement (code minus
  2**(bits - 1)): a shift to the tops of the bytes and a mask make four int8 lie side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from treesurgeon.core import packing

GROUP = 128  # rows of a unit of gs32 and gs8


class Layout(NamedTuple):
  """A layout: encode(codes, bits, group_size) and decode(packed, bits, group_size, rows)."""

  encode: Callable[[jax.Array, int, int], jax.Array]
  decode: Callable[[jax.Array, int, int, int], jax.Array]
  widths: tuple[int, ...]


def encode(
  codes: UInt8[Array, "rows cols"], *, layout: str, bits: int, group_size: int
) -> jax.Array:
  """Arrange codes in a layout.

  Args:
    codes: unsigned codes below `2**bits`.
    layout: name from `LAYOUTS`.
    bits: width of a code.
    group_size: rows of a group; only group-interleaved layouts depend on it.

  Returns:
    The packed array.

  Raises:
    ValueError: for an unknown layout, or one that cannot hold this format.

  Example:
    >>> encode(jnp.array([[0], [15]], jnp.uint8), layout="native", bits=4, group_size=2).tolist()
    [[-8], [7]]
  """
  return _find(layout, bits, group_size).encode(codes, bits, group_size)


def decode(
  packed: jax.Array, *, layout: str, bits: int, group_size: int, rows: int
) -> UInt8[Array, "rows cols"]:
  """Recover the codes from a layout; the reference for every kernel that reads it.

  Args:
    packed: what `encode` returned.
    layout: name from `LAYOUTS`.
    bits: width of a code.
    group_size: rows of a group.
    rows: number of codes a column holds.

  Returns:
    Unsigned codes.

  Raises:
    ValueError: for an unknown layout, or one that cannot hold this format.

  Example:
    >>> packed = jnp.array([[-8], [7]], jnp.int4)
    >>> decode(packed, layout="native", bits=4, group_size=2, rows=2).tolist()
    [[0], [15]]
  """
  return _find(layout, bits, group_size).decode(packed, bits, group_size, rows)


def repack(
  packed: jax.Array, *, source: str, target: str, bits: int, group_size: int, rows: int
) -> jax.Array:
  """Convert between layouts; from a layout to itself it is the identity.

  Args:
    packed: codes in the layout `source`.
    source: name from `LAYOUTS`.
    target: name from `LAYOUTS`.
    bits: width of a code.
    group_size: rows of a group.
    rows: number of codes a column holds.

  Returns:
    The codes in the layout `target`.

  Raises:
    ValueError: as `encode`.

  Example:
    >>> stream = packing.pack(jnp.array([[0], [15]], jnp.uint8), bits=4)
    >>> repack(stream, source="bitstream", target="native", bits=4, group_size=2, rows=2).tolist()
    [[-8], [7]]
  """
  if source == target:
    return packed
  codes = decode(packed, layout=source, bits=bits, group_size=group_size, rows=rows)
  return encode(codes, layout=target, bits=bits, group_size=group_size)


def tile(layout: str, width: int) -> tuple[int, int]:
  """Tell what a tile of a layout holds.

  Args:
    layout: "gs32", "gs8", "native", "out_in", "e4m3fn" or "e5m2".
    width: bits of a code.

  Returns:
    (units of 128 rows, rows of the array).

  Example:
    >>> tile("gs32", 2), tile("gs8", 2), tile("native", 4)
    ((8, 64), (4, 32), (1, 128))
  """
  if layout not in ("gs32", "gs8"):
    return 1, GROUP
  return (16 // width, GROUP // 2) if layout == "gs32" else (8 // width, GROUP // 4)


def over_batch(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """Apply to each matrix of a stack, one after the other: unpacked codes are large.

  Args:
    fn: function of a matrix, or of several.
    *arrays: (..., rows, columns), stacked alike.

  Returns:
    The results, stacked alike.

  Example:
    >>> over_batch(lambda w: w[:1], jnp.ones((2, 3, 4, 5))).shape
    (2, 3, 1, 5)
  """
  batch = arrays[0].shape[:-2]
  if not batch:
    return fn(*arrays)
  out = jax.lax.map(lambda each: fn(*each), [a.reshape(-1, *a.shape[-2:]) for a in arrays])
  return out.reshape(*batch, *out.shape[1:])


def _to_native(codes: jax.Array, bits: int, group_size: int) -> jax.Array:
  del group_size
  signed = codes.astype(jnp.int16) - 2 ** (bits - 1)
  return signed.astype(jnp.int8).astype(jnp.int4 if bits <= 4 else jnp.int8)


def _from_native(packed: jax.Array, bits: int, group_size: int, rows: int) -> jax.Array:
  del group_size
  return (packed[:rows].astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint8)


def _to_u8gs(codes: jax.Array, bits: int, group_size: int) -> jax.Array:
  del bits
  pairs = _tiles(codes, 2 * group_size).reshape(-1, 2, group_size, codes.shape[1])
  return (pairs[:, 0] | (pairs[:, 1] << 4)).reshape(-1, codes.shape[1])


def _from_u8gs(packed: jax.Array, bits: int, group_size: int, rows: int) -> jax.Array:
  del bits
  pairs = packed.reshape(-1, group_size, packed.shape[1])
  both = jnp.stack([pairs & 15, pairs >> 4], axis=1)
  return both.reshape(-1, packed.shape[1])[:rows]


def _to_gs32(codes: jax.Array, bits: int, group_size: int) -> jax.Array:
  n, half = 16 // bits, group_size // 2
  tiles = _tiles(codes, n * group_size).reshape(-1, n, half, 2, codes.shape[1]).astype(jnp.uint32)
  words = jnp.zeros((tiles.shape[0], half, codes.shape[1]), jnp.uint32)
  for j in range(n):
    words = words | (tiles[:, j, :, 0] << (bits * j)) | (tiles[:, j, :, 1] << (16 + bits * j))
  return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(-1, codes.shape[1])


def _from_gs32(packed: jax.Array, bits: int, group_size: int, rows: int) -> jax.Array:
  n, half = 16 // bits, group_size // 2
  words = jax.lax.bitcast_convert_type(packed, jnp.uint32).reshape(-1, half, packed.shape[1])
  mask = jnp.uint32(2**bits - 1)
  groups = [
    jnp.stack([(words >> (bits * j)) & mask, (words >> (16 + bits * j)) & mask], axis=2)
    for j in range(n)
  ]
  return jnp.stack(groups, axis=1).reshape(-1, packed.shape[1])[:rows].astype(jnp.uint8)


def _to_gs8(codes: jax.Array, bits: int, group_size: int) -> jax.Array:
  n, quarter = 8 // bits, group_size // 4
  tiles = _tiles(codes, n * group_size).reshape(-1, n, quarter, 4, codes.shape[1])
  tiles = tiles.astype(jnp.uint32) ^ 2 ** (bits - 1)
  words = jnp.zeros((tiles.shape[0], quarter, codes.shape[1]), jnp.uint32)
  for j in range(n):
    for byte in range(4):
      words = words | (tiles[:, j, :, byte] << (8 * byte + bits * j))
  return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(-1, codes.shape[1])


def _from_gs8(packed: jax.Array, bits: int, group_size: int, rows: int) -> jax.Array:
  n, quarter = 8 // bits, group_size // 4
  words = jax.lax.bitcast_convert_type(packed, jnp.uint32).reshape(-1, quarter, packed.shape[1])
  mask, half = jnp.uint32(2**bits - 1), jnp.uint32(2 ** (bits - 1))
  units = [
    jnp.stack([(words >> (8 * byte + bits * j)) & mask ^ half for byte in range(4)], axis=2)
    for j in range(n)
  ]
  return jnp.stack(units, axis=1).reshape(-1, packed.shape[1])[:rows].astype(jnp.uint8)


def _as_floats(dtype: str) -> Layout:
  """Call bytes what they are."""
  return Layout(
    lambda codes, bits, group_size: jax.lax.bitcast_convert_type(codes, jnp.dtype(dtype)),
    lambda packed, bits, group_size, rows: jax.lax.bitcast_convert_type(packed[:rows], jnp.uint8),
    (8,),
  )


LAYOUTS = {
  "bitstream": Layout(
    lambda codes, bits, group_size: packing.pack(codes, bits=bits),
    lambda packed, bits, group_size, rows: packing.unpack(packed, bits=bits, rows=rows),
    tuple(range(1, 9)),
  ),
  "native": Layout(_to_native, _from_native, tuple(range(1, 9))),
  "out_in": Layout(
    lambda codes, bits, group_size: _to_native(codes, bits, group_size).T,
    lambda packed, bits, group_size, rows: _from_native(packed.T, bits, group_size, rows),
    tuple(range(1, 9)),
  ),
  "u8gs": Layout(_to_u8gs, _from_u8gs, (4,)),
  "e4m3fn": _as_floats("float8_e4m3fn"),
  "e5m2": _as_floats("float8_e5m2"),
  "gs32": Layout(_to_gs32, _from_gs32, (1, 2, 3, 4, 5, 8)),
  "gs8": Layout(_to_gs8, _from_gs8, (1, 2, 3, 4)),
}


def _find(layout: str, bits: int, group_size: int) -> Layout:
  if layout not in LAYOUTS:
    raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
  found = LAYOUTS[layout]
  if bits not in found.widths:
    widths = ", ".join(map(str, found.widths))
    raise ValueError(f"layout {layout!r} holds codes of {widths} bits, not {bits}")
  if layout in ("gs32", "gs8") and group_size != GROUP:
    raise ValueError(f"layout {layout!r} takes groups of {GROUP} rows, not {group_size}")
  return found


def _tiles(codes: jax.Array, size: int) -> jax.Array:
  """Pad with zero codes to whole tiles."""
  return jnp.pad(codes, [(0, -codes.shape[0] % size), (0, 0)])
