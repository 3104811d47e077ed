# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning: the smallest weights go. The baseline of all pruning, no data needed.

Magnitudes are compared within an output, a matrix, or over all selected leaves of the model, which
then must all be in memory.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from treesurgeon.compress.prune import masks, ranking
from treesurgeon.core import lifting, step

PER = ("matrix", "column", "model")


def prune(
  w: Float[Array, "*batch rows cols"],
  *,
  sparsity: float,
  pattern: tuple[int, int] | None = None,
  packed: bool = False,
  per: str = "matrix",
) -> Any:
  """Set the weights of smallest magnitude to zero.

  Args:
    w: weights, input dimension first.
    sparsity: fraction to prune, where there is no pattern.
    pattern: (n, m) keeps n of every m consecutive inputs of each output.
    packed: return a `SparseTensor`; needs a pattern.
    per: "matrix" or "column": within what magnitudes are compared.

  Returns:
    The pruned weights, in the dtype of `w`.

  Example:
    >>> prune(jnp.array([[3.0, -1.0], [2.0, 4.0]]), sparsity=0.5).tolist()
    [[3.0, 0.0], [0.0, 4.0]]
  """
  score = jnp.abs(w.astype(jnp.float32))
  return masks.apply(w, score, sparsity=sparsity, pattern=pattern, packed=packed, per=per)


@step.method("compress.prune.magnitude")
def magnitude(
  *,
  sparsity: float = 0.5,
  pattern: str | None = None,
  packed: bool = False,
  per: str = "matrix",
  select: str | None = None,
) -> step.Step:
  """Prune the kernels' smallest weights.

  Args:
    sparsity: fraction to prune; 0 is the neutral setting. Unused with a pattern.
    pattern: "n:m" keeps n of every m consecutive inputs of each output.
    packed: hold the result as a `SparseTensor`; needs a pattern.
    per: "matrix", "column" (output) or "model": within what magnitudes are compared. With a
      pattern it makes no difference.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> magnitude(pattern="2:4")
    (compress.prune.magnitude(pattern='2:4'),)

  Reference:
    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
    arXiv:1506.02626.
  """
  if per not in PER:
    raise ValueError(f"per={per!r}: valid are {', '.join(PER)}")
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=packed)
  if per == "model" and n_m is None:
    return ranking.over_model(_score, _finish, hyper={}, sparsity=sparsity, select=select)
  hyper = {"sparsity": sparsity, "pattern": n_m, "packed": packed, "per": per}
  return lifting.over_leaves(prune, hyper=hyper, select=select)


def _score(w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  return jnp.abs(w.astype(jnp.float32))


def _finish(w: Float[Array, "*shape"], keep: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
  return jnp.where(keep, w, 0)
