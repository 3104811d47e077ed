# SPDX-License-Identifier: Apache-2.0
"""Codes of tables and 8-bit floats out of `gs32` words, for `tpu_block.py`.

A TPU has no memory that lanes could look values up in, but moves rows of a register by indices:
eight rows of 32 bits everywhere, and on v6e and tpu7x sixteen of 16 bits as well. There a table of
16 values is one register and two codes side by side in a word are two indices: shift, mask, move.
On v5e each code moves a word in which the values of `code` and `code + 8` lie, of which its highest
bit, 16 times, shifts the right one into place: 15 instructions for two weights instead of 3, yet
fewer than 8-bit steps would take to come out of memory.

An e4m3 at the place of a bfloat16's exponent and mantissa is, or-ed with the exponent 112, its
value over 2^8, `a`, but for the 16 smallest: where the exponent is 0 it should be 2 a - 2^-14. That
line lies below a up to 2^-14 and above it beyond, so the magnitude is min(a, 2 a - 2^-14).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from treesurgeon.kernels.matmul import layouts

ROWS = 8  # of a register
LANES = 128
_HALF = layouts.GROUP // 2  # rows of words that a unit is in

Decode = Callable[[int], tuple[jax.Array, float]]


def pairs(ref: Any, *, table: np.ndarray) -> Decode:
  """Look two codes up at once.

  Args:
    ref: block of gs32 words.
    table: the value of every code, of up to 4 bits.

  Returns:
    As `tpu_block.decoder`.
  """
  width, bits = _bfloat16(table)
  known = pltpu.bitcast(_register(bits[::2] | bits[1::2] << 16), jnp.bfloat16)

  def decode(unit: int) -> tuple[jax.Array, float]:
    word, shift = _word(ref, width, unit)
    codes = pltpu.bitcast(_right(word, shift) & _both(2**width - 1), jnp.int16)
    return _move(known, codes), 0.0

  return decode


def singles(ref: Any, *, table: np.ndarray) -> Decode:
  """Look codes up one by one.

  Args:
    ref: block of gs32 words.
    table: the value of every code, of up to 4 bits.

  Returns:
    As `tpu_block.decoder`.
  """
  width, bits = _bfloat16(table)
  low, high = _register(bits[:8] | bits[8:] << 16), _register(bits[:8] << 16 | bits[8:])

  def decode(unit: int) -> tuple[jax.Array, float]:
    word, shift = _word(ref, width, unit)

    def moved(known: jax.Array, at: int) -> jax.Array:
      return _move(known, _right(word, at) & jnp.int32(min(2**width - 1, 7)))

    def above(at: int) -> jax.Array:  # 16 times the highest of four bits
      return _right(word, at - 1) & jnp.int32(16)

    one, two = moved(low, shift), moved(high, shift + 16)
    if width == 4:
      one = lax.shift_right_logical(one, above(shift))
      two = lax.shift_left(two, above(shift + 16))
    pair = one & jnp.int32(0xFFFF) | two & jnp.int32(-0x10000)
    return pltpu.bitcast(pair, jnp.bfloat16), 0.0

  return decode


def floats(ref: Any) -> Decode:
  """Take e4m3 out of words: their values over `values.WORDS_FACTOR`.

  Args:
    ref: block of gs32 words of 8 bits.

  Returns:
    As `tpu_block.decoder`.
  """
  smallest = 2.0**-14

  def decode(unit: int) -> tuple[jax.Array, float]:
    word, shift = _word(ref, 8, unit)
    magnitude = _right(word, shift - 4) & _both(0x7F << 4) | _both(112 << 7)
    a = pltpu.bitcast(magnitude, jnp.bfloat16)
    a = jnp.minimum(a, (a + a) - jnp.bfloat16(smallest))
    sign = _right(word, shift - 8) & _both(0x8000)
    return pltpu.bitcast(pltpu.bitcast(a, jnp.int32) | sign, jnp.bfloat16), 0.0

  return decode


def _bfloat16(table: np.ndarray) -> tuple[int, np.ndarray]:
  """Return the width of codes, and the bits of 16 values rounded to bfloat16, zeros at the end."""
  bits = np.nan_to_num(table).astype(ml_dtypes.bfloat16).view(np.uint16)
  return (len(bits) - 1).bit_length(), np.pad(bits, (0, 16 - len(bits))).astype(np.uint32)


def _register(words: Sequence[int] | np.ndarray) -> jax.Array:
  """Make a register whose rows are eight numbers."""
  row = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
  numbers = np.asarray(words, np.uint32).view(np.int32)
  table = jnp.full((ROWS, LANES), jnp.int32(numbers[0]))
  for i in range(1, ROWS):
    table = jnp.where(row == i, jnp.int32(numbers[i]), table)
  return table


def _move(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Take the table's row that each entry names, register by register."""
  numbers = lax.GatherDimensionNumbers(
    offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,),
    operand_batching_dims=(1,), start_indices_batching_dims=(1,),
  )  # fmt: skip
  inside = lax.GatherScatterMode.PROMISE_IN_BOUNDS

  def one(at: jax.Array) -> jax.Array:
    return lax.gather(table, at[..., None], numbers, (1, 1), mode=inside)

  high, wide = rows.shape
  tall = table.shape[0]
  return jnp.concatenate(
    [
      jnp.concatenate(
        [one(rows[r : r + tall, c : c + LANES]) for c in range(0, wide, LANES)], axis=1
      )
      for r in range(0, high, tall)
    ]
  )


def _word(ref: Any, width: int, unit: int) -> tuple[jax.Array, int]:
  """Find a unit's words, and the place of its codes in their halves."""
  tile, field = divmod(unit, 16 // width)
  return ref[tile * _HALF : (tile + 1) * _HALF, :], width * field


def _right(word: jax.Array, by: int) -> jax.Array:
  """Shift right, or left by a negative number."""
  if by == 0:
    return word
  shift = lax.shift_right_logical if by > 0 else lax.shift_left
  return shift(word, jnp.int32(abs(by)))


def _both(half: int) -> jax.Array:
  """Put a half-word into both halves of an int32."""
  word = half << 16 | half
  return jnp.int32(word - 2**32 if word >= 2**31 else word)
