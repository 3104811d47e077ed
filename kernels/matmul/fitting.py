# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices that a kernel takes only when something is done to the inputs or the output.

The kernels take runs of rows that share a scale a column. `fit` makes such a matrix of every other:

* rows in the order of activations (`group_index`) are put together by group, and inputs follow;
* groups whose rows no kernel takes are cut into runs of 16 to 128 rows, or filled up to such, with
  inputs of zero, whichever moves fewer bytes;
* scales of a tile of columns are repeated. Where all columns share them and groups are few rows,
  as in scales of inputs, it is the inputs that are scaled, and zero points, the same in a row's
  every column, are subtracted from the output as one number a token;
* scales that are themselves quantized become plain ones: 8-bit floats under one scale bfloat16,
  which holds them exactly, and the one scale multiplies the output. Other nested scales, one to 32
  rows and more, become float32, and the leaf keeps them as they were.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import fitted, layouts

UNIT = layouts.GROUP
LONGEST = 48 * UNIT  # rows of a group that one step of a kernel takes
FILLED = 16.0  # bits a weight may take: no more than dense


def runs(rows: int, group_size: int, width: int, *, longest: int = LONGEST) -> tuple[int, int]:
  """Choose how groups are cut or filled up: not if a kernel takes them, else for fewest bytes.

  Args:
    rows: of the matrix.
    group_size: rows of a group.
    width: bits of a code on the device.
    longest: rows of a run, at most.

  Returns:
    (rows a group is filled up to, rows of a run). With no filling and no cut both are `group_size`.

  Example:
    >>> [runs(4096, size, 4) for size in (128, 96, 40, 8192)]
    [(128, 128), (96, 32), (64, 64), (8192, 8192)]
  """
  part, whole = UNIT % group_size == 0, group_size % UNIT == 0 and group_size <= longest
  if group_size >= rows or (group_size % 16 == 0 and (part or whole)):
    return group_size, group_size
  best = None
  for padded in range(-(-group_size // 16) * 16, -(-group_size // 16) * 16 + UNIT, 16):
    run = math.gcd(padded, UNIT)
    if run == UNIT:
      units = padded // UNIT
      run *= max(d for d in range(1, longest // UNIT + 1) if units % d == 0)
    # A run's scale is 32 bits, and takes about half as much again to apply.
    cost = width * padded / group_size + 48 / run
    if best is None or cost < best[0]:
      best = cost, padded, run
  assert best is not None
  return best[1:]


def unsupported(leaf: leaves.QuantizedTensor, width: int) -> str:
  """Say why a matrix cannot be fitted.

  Args:
    leaf: the matrix.
    width: bits of a code on the device.

  Returns:
    The reason, or "".
  """
  if leaf.zeros is not None and leaf.format != "int":
    return f"it takes zero points of integers, not of format {leaf.format!r}"
  if scales_inputs(leaf):
    return ""
  groups, size = leaf.scales.shape[-2], min(leaf.group_size, leaf.rows)
  if leaf.group_index is not None:
    known = not isinstance(leaf.group_index, jax.core.Tracer | jax.ShapeDtypeStruct)
    if known:
      with jax.ensure_compile_time_eval():
        index = jnp.asarray(leaf.group_index).reshape(-1, leaf.rows)
        most = int(jax.vmap(lambda row: jnp.bincount(row, length=groups))(index).max())
      if most > size:
        return f"it takes a group_index with up to {size} rows a group, not {most}"
  padded, _ = _runs(leaf, width, LONGEST)
  if width * padded > FILLED * size:
    return f"it takes groups of {width} rows or more for codes of {width} bits, not {size}"
  return ""


def needed(leaf: leaves.QuantizedTensor, width: int, longest: int) -> bool:
  """Tell whether a matrix has to be fitted.

  Args:
    leaf: the matrix.
    width: bits of a code on the device.
    longest: rows of a run, at most.

  Returns:
    Whether it has.
  """
  nested = base.is_leaf(leaf.scales) or base.is_leaf(leaf.zeros)
  size = min(leaf.group_size, leaf.rows)
  same = _runs(leaf, width, longest) == (size, size)
  return nested or leaf.group_cols != 1 or leaf.group_index is not None or not same


def scales_inputs(leaf: leaves.QuantizedTensor) -> bool:
  """Tell whether it is a matrix's inputs that are scaled.

  Args:
    leaf: the matrix.

  Returns:
    Whether all columns share scales of fewer rows than a kernel takes.
  """
  return fitted.by_inputs(leaf) and leaf.group_index is None


def fit(
  leaf: leaves.QuantizedTensor, *, width: int, longest: int
) -> tuple[Any, fitted.FittedTensor]:
  """Make a matrix of runs of rows with plain scales.

  Args:
    leaf: any matrix that is supported.
    width: bits of a code on the device.
    longest: rows of a run, at most.

  Returns:
    (QuantizedTensor, a FittedTensor around it).
  """
  inputs = scales_inputs(leaf)
  groups, size = leaf.scales.shape[-2], min(leaf.group_size, leaf.rows)
  padded, run = (size, size) if inputs else _runs(leaf, width, longest)
  rows, codes, order, scales = leaf.rows, leaf.codes, None, leaf.scales
  nested = gain = None
  kept = [base.is_leaf(part) or inputs for part in (leaf.scales, leaf.zeros)]
  if _one_scale(leaf.scales) and not inputs:
    gain, kept[0] = leaf.scales.scales, False
    nested = dataclasses.replace(leaf.scales, codes=None, scales=None)
    scales = jax.lax.bitcast_convert_type(leaf.scales.codes, jnp.float8_e4m3fn)
    scales = scales.astype(jnp.bfloat16)
  scales = leaves.dense(scales)
  zeros = None if leaf.zeros is None else leaves.dense(leaf.zeros)

  if leaf.group_index is not None:
    order, fits = _order(leaf.group_index, groups, size, padded)
    scales = jnp.where(fits, scales, jnp.nan)  # where it could not be refused: within a trace
    codes = layouts.over_batch(lambda c, at: fitted.pack(leaf, _take(leaf, c, at[0])), codes, order)
    rows = groups * padded
  elif padded != size:
    rows = groups * padded
    at = np.arange(rows)
    at = np.where(at % padded < size, at // padded * size + at % padded, leaf.rows)
    codes = layouts.over_batch(lambda c: fitted.pack(leaf, _take(leaf, c, at)), codes)

  def part(each: Any) -> Any:
    if each is None:
      return None
    wide = jnp.repeat(each, min(leaf.group_cols, leaf.cols), axis=-1)[..., : leaf.cols]
    if run < rows:
      wide = jnp.repeat(wide, padded // run, axis=-2)[..., : -(-rows // run), :]
    return wide

  if inputs:
    scales, zeros, run = jnp.ones((*leaf.batch, 1, leaf.cols), jnp.bfloat16), None, rows
  else:
    scales, zeros = part(scales), part(zeros)
  plain = leaves.QuantizedTensor(
    codes, scales, zeros, None, rows=rows, cols=leaf.cols, bits=leaf.bits, group_size=run,
    store=leaf.store, format=leaf.format,
  )  # fmt: skip
  around = fitted.FittedTensor(
    None, order, leaf.scales if kept[0] else None, leaf.zeros if kept[1] else None, gain,
    rows=leaf.rows, cols=leaf.cols, bits=leaf.bits, group_size=leaf.group_size, store=leaf.store,
    format=leaf.format, group_cols=leaf.group_cols, padded=padded, nested=nested,
  )  # fmt: skip
  return plain, around


def _runs(leaf: leaves.QuantizedTensor, width: int, longest: int) -> tuple[int, int]:
  size = min(leaf.group_size, leaf.rows)
  rows = leaf.rows if leaf.group_index is None else leaf.scales.shape[-2] * size
  return runs(rows, size, width, longest=longest)


def _one_scale(scales: Any) -> bool:
  """Tell whether scales are 8-bit floats under one scale."""
  if not isinstance(scales, leaves.QuantizedTensor) or base.is_leaf(scales.scales):
    return False
  one = scales.group_size >= scales.rows and scales.group_cols >= scales.cols
  return one and scales.format == "e4m3fn" and scales.group_index is None


def _order(index: jax.Array, groups: int, size: int, padded: int) -> tuple[jax.Array, jax.Array]:
  """Put rows of one group together: the row at each place, and whether every group has room."""
  rows = index.shape[-1]

  def one(groups_of: jax.Array) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(groups_of, stable=True).astype(jnp.int32)
    ranked = groups_of[order]
    within = jnp.arange(rows) - jnp.searchsorted(ranked, ranked)
    places = jnp.full(groups * padded, rows, jnp.int32)
    places = places.at[ranked * padded + within].set(order, mode="drop")
    return places, within.max() < size

  places, fits = jax.vmap(one)(index.reshape(-1, rows))
  batch = index.shape[:-2]
  return places.reshape(*batch, 1, groups * padded), fits.reshape(*batch, 1, 1)


def _take(leaf: Any, stream: jax.Array, at: Any) -> jax.Array:
  return jnp.take(fitted.unpack(leaf, stream), at, axis=0, mode="fill", fill_value=0)
