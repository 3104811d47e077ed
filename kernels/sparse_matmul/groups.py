# SPDX-License-Identifier: Apache-2.0
"""Kept groups of each column: found run by run, or put in their places once for a TPU.

GQSA keeps other groups of 16 rows in every column. No block of a matrix is free of weights then, so
a kernel that leaves blocks out would leave none out, and lookups in registers take longer than the
memory they save. `prepare` therefore puts the codes in their places, the pruned groups' scales
zero: an integer matrix with all its groups, by which the kernel of `kernels/matmul` multiplies. It
takes twice the memory of the half that GQSA keeps, and `restore` takes it out again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import prepared


@base.container(("weight", "mask"))
class PreparedGroups(prepared.Instead):
  """Hold a `GroupSparse` as a matrix with all its groups.

  Attributes:
    weight: the prepared matrix; pruned groups have scale 0.
    mask: which groups are kept, as of the GroupSparse.
    rows: input dimension; the matrix has that of whole groups.
    kept: groups kept in each column.
    group: rows in a group.
    target: name of the device.
  """

  weight: base.Part
  mask: base.Part
  rows: int
  kept: int
  group: int
  target: str

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.mask.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.mask.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.weight.dtype

  def restore(self) -> leaves.GroupSparse:
    """Return the GroupSparse, bit for bit."""
    whole = self.weight.restore()

    def take_out(whole: leaves.QuantizedTensor, mask: jax.Array) -> leaves.QuantizedTensor:
      there = packing.unpack(mask, bits=1, rows=whole.rows // self.group)
      order = jnp.argsort(1 - there.astype(jnp.int32), axis=0, stable=True)[: self.kept]
      return _at(whole, order, self.group)

    for _ in self.batch:
      take_out = jax.vmap(take_out)
    return leaves.GroupSparse(take_out(whole, self.mask), self.mask, self.rows, self.group)


def unsupported(leaf: leaves.GroupSparse) -> str:
  """Say why a leaf's groups cannot be found in packed bytes.

  Args:
    leaf: the matrix.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(leaves.GroupSparse(jnp.ones((2, 1)), jnp.ones((1, 1), jnp.uint8), 4, 2))
    ''
  """
  kept = leaf.kept
  if not leaves.is_leaf(kept):
    return ""
  if not isinstance(kept, leaves.QuantizedTensor) or kept.group_index is not None:
    return "it takes kept groups that are an array or quantized in groups of consecutive rows"
  if kept.group_size != leaf.group or kept.group_cols != 1:
    return f"it takes a scale a kept group of {leaf.group} rows, not one for {kept.group_size}"
  whole = formats.TRITS if kept.format == "ternary" else packing.period(kept.bits)
  if leaf.group % whole:
    return f"it takes groups of a multiple of {whole} rows, not {leaf.group}"
  return ""


def cut(leaf: leaves.GroupSparse, size: int, count: int) -> tuple[Any, Callable[[Any], Any]]:
  """Cut a matrix into runs of rows.

  Args:
    leaf: the matrix; kept groups are an array, or as `unsupported` accepts.
    size: rows of a run, a multiple of 8 groups.
    count: of runs.

  Returns:
    (parts of all runs, stacked; function from those of one run to its rows, as an array or codes).
  """
  stream = size // leaf.group // 8
  filled = jnp.pad(leaf.mask, [(0, count * stream - leaf.mask.shape[0]), (0, 0)])
  mask = filled.reshape(count, stream, leaf.cols)
  kept = jnp.bitwise_count(mask).sum(axis=1, dtype=jnp.int32)
  before = jnp.cumsum(kept, axis=0) - kept

  def build(parts: tuple[jax.Array, jax.Array]) -> Any:
    here = packing.unpack(parts[0], bits=1, rows=size // leaf.group)
    # As a product: XLA would fuse a cumulative sum into each lookup, and sum anew for each.
    so_far = jnp.dot(jnp.tri(here.shape[0]), here.astype(jnp.float32), precision="highest")
    which = jnp.maximum(parts[1][None] + so_far.astype(jnp.int32) - 1, 0)
    found = _at(leaf.kept, which, leaf.group)
    if not isinstance(found, leaves.QuantizedTensor):
      return jnp.where(jnp.repeat(here, leaf.group, axis=0) == 1, found, 0)
    return dataclasses.replace(found, scales=jnp.where(here == 1, found.scales, 0))

  return (mask, before), build


@functools.partial(jax.jit, static_argnames=("target",))
def spread(leaf: leaves.GroupSparse, target: str) -> leaves.QuantizedTensor:
  """Put codes in their places.

  Args:
    leaf: the matrix, kept groups quantized as `unsupported` accepts.
    target: name of the device; it makes no difference.

  Returns:
    All groups, the pruned ones' scales zero; rows of whole groups.

  Example:
    >>> kept = leaves.QuantizedTensor(jnp.full((1, 1), 0x9A, jnp.uint8), jnp.ones((1, 1)), None,
    ...                               None, rows=2, cols=1, bits=4, group_size=2)
    >>> leaf = leaves.GroupSparse(kept, jnp.full((1, 1), 2, jnp.uint8), rows=4, group=2)
    >>> spread(leaf, "tpu-v6e").dense()[:, 0].tolist()
    [0.0, 0.0, 2.0, 1.0]
  """
  del target
  groups = -(-leaf.rows // leaf.group)

  def one(leaf: leaves.GroupSparse) -> leaves.QuantizedTensor:
    parts, build = cut(leaf, -(-groups // 8) * 8 * leaf.group, 1)
    whole = build(jax.tree.map(lambda a: a[0], parts))
    rows = groups * leaf.group
    codes = whole.codes[: whole.codes.shape[0] * rows // whole.rows]
    zeros = None if whole.zeros is None else whole.zeros[:groups]
    return dataclasses.replace(
      whole, codes=codes, scales=whole.scales[:groups], zeros=zeros, rows=rows
    )

  for _ in leaf.batch:
    one = jax.vmap(one)
  return one(leaf)


def _at(kept: Any, which: jax.Array, group: int) -> Any:
  """Take a group of each column, one that `which` (groups, cols) names."""

  def take(part: jax.Array, per_group: int) -> jax.Array:
    by_group = part.reshape(-1, per_group, part.shape[-1])
    found = jnp.take_along_axis(by_group, which[:, None], axis=0, mode="promise_in_bounds")
    return found.reshape(-1, part.shape[-1])

  if not leaves.is_leaf(kept):
    return take(kept, group)
  zeros = None if kept.zeros is None else take(base.dense(kept.zeros), 1)
  codes = take(kept.codes, kept.codes.shape[-2] * group // kept.rows)
  scales = take(base.dense(kept.scales), 1)
  return dataclasses.replace(
    kept, codes=codes, scales=scales, zeros=zeros, rows=which.shape[0] * group
  )
