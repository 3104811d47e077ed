# SPDX-License-Identifier: Apache-2.0
"""Weighted average of models of one architecture (model soups).

Averages the weights of the model at hand and of its donors. Wortsman et al., "Model soups:
averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", 2022 (arXiv 2203.05482). Same arithmetic as mergekit's `linear`, whose list of models is here
the base followed by the donors; weights that sum to zero are refused, where mergekit divides by
zero. Computed in float32, returned in the base's storage dtype; compressed leaves are averaged
dense and come back dense. Neutral at weights (1, 0, ...).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import weights as weights_lib


def average(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  normalize: bool = True,
) -> Float[Array, "*shape"]:
  """Average an array with its counterparts: Σ w_i θ_i, divided by Σ w_i.

  Args:
    w: the base's array.
    donors: the donors' arrays.
    weights: one number for the base and one for each donor; None means all equal.
    normalize: whether to divide by the sum of the weights.

  Returns:
    The average, in the dtype of `w`.

  Raises:
    ValueError: if the number of weights is wrong.

  Example:
    >>> average(jnp.zeros(2), (jnp.ones(2),), weights=(1.0, 3.0)).tolist()
    [0.75, 0.75]
  """
  arrays = (w, *donors)
  weight = weights_lib.resolve(weights, len(arrays), of="models (the base, then its donors)")
  divisor = sum(weight)
  total = jnp.asarray(sum(c * x.astype(jnp.float32) for c, x in zip(weight, arrays, strict=True)))
  return (total / divisor if normalize else total).astype(w.dtype)


@step.method("merge.linear")
def linear(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  normalize: bool = True,
  select: str | None = None,
) -> step.Step:
  """Average a model with its donors, leaf by leaf.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number for the model itself and one for each donor; None means all equal.
      Negative weights extrapolate.
    normalize: whether to divide by the sum of the weights.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError if the number of weights or a donor's shape is
    wrong, or weights to be normalized sum to zero.

  Example:
    >>> linear(weights=(0.5, 0.25, 0.25))
    (merge.linear(weights=(0.5, 0.25, 0.25)),)

  Reference:
    Wortsman et al., Model soups, 2022, arXiv 2203.05482.
  """
  return lifting.over_leaves(
    average,
    hyper={"normalize": normalize},
    knobs={"weights": weights},
    check=_check,
    split=True,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _check(donors: int, *, weights: tuple[float, ...] | None, normalize: bool) -> None:
  weight = weights_lib.resolve(weights, donors + 1, of="models (the base, then its donors)")
  if normalize and abs(sum(weight)) < 1e-8:
    raise ValueError(f"weights={weight} sum to zero, so they cannot be normalized")
