# SPDX-License-Identifier: Apache-2.0
"""BitStack: a kernel as a stack of one-bit blocks, of which any number may be loaded.

The kernel (in, out), its rows multiplied by the norms of their inputs, is approximated again and
again: the residual R is sign(R) times a magnitude of rank `rank`, the truncated SVD of |R|, each
factor taking the root of the singular values. A block costs a bit a weight and its thin factors,
and none raises the error. The norms are divided out of the left factor again, which is exact.

`bitstack_sort` ranks the blocks of a model by what each gains; `bitstack_cut` keeps as many, in
that order, as a budget holds.

Where we differ from the published code: it folds the norms into the layer before, which leaves some
kernels unscaled; norms are taken over all tokens, where it averages those of samples, and its
1e-3 is relative to their mean. Factors are in float16 as there, and what rounding leaves over goes
to the next block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves, lifting, needs, packing, step

FACTORS = "float16"


def quantize(
  w: Float[Array, "rows cols"],
  squares: Float[Array, " rows"],
  *,
  blocks: int = 16,
  rank: int = 16,
) -> leaves.Sum:
  """Stack blocks of signs and low-rank magnitudes.

  Args:
    w: weights, input dimension first.
    squares: sum of squares of each input, up to a factor.
    blocks: how many.
    rank: of the magnitudes.

  Returns:
    A `Sum` of `SignedLowRank`, in the order in which they were found.

  Example:
    >>> w = jnp.array([[1.0, -2.0], [-2.0, 4.0]])
    >>> quantize(w, jnp.ones(2), blocks=1, rank=1).dense().round(1).tolist()
    [[1.0, -2.0], [-2.0, 4.0]]
  """
  rows, cols = w.shape
  rank = min(rank, rows, cols)
  norms = jnp.sqrt(squares.astype(jnp.float32))
  norms = jnp.where(norms.max() > 0, norms + 1e-3 * norms.mean(), 1.0)[:, None]

  def one(left: jax.Array, level: jax.Array) -> tuple[jax.Array, leaves.SignedLowRank]:
    signs = (left >= 0).astype(jnp.uint8)
    u, s, vt = jnp.linalg.svd(jnp.abs(left), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    block = leaves.SignedLowRank(
      packing.pack(signs, bits=1), (u[:, :rank] * root[None, :] / norms).astype(FACTORS),
      (root[:, None] * vt[:rank]).astype(FACTORS), level.reshape(1, 1),
    )  # fmt: skip
    return left - norms * block.dense(), block

  levels = jnp.arange(blocks, dtype=jnp.int32)
  _, stacked = jax.lax.scan(one, norms * w.astype(jnp.float32), levels)
  parts = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(blocks)]
  return leaves.Sum(tuple(dataclasses.replace(p, store=w.dtype.name) for p in parts))


def stack(leaf: Any) -> tuple[leaves.SignedLowRank, ...]:
  """List the blocks of a leaf.

  Args:
    leaf: array or leaf.

  Returns:
    The blocks, none for a leaf that is no stack.

  Example:
    >>> stack(jnp.ones((2, 2)))
    ()
  """
  parts = leaf.parts if isinstance(leaf, leaves.Sum) else ()
  return parts if all(isinstance(p, leaves.SignedLowRank) for p in parts) else ()


@step.method("compress.quantize.bitstack")
def bitstack(*, blocks: int = 16, rank: int = 16, select: str | None = None) -> step.Step:
  """Decompose kernels into stacks of one-bit blocks, from the norms of their inputs.

  Args:
    blocks: how many a kernel is made of.
    rank: of a block's magnitudes, at most.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> bitstack(blocks=8)
    (compress.quantize.bitstack(blocks=8),)

  Reference:
    Wang et al., BitStack: Any-Size Compression of Large Language Models in Variable Memory
    Environments, 2024, arXiv:2410.23918.
  """
  for name, value in (("blocks", blocks), ("rank", rank)):
    if value < 1:
      raise ValueError(f"{name}={value}: valid is 1 or more")
  return lifting.over_leaves(
    _kernel, hyper={"blocks": blocks, "rank": rank}, select=select, raw=True,
    wants={"inputs": needs.Statistic("sum_squares")}, scope="block",
  )  # fmt: skip


def _kernel(w: Any, inputs: Any, *, blocks: int, rank: int) -> Any:
  found = stack(w)
  if len(found) == blocks and found[0].rank == min(rank, *w.shape[-2:]):
    return w
  return quantize(leaves.dense(w), inputs.value, blocks=blocks, rank=rank)
