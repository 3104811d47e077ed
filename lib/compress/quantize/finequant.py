# SPDX-License-Identifier: Apache-2.0
"""FineQuant: as many scales as a matrix' outliers ask for, from the weights alone.

A matrix begins with one scale a column. The groups are halved as long as that lowers the mean of
their ranges max|w| to less than a given share: an outlier then burdens fewer other weights, while
without outliers halving lowers the ranges little. Kernels are then rounded to nearest.

Read from the abstract and summaries of the paper, whose algorithm of choice we could not see: that
groups shrink from a column's is the paper's; the mean over groups, the halving and the share of
0.8 are ours. Normal weights lose 5 to 17 % of their range by a halving, columns with one outlier
over 20 %. Its own result is left alone, as are kernels that are in the width already.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, lifting, step

LARGEST = 1 << 14  # rows; a larger matrix goes from one group a column to groups of this size


def choose_size(
  w: Float[Array, "*batch rows cols"], *, sizes: Sequence[int], shrink: float = 0.8
) -> Int32[Array, ""]:
  """Choose the group size of a matrix.

  Args:
    w: weights, input dimension first.
    sizes: group sizes to go through, the largest first; -1, or more than `rows`, is a column.
    shrink: share below which the mean range must fall for groups to be halved.

  Returns:
    Index into `sizes`.

  Example:
    >>> w = jnp.ones((64, 4)).at[0].set(50.0)
    >>> [int(choose_size(x, sizes=(-1, 32, 16))) for x in (w, jnp.ones((64, 4)))]
    [2, 0]
  """
  rows = w.shape[-2]
  size = jnp.abs(w.astype(jnp.float32))
  before, going, picked = _mean_range(size, rows), jnp.array(True), jnp.zeros((), jnp.int32)
  for i, wanted in enumerate(sizes):
    if grids.clamp_group(wanted, rows) == rows:
      continue
    after = _mean_range(size, wanted)
    going &= after < shrink * before
    picked, before = jnp.where(going, i, picked), after
  return picked


@step.method("compress.quantize.finequant")
def finequant(
  *, bits: int = 4, smallest: int = 64, shrink: float = 0.8, select: str | None = None
) -> step.Step:
  """Quantize each kernel in groups as fine as its outliers ask for, no data needed.

  Args:
    bits: width of a code, 2 to 8.
    smallest: input rows in the finest groups; coarser ones have twice, four times, ... as many.
    shrink: share below which a halving must bring the mean range of the groups.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point are kernels of that width. Shapes alone do not tell what it
    stores: `jax.eval_shape` takes one group a column.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> finequant(bits=8)
    (compress.quantize.finequant(bits=8),)

  Reference:
    Kim et al., FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs,
    2023, arXiv:2308.09723.
  """
  grids.check(bits=bits, group_size=smallest)
  if smallest < 1 or not 0 <= shrink <= 1:
    raise ValueError(
      f"smallest={smallest}, shrink={shrink}: groups have a row or more, shrink is 0 to 1"
    )
  sizes = [-1]
  while smallest <= LARGEST:
    sizes.insert(1, smallest)
    smallest *= 2
  return lifting.over_leaves(
    _leaf, hyper={"bits": bits, "shrink": shrink}, select=select, raw=True,
    options=[{"group_size": s} for s in sizes], choose=_choose,
  )  # fmt: skip


def _mean_range(size: jax.Array, rows: int) -> jax.Array:
  *batch, all_rows, cols = size.shape
  widths = [(0, 0)] * len(batch) + [(0, -all_rows % rows), (0, 0)]
  return jnp.pad(size, widths).reshape(*batch, -1, rows, cols).max(axis=-2).mean()


def _choose(w: Any, *, options: Any, shrink: float, **hyper: Any) -> jax.Array:
  del hyper
  sizes = [dict(o)["group_size"] for o in options]
  return choose_size(leaves.dense(w), sizes=sizes, shrink=shrink)


def _leaf(w: Any, *, bits: int, group_size: int, shrink: float) -> Any:
  del shrink
  if grids.already(w, bits=bits, group_size=getattr(w, "group_size", -1), symmetric=True):
    return w
  w = leaves.dense(w)
  form: dict[str, Any] = {"bits": bits, "group_size": grids.clamp_group(group_size, w.shape[-2])}
  codes, grid = rtn.quantize(w, **form)
  return grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
