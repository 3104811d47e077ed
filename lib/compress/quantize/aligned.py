# SPDX-License-Identifier: Apache-2.0
"""Two bits a weight, and four for the groups of the widest range, chosen in aligned blocks.

Li et al., "Enabling fast 2-bit LLM on GPUs: memory alignment, sparse outlier, and asynchronous
dequantization", 2023 (arXiv 2311.16442). Ranges of groups differ within a matrix, so a small
fraction of them is worth four bits. `align` neighbouring outputs have theirs at the same inputs,
and as many as any other outputs, so that what a warp reads is of one width. Of the groups in two
bits the largest weights are kept beside, for those hurt most there. Scales are quantized in turn.

Read from the abstract and summaries: that groups are chosen by range, in aligned blocks, and that
single weights are kept in narrow groups alone, is the paper's; sizes and shares are ours, and bring
4096 x 4096 weights to 2.86 bits, masks included, where theirs have 2.85. Weights are rounded to
nearest on asymmetric grids, where the paper's later versions weigh ranges by second derivatives.
The kernel that dequantizes asynchronously is no part of this. Float32. Fixed point: its own result
is left alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from treesurgeon.compress.prune import masks
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import outliers as outlying
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, lifting, packing, step


def widest(
  w: Float[Array, "rows cols"], *, group_size: int, align: int, count: int
) -> Bool[Array, "groups cols"]:
  """Find the groups of widest range of every block of columns.

  Args:
    w: weights, input dimension first.
    group_size: rows in a group; the last one may be shorter.
    align: columns in a block, which have their groups at the same rows; the last may have fewer.
    count: groups of each column to find.

  Returns:
    True where a group is among them. The range of a block is the sum of its columns'.

  Example:
    >>> w = jnp.array([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 9.0, 0.0]])
    >>> widest(w, group_size=1, align=2, count=1).astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
  """
  parts = _groups(w.astype(jnp.float32), group_size)
  ranges = jnp.maximum(parts.max(axis=1), 0.0) - jnp.minimum(parts.min(axis=1), 0.0)
  groups, cols = ranges.shape
  blocks = jnp.pad(ranges, [(0, 0), (0, -cols % align)]).reshape(groups, -1, align).sum(axis=2)
  return jnp.repeat(masks.top(blocks, count), align, axis=1)[:, :cols]


def quantize(
  w: Float[Array, "rows cols"],
  wide: Bool[Array, "groups cols"],
  *,
  count: int,
  bits: int = 2,
  wide_bits: int = 4,
  group_size: int = 32,
  outliers: float = 0.002,
  scale_dtype: str | None = "int8",
) -> leaves.Sum:
  """Round groups to one of two widths, all but the largest weights of the narrow ones.

  Args:
    w: weights, input dimension first.
    wide: which groups have the larger width.
    count: how many of each column.
    bits: width of a code.
    wide_bits: width of a code in wide groups.
    group_size: rows that share a scale; the last group may be shorter.
    outliers: fraction of the weights that are kept.
    scale_dtype: how scales are stored, see `grid`; None is the dtype of `w`.

  Returns:
    A `Sum` of `GroupSparse` leaves, which complement one another, and of `Outliers`.

  Example:
    >>> w = jnp.array([[3.0], [1.0], [15.0], [4.0]])
    >>> wide = jnp.array([[False], [True]])
    >>> leaf = quantize(w, wide, count=1, group_size=2, outliers=0.0, scale_dtype=None)
    >>> leaf.dense().ravel().tolist()
    [3.0, 1.0, 15.0, 4.0]
  """
  rows, cols = w.shape
  narrow = ~wide
  inside = jnp.repeat(narrow, group_size, axis=0)[:rows]
  kept = outlying.pick(jnp.where(inside, jnp.abs(w.astype(jnp.float32)), 0.0), outliers)
  # Zero is on every grid and widens no range, so it leaves no trace of what is kept elsewhere.
  groups = _groups(jnp.where(kept, 0, w), group_size)
  parts: list[Any] = []
  for mask, number, width in ((narrow, len(wide) - count, bits), (wide, count, wide_bits)):
    if not number:
      continue
    places = jnp.argsort(~mask, axis=0, stable=True)[:number]
    mine = jnp.take_along_axis(groups, places[:, None], axis=0).reshape(-1, cols)
    form: dict[str, Any] = {"bits": width, "group_size": group_size}
    codes, grid = rtn.quantize(mine, **form, symmetric=False, scale_dtype=scale_dtype)
    held = grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
    packed = packing.pack(mask.astype(jnp.uint8), bits=1)
    parts.append(leaves.GroupSparse(held, packed, rows, group_size))
  if outlying.count_of(outliers, rows, cols):
    parts.append(outlying.gather(w, kept, outliers))
  return leaves.Sum(tuple(parts))


@step.method("compress.quantize.aligned")
def aligned(
  *,
  bits: int = 2,
  wide_bits: int = 4,
  group_size: int = 32,
  wide: float = 0.1,
  align: int = 16,
  outliers: float = 0.002,
  scale_dtype: str | None = "int8",
  select: str | None = None,
) -> step.Step:
  """Quantize kernels to two bits, their groups of widest range to four, no data needed.

  Args:
    bits: width of a code, 1 to 8.
    wide_bits: width of a code in wide groups.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    wide: fraction of each column's groups that are wide.
    align: neighbouring columns whose wide groups are at the same rows.
    outliers: fraction of the weights that are kept, out of narrow groups.
    scale_dtype: how scales are stored, see `quantize.rtn`; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> aligned(wide=0.2)
    (compress.quantize.aligned(wide=0.2),)

  Reference:
    Li et al., Enabling Fast 2-bit LLM on GPUs: Memory Alignment, Sparse Outlier, and Asynchronous
    Dequantization, 2023, arXiv:2311.16442.
  """
  for width in (bits, wide_bits):
    grids.check(bits=width, group_size=group_size, symmetric=False, scale_dtype=scale_dtype)
  outlying.check(outliers)
  if not 0 <= wide <= 1:
    raise ValueError(f"wide={wide}: valid is a fraction of the groups, 0 to 1, usually 0.1")
  if align < 1:
    raise ValueError(f"align={align}: blocks have 1 column or more")
  hyper = {
    "bits": bits, "wide_bits": wide_bits, "group_size": group_size, "wide": wide, "align": align,
    "outliers": outliers, "scale_dtype": scale_dtype,
  }  # fmt: skip
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, raw=True)


def _leaf(w: Any, *, group_size: int, wide: float, align: int, **hyper: Any) -> Any:
  size = grids.clamp_group(group_size, w.shape[-2])
  count = round(wide * -(-w.shape[-2] // size))

  def make(x: jax.Array) -> leaves.Sum:
    chosen = widest(x, group_size=size, align=align, count=count)
    return quantize(x, chosen, count=count, group_size=size, **hyper)

  if leaves.is_leaf(w):
    own = jax.eval_shape(make, jax.ShapeDtypeStruct(w.shape, w.dtype))
    if leaves.signature(own) == leaves.signature(w):
      return w
  return make(leaves.dense(w))


def _groups(w: jax.Array, size: int) -> jax.Array:
  """Cut into groups, (groups, size, cols); padding is 0, which no range minds."""
  rows, cols = w.shape
  return jnp.pad(w, [(0, -rows % size), (0, 0)]).reshape(-1, size, cols)
