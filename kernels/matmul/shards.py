# SPDX-License-Identifier: Apache-2.0
"""Cut a quantized matrix into the matrices that the devices of `jax.shard_map` hold.

A leaf's rows and columns are static, those of the whole matrix, so the slices that a device gets of
its arrays are no leaf. What `split` returns is a stack of leaves, one a device: each has a shape of
its own, and goes through `prepare`, `scan` and `vmap` like any other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import formats, leaves, packing
from treesurgeon.kernels.matmul import checks


def split(leaf: Any, *, rows: int = 1, cols: int = 1) -> Any:
  """Cut a quantized or N:M kernel into equal shards of its rows and of its columns.

  Shards of rows give partial sums of the product, shards of columns its columns. Arrays that are
  sharded over rows and columns alike need no communication. Prepare afterwards: what is arranged
  for a device holds units of 128 rows side by side in its words. Kernels and loops do not declare
  what varies over a mesh, so `shard_map` takes `check_vma=False`.

  Args:
    leaf: QuantizedTensor or SparseTensor, (..., rows, cols).
    rows: shards along the rows; each holds whole groups, runs of M, and bytes.
    cols: shards along the columns.

  Returns:
    The shards along a new first axis, (rows * cols, ..., rows of a shard, columns of a shard), in
    the order of `jax.P((axis of rows, axis of columns))`.

  Raises:
    ValueError: if shards would cut a group or a byte, or for a leaf that cannot be cut; the message
      says how many shards it takes.

  Example:
    >>> leaf = leaves.QuantizedTensor(jnp.full((2, 1), 0x99, jnp.uint8), jnp.ones((2, 1)), None,
    ...                               None, rows=4, cols=1, bits=4, group_size=2)
    >>> def product(x, shards):
    ...   from treesurgeon import kernels
    ...   mine = jax.tree.map(lambda a: a[0], shards)
    ...   return jax.lax.psum(kernels.matmul(x, mine), "model")
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> specs = {"in_specs": (jax.P(None, "model"), jax.P("model")), "out_specs": jax.P()}
    >>> sharded = jax.shard_map(product, mesh=mesh, check_vma=False, **specs)
    >>> sharded(jnp.ones((1, 4)), split(leaf, rows=1)).tolist()
    [[4.0]]
  """
  if isinstance(leaf, leaves.SparseTensor):
    return _sparse(leaf, rows, cols)
  _refuse(leaf, rows, cols)
  one_group = leaf.group_size >= leaf.rows
  cut = lambda part, runs: _blocks(part, runs, rows, cols)
  per_group = lambda part: None if part is None else cut(part, 1 if one_group else rows)
  index = leaf.group_index
  return dataclasses.replace(
    leaf,
    codes=cut(leaf.codes, rows),
    scales=per_group(leaf.scales),
    zeros=per_group(leaf.zeros),
    group_index=None if index is None else jnp.broadcast_to(index, (cols, *index.shape)),
    rows=leaf.rows // rows,
    cols=leaf.cols // cols,
  )


def _blocks(part: jax.Array, runs: int, rows: int, cols: int) -> jax.Array:
  """Cut an array into `runs` of rows, which are `rows` or one for all, and columns."""
  *batch, high, wide = part.shape
  pieces = part.reshape(*batch, runs, high // runs, cols, wide // cols)
  pieces = jnp.moveaxis(pieces, (-4, -2), (0, 1))
  pieces = jnp.broadcast_to(pieces, (rows, *pieces.shape[1:]))  # one group's scales, every run
  return pieces.reshape(rows * cols, *batch, high // runs, wide // cols)


def _sparse(leaf: leaves.SparseTensor, rows: int, cols: int) -> leaves.SparseTensor:
  wrong = checks.disagreement(leaf)
  if wrong:
    raise ValueError(f"split: in the SparseTensor {wrong}")
  bits = max(1, (leaf.m - 1).bit_length())
  runs = leaf.rows // leaf.m
  fits = lambda count: runs % count == 0 and runs // count * leaf.n * bits % 8 == 0
  if rows < 1 or rows > 1 and not fits(rows):
    valid = ", ".join(str(n) for n in range(1, leaf.rows + 1) if n == 1 or fits(n))
    raise ValueError(
      f"split: rows={rows} cuts {leaf.rows} rows within a run of {leaf.m} or a byte of positions; "
      f"valid are {valid}"
    )
  if cols < 1 or leaf.cols % cols:
    raise ValueError(f"split: cols={cols} does not divide the {leaf.cols} columns")
  if leaves.is_leaf(leaf.values):
    values = split(leaf.values, rows=rows, cols=cols)
  else:
    values = _blocks(leaf.values, rows, rows, cols)
  return dataclasses.replace(
    leaf,
    values=values,
    positions=_blocks(leaf.positions, rows, rows, cols),
    rows=leaf.rows // rows,
    cols=leaf.cols // cols,
  )


def _refuse(leaf: Any, rows: int, cols: int) -> None:
  if not isinstance(leaf, leaves.QuantizedTensor):
    raise ValueError(
      f"split takes QuantizedTensor and SparseTensor, not {type(leaf).__name__}; split it before "
      "kernels.prepare, "
      "and of a leaf that is composed of others each of them"
    )
  wrong = checks.disagreement(leaf)
  if wrong:
    raise ValueError(f"split: in the QuantizedTensor {wrong}")
  nested = leaves.is_leaf(leaf.scales) or leaves.is_leaf(leaf.zeros)
  if leaf.group_cols != 1 or nested:
    raise ValueError("split takes groups of rows with plain scales, one a column")
  if leaf.group_index is not None and rows != 1:
    raise ValueError(
      f"split: rows={rows}, but rows with a group_index are not cut; rows=1 is valid"
    )
  whole = formats.TRITS if leaf.format == "ternary" else packing.period(leaf.bits)
  group = 1 if leaf.group_size >= leaf.rows else leaf.group_size

  def fits(count: int) -> bool:
    size, left = divmod(leaf.rows, count)
    return count == 1 or not (left or size % group or size % whole)

  if rows < 1 or not fits(rows):
    valid = ", ".join(str(n) for n in range(1, leaf.rows + 1) if fits(n))
    raise ValueError(
      f"split: rows={rows} cuts {leaf.rows} rows within a group of {leaf.group_size} or a byte of "
      f"{leaf.bits}-bit codes; valid are {valid}"
    )
  if cols < 1 or leaf.cols % cols:
    raise ValueError(f"split: cols={cols} does not divide the {leaf.cols} columns")
