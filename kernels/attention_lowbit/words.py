# SPDX-License-Identifier: Apache-2.0
r"""How codes of keys and values lie in 32-bit words, and how they get there a few tokens at a time.

A unit is 128 tokens; 16 // bits units share a tile, one to a field of its words (8 bits: one unit).
Words run along what a product sums over, channels of keys and tokens of values, which so come out
in the places where the matrix unit wants its weights:

* 2 and 4 bits: word r holds row 2r at bit `bits * field` and row 2r + 1 at `16 + bits * field`,
  the layout `gs32` of matrices;
* 8 bits: byte i of word r is row 4r + i, in two's complement (code minus 128).

Keys: tiles of (channels / rows a word, 128 tokens). Values: (128 / rows a word, channels).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

UNIT = 128  # tokens
WIDTHS = (2, 4, 8)


def fields(bits: int) -> int:
  """Count the units of a tile.

  Args:
    bits: width of a code: 2, 4 or 8.

  Returns:
    The number of units.

  Example:
    >>> [fields(bits) for bits in WIDTHS]
    [8, 4, 1]
  """
  return 1 if bits == 8 else 16 // bits


def rows(bits: int) -> int:
  """Count the rows of a word.

  Args:
    bits: width of a code: 2, 4 or 8.

  Returns:
    The number of rows.

  Example:
    >>> [rows(bits) for bits in WIDTHS]
    [2, 2, 4]
  """
  return 4 if bits == 8 else 2


def put(
  words: Int32[Array, "*batch words cols"],
  codes: Int32[Array, "*batch rows cols"],
  field: int | jax.Array,
  *,
  bits: int,
) -> Int32[Array, "*batch words cols"]:
  """Write codes into a field of words; other fields stay.

  Args:
    words: as they are.
    codes: from 0 to 2^bits - 1.
    field: which unit of the tile.
    bits: width of a code.

  Returns:
    The new words.

  Example:
    >>> put(jnp.array([[7]]), jnp.array([[1], [2]]), 1, bits=4).tolist()
    [[2097175]]
  """
  many = rows(bits)
  apart = 32 // many
  codes = (codes ^ 128 if bits == 8 else codes).astype(jnp.uint32)
  shape = (*codes.shape[:-2], codes.shape[-2] // many, many, codes.shape[-1])
  shift = (apart * jnp.arange(many, dtype=jnp.uint32)).reshape(many, 1)
  shift = lax.broadcast_in_dim(shift, shape, (len(shape) - 2, len(shape) - 1))
  place = jnp.uint32(0 if bits == 8 else bits * field)
  new = (codes.reshape(shape) << shift).sum(axis=-2, dtype=jnp.uint32) << place
  full = jnp.uint32(sum((2**bits - 1) << (apart * i) for i in range(many))) << place
  old = lax.bitcast_convert_type(words, jnp.uint32)
  return lax.bitcast_convert_type((old & ~full) | new, jnp.int32)


def take(
  words: Int32[Array, "*batch words cols"], *, bits: int
) -> Int32[Array, "*batch fields rows cols"]:
  """Read the codes of all fields.

  Args:
    words: of whole tiles, or of some of their rows or columns.
    bits: width of a code.

  Returns:
    Codes from 0 to 2^bits - 1.

  Example:
    >>> take(jnp.array([[2097175]]), bits=4)[:2, :, 0].tolist()
    [[7, 0], [1, 2]]
  """
  many, units = rows(bits), fields(bits)
  *batch, count, cols = words.shape
  shape = (*batch, units, count, many, cols)
  steps = jnp.arange(units)[:, None] * bits + jnp.arange(many)[None, :] * (32 // many)
  spread = lax.broadcast_in_dim(words, shape, (*range(len(batch)), len(batch) + 1, len(batch) + 3))
  shift = lax.broadcast_in_dim(steps.astype(jnp.int32), shape, (len(batch), len(batch) + 2))
  codes = (spread >> shift) & (2**bits - 1)
  codes = codes ^ 128 if bits == 8 else codes
  return codes.reshape(*batch, units, count * many, cols)
