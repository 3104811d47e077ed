# SPDX-License-Identifier: Apache-2.0
"""Model Breadcrumbs: keep the middle of every task vector, without outliers and small changes.

Davari and Belilovsky, "Model Breadcrumbs: scaling multi-task model merging with sparse masks",
2023 (arXiv 2312.06795). `breadcrumbs` adds what is kept, `breadcrumbs_ties` elects signs first.
Of n changes the int(gamma n) largest are dropped and the next int(density n) kept: gamma and
density are 1 - γ and γ - β of the paper. `granularity="tensor"` is mergekit's (0.1.5): a tensor is
cut as one vector, and if gamma + density exceed 1 fewer outliers are dropped; results are equal to
the bit but for entries exactly at a cut, which are kept lowest index first. `granularity="row"`
is the authors' code: every row (the weights of one output neuron) is cut by itself, and all
outliers are dropped; scalars are kept. At density 1 nothing is cut, in either. mergekit's defaults
are density 1 and gamma 0.01; `normalize` is false in both spellings.

Cuts are found by counting, not sorting (`trim`). Computed in float32, returned in the storage
dtype; compressed leaves come back dense. Neutral at lam=0; with one donor, density 1 and lam 1 the
result is that donor up to rounding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, trim, varied
from treesurgeon.merge import consensus, rows
from treesurgeon.merge import weights as weights_lib

GRANULARITIES = ("tensor", "row")


def keep_middle_and_merge(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  density: float | tuple[float, ...] = 0.1,
  gamma: float | tuple[float, ...] = 0.01,
  lam: ArrayLike = 1.0,
  normalize: bool = False,
  granularity: str = "tensor",
  elect: bool = False,
  axis: int = -1,
) -> Float[Array, "*shape"]:
  """Merge arrays by Model Breadcrumbs.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number a donor; None means ones.
    density: fraction of each donor's entries to keep, or one fraction a donor.
    gamma: fraction of the largest entries to drop, or one fraction a donor.
    lam: λ, multiplies the merged change.
    normalize: whether to divide by the summed weights (of agreeing entries, with `elect`).
    granularity: "tensor" or "row".
    elect: whether to elect signs before adding.
    axis: along which a row lies.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> donor = jnp.array([9.0, 1.0, 2.0, 3.0])
    >>> keep_middle_and_merge(jnp.zeros(4), (donor,), density=0.5, gamma=0.25).tolist()
    [0.0, 0.0, 2.0, 3.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  shares = weights_lib.each(density, len(donors), name="density")
  tops = weights_lib.each(gamma, len(donors), name="gamma")
  base = w.astype(jnp.float32)
  deltas = []
  for donor, share, top in zip(donors, shares, tops, strict=True):
    delta = donor.astype(jnp.float32) - base
    deltas.append(keep_middle(delta, density=share, gamma=top, granularity=granularity, axis=axis))
  merge = consensus.elect if elect else consensus.add
  return merge(base, deltas, weights=weight, lam=lam, normalize=normalize).astype(w.dtype)


def keep_middle(
  delta: Float[Array, "*shape"],
  *,
  density: float,
  gamma: float,
  granularity: str = "tensor",
  axis: int = -1,
) -> Float[Array, "*shape"]:
  """Zero the largest and the smallest entries of a change.

  Args:
    delta: the change, float32.
    density: fraction to keep.
    gamma: fraction of the largest to zero.
    granularity: "tensor" or "row".
    axis: along which a row lies.

  Returns:
    The sparse change.

  Example:
    >>> keep_middle(jnp.array([[9.0, 1.0], [5.0, 2.0]]), density=0.5, gamma=0.5,
    ...             granularity="row").tolist()
    [[0.0, 1.0], [0.0, 2.0]]
  """
  if density >= 1 or delta.size == 0:
    return delta
  if granularity == "tensor":
    keep, top = int(density * delta.size), int(gamma * delta.size)
    return _middle(delta, keep, min(top, delta.size - keep))
  if delta.ndim == 0:
    return delta
  size = delta.shape[rows.last(axis, delta.ndim)]
  keep, top = int(density * size), int(gamma * size)
  return rows.over(lambda row: _middle(row, min(keep, size - top), top), axis, delta)


@step.method("merge.breadcrumbs")
def breadcrumbs(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.1,
  gamma: varied.Varied | Sequence[varied.Varied] = 0.01,
  lam: varied.Varied = 1.0,
  normalize: bool = False,
  granularity: str = "tensor",
  select: str | None = None,
) -> step.Step:
  """Add the middle of the donors' task vectors to the model they started from.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    gamma: fraction of the largest changes to drop, 0 to 1, or one fraction a donor.
    lam: multiplies the merged change.
    normalize: whether to divide by the sum of the weights.
    granularity: "tensor" (mergekit's) or "row" (the authors').
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for fractions outside 0 to 1 or an unknown granularity.

  Example:
    >>> breadcrumbs(lam=0.3)
    (merge.breadcrumbs(lam=0.3),)

  Reference:
    Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795.
  """
  return _step(False, models, weights, density, gamma, lam, normalize, granularity, select)


@step.method("merge.breadcrumbs_ties")
def breadcrumbs_ties(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.1,
  gamma: varied.Varied | Sequence[varied.Varied] = 0.01,
  lam: varied.Varied = 1.0,
  normalize: bool = False,
  granularity: str = "tensor",
  select: str | None = None,
) -> step.Step:
  """Merge the middle of the donors' task vectors with sign election.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    gamma: fraction of the largest changes to drop, 0 to 1, or one fraction a donor.
    lam: multiplies the merged change.
    normalize: whether to divide by the summed weights of the agreeing entries.
    granularity: "tensor" (mergekit's) or "row" (the authors').
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for fractions outside 0 to 1 or an unknown granularity.

  Example:
    >>> breadcrumbs_ties(density=0.5)
    (merge.breadcrumbs_ties(density=0.5),)

  Reference:
    Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795.
  """
  return _step(True, models, weights, density, gamma, lam, normalize, granularity, select)


def _step(
  elect: bool,
  models: Sequence[str],
  weights: Any,
  density: Any,
  gamma: Any,
  lam: Any,
  normalize: bool,
  granularity: str,
  select: str | None,
) -> step.Step:
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(GRANULARITIES)}")
  weights_lib.check_shares(density, name="density")
  weights_lib.check_shares(gamma, name="gamma")
  fixed = {"normalize": normalize, "granularity": granularity, "elect": elect, "axis": rows.AXIS}
  return lifting.over_leaves(
    keep_middle_and_merge,
    hyper={"density": density, "gamma": gamma, **fixed},
    knobs={"weights": weights, "lam": lam},
    check=weights_lib.check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _middle(delta: jax.Array, keep: int, top: int) -> jax.Array:
  """Keep the `keep` largest entries after the `top` largest."""
  if keep == 0:
    return jnp.zeros_like(delta)
  mask = _largest(delta, keep + top)
  return jnp.where(mask & ~_largest(delta, top) if top else mask, delta, 0.0)


def _largest(delta: jax.Array, k: int) -> jax.Array:
  threshold, (ties,) = trim.cut([delta], k)
  return trim.kept(delta, threshold, ties)
