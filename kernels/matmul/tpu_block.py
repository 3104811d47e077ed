# SPDX-License-Identifier: Apache-2.0
r"""One block of a product with a prepared matrix: what `tpu.py` runs in each step of its grid.

Some dozens of units of 128 rows are unrolled. Integers become bfloat16 `base + code` in a handful
of vector instructions and go to the matrix unit. What scale and zero point do to it depends on the
number of tokens:

* few, or a chip that computes no bfloat16 (post): each group's partial product is corrected and
  scaled, `y += s (x_g @ (base + u) - (base + z) sum(x_g))`. Exact but for the sums' order: the
  operands are the bfloat16 activations and integers, and the sum is over the same activations.
* many (pre): the weights are made whole first, `w = (u - z) s` in bfloat16, and two units go into
  one product, which a matrix unit of 256 rows needs. Scale and weight are rounded to bfloat16.

Words of `gs32` hold a code in any place of the half-word. A bfloat16 has seven mantissa bits, so
codes of b bits may stay at places 0 to 7 - b: at place p, or-ing the exponent of 2^(7 - p) in gives
`2^(7 - p) + code`. Units that differ by less than that share one shift.

Activations that are 8-bit integers are multiplied by integers, on chips that are faster so, and by
bfloat16, in which they are exact, on the other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from treesurgeon.kernels.matmul import layouts, tpu_tables, values

UNIT = layouts.GROUP
_MANTISSA = 7


def multiply(
  x_ref: Any,
  codes_ref: Any,
  scales_ref: Any,
  *refs: Any,
  units: int,
  line: values.Line,
  layout: str,
  size: int,
  pre: bool,
  steps: int,
  has_zeros: bool,
) -> None:
  """Multiply a block of tokens by a block of columns, in one step over the rows.

  Args:
    x_ref: activations, (tokens, units x 128).
    codes_ref, scales_ref: of the prepared leaf.
    *refs: zero points if it has any; the output; a float32 sum of its shape if there are steps.
    units: of 128 rows.
    line: what codes stand for.
    layout: of the codes.
    size: rows of a group.
    pre: whether weights are scaled before the product, instead of the product.
    steps: over the rows.
    has_zeros: whether there are zero points.
  """
  refs_left = list(refs)
  zeros_ref = refs_left.pop(0) if has_zeros else None
  out_ref, *scratch = refs_left
  scales = scales_ref[...].astype(jnp.float32)
  zeros = None if zeros_ref is None else zeros_ref[...].astype(jnp.float32)
  decode = decoder(codes_ref, line=line, layout=layout, dtype=x_ref.dtype)
  factor = line.factor
  if pre:
    y = _pre(x_ref, decode, scales, zeros, units, size, line.zero)
  else:
    gain = 2.0 ** (8 - line.width) if layout == "gs8" else 1.0
    y = _post(x_ref, decode, scales / gain, zeros, units, size, line.zero, gain)
  if steps == 1:
    out_ref[...] = (y * factor if factor != 1 else y).astype(out_ref.dtype)
    return
  (total_ref,) = scratch
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _() -> None:
    total_ref[...] = y

  @pl.when(k > 0)
  def _() -> None:
    total_ref[...] += y

  @pl.when(k == steps - 1)
  def _() -> None:
    total = total_ref[...]
    out_ref[...] = (total * factor if factor != 1 else total).astype(out_ref.dtype)


def decoder(
  ref: Any, *, line: values.Line, layout: str, dtype: Any
) -> Callable[[int], tuple[jax.Array, float]]:
  """Choose how units are decoded.

  Args:
    ref: block of codes.
    line: what codes stand for.
    layout: of the codes.
    dtype: of the activations.

  Returns:
    A function from the number of a unit to (base + codes, base), 128 rows in `dtype`; gs8 gives
    2^(8 - width) times that.
  """
  if line.table is not None:
    look_up = tpu_tables.pairs if line.by_pairs else tpu_tables.singles
    return look_up(ref, table=line.table)
  if line.kind != "steps":
    return tpu_tables.floats(ref) if layout == "gs32" else _native(ref, 0.0, dtype)
  if layout == "native":
    return _native(ref, -(2.0 ** (line.width - 1)), dtype)
  return (_words if layout == "gs32" else _bytes)(ref, line.width)


def scaled(
  decode: Any, scales: jax.Array, zeros: jax.Array | None, *, size: int, zero: float
) -> Callable[[int], jax.Array]:
  """Make weights whole: `(u - z) s` in bfloat16, scales and zero points rounded to it.

  Args:
    decode: what `decoder` returned, for bfloat16.
    scales, zeros: of the block's groups, float32.
    size: rows of a group.
    zero: the zero point if there are no `zeros`.

  Returns:
    A function from the number of a unit to its 128 rows.
  """

  def spread(rows: jax.Array, unit: int) -> jax.Array:
    """Take the unit's groups and repeat them to its rows."""
    if size >= UNIT:
      group = unit * UNIT // size
      return rows[group : group + 1, :].astype(jnp.bfloat16)
    count = UNIT // size
    few = rows[unit * count : (unit + 1) * count, :].astype(jnp.bfloat16)
    return jnp.concatenate(
      [jnp.broadcast_to(few[i : i + 1, :], (size, few.shape[1])) for i in range(count)]
    )

  def weights(unit: int) -> jax.Array:
    w, base = decode(unit)
    if zeros is None:
      shift = base + zero
      if shift != math.floor(shift):  # of signs: exact in two steps only
        w, shift = w - jnp.bfloat16(base), zero
      w = w - jnp.bfloat16(shift) if shift else w
    else:
      w = (w - jnp.bfloat16(base) if base else w) - spread(zeros, unit)
    return w * spread(scales, unit)

  return weights


def _post(
  x_ref: Any,
  decode: Any,
  scales: Any,
  zeros: Any,
  units: int,
  size: int,
  zero: float,
  gain: float,
) -> jax.Array:
  """Scale partial products of groups; decoded weights are `gain` times what they stand for."""
  depth = min(size, UNIT)
  sums = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32
  total = part = None
  for unit in range(units):
    w, base = decode(unit)
    x_unit = x_ref[:, unit * UNIT : (unit + 1) * UNIT]
    for first in range(0, UNIT, depth):
      group = (unit * UNIT + first) // size
      x = x_unit[:, first : first + depth]
      y = jnp.dot(x, w[first : first + depth], preferred_element_type=sums).astype(jnp.float32)
      shift = gain * (base + (zero if zeros is None else zeros[group : group + 1, :]))
      if zeros is not None or shift:
        x_sum = _sum(x_unit.astype(sums), first, depth).astype(jnp.float32)
        y = y - x_sum * shift
      part = y if part is None else part + y
      ends = (unit * UNIT + first + depth) % size == 0 or unit == units - 1 and size > UNIT
      if ends:
        part = part * scales[group : group + 1, :]
        total = part if total is None else total + part
        part = None
  assert total is not None
  return total


def _sum(x: jax.Array, first: int, count: int) -> jax.Array:
  """Add up some columns. Others are masked: to cut columns out of a register takes longer."""
  if count < UNIT:
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where((lane >= first) & (lane < first + count), x, jnp.zeros_like(x))
  return x.sum(axis=1, keepdims=True)


def _pre(
  x_ref: Any, decode: Any, scales: Any, zeros: Any, units: int, size: int, zero: float
) -> jax.Array:
  """Scale weights; two units a product."""
  weights = scaled(decode, scales, zeros, size=size, zero=zero)
  total = None
  for first in range(0, units, 2):
    made = [weights(unit) for unit in range(first, min(first + 2, units))]
    w = jnp.concatenate(made) if len(made) > 1 else made[0]
    x = x_ref[:, first * UNIT : first * UNIT + w.shape[0]]
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    total = y if total is None else total + y
  assert total is not None
  return total


def _native(ref: Any, base: float, dtype: Any) -> Any:
  """Convert what the chip converts."""

  def decode(unit: int) -> tuple[jax.Array, float]:
    return ref[unit * UNIT : (unit + 1) * UNIT, :].astype(dtype), base

  return decode


def _words(ref: Any, width: int) -> Any:
  """Take codes out of gs32 words."""
  fields = 16 // width
  apart = ((_MANTISSA - width) // width + 1) * width  # shifts are multiples of this
  shifted: dict[tuple[int, int], jax.Array] = {}

  def decode(unit: int) -> tuple[jax.Array, float]:
    tile, field = divmod(unit, fields)
    shift = width * field // apart * apart
    place = width * field - shift
    if (tile, shift) not in shifted:
      word = ref[tile * (UNIT // 2) : (tile + 1) * (UNIT // 2), :]
      shifted[tile, shift] = lax.shift_right_logical(word, jnp.int32(shift)) if shift else word
    exponent = (127 + _MANTISSA - place) << _MANTISSA
    pair = shifted[tile, shift] & _both((2**width - 1) << place) | _both(exponent)
    return pltpu.bitcast(pair, jnp.bfloat16), 2.0 ** (_MANTISSA - place)

  return decode


def _bytes(ref: Any, width: int) -> Any:
  """Take codes out of gs8 words, to the top of their bytes: 2^(8 - width) (code - half), signed."""
  fields = 8 // width
  mask = jnp.int32(_four((2**width - 1) << (8 - width)))

  def decode(unit: int) -> tuple[jax.Array, float]:
    tile, field = divmod(unit, fields)
    word = ref[tile * (UNIT // 4) : (tile + 1) * (UNIT // 4), :]
    left = 8 - width - width * field
    word = lax.shift_left(word, jnp.int32(left)) if left else word
    return pltpu.bitcast(word & mask, jnp.int8), -(2.0 ** (width - 1))

  return decode


def _four(byte: int) -> int:
  """Repeat a byte to an int32."""
  word = byte * 0x01010101
  return word - 2**32 if word >= 2**31 else word


def _both(half: int) -> jax.Array:
  """Put a positive half-word into both halves of an int32."""
  return jnp.int32(half << 16 | half)
