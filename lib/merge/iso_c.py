# SPDX-License-Identifier: Apache-2.0
"""Isotropic merging: all directions of the merged change get one singular value.

`iso_c` flattens the spectrum of Στ_i to its mean (common subspace). `iso_cts` keeps the leading
directions of the sum only, fills up with the leading directions of what each donor changes outside
them, makes the whole orthonormal, and flattens likewise (common and task-specific subspaces).
Marczak et al., "No task left behind: isotropic model merging with common and task-specific
subspaces", 2025 (arXiv 2502.04959). Leaves that are no matrices receive the mean of the changes,
times lam, as in FusionBench.

Where we differ: null directions stay null and the mean is over the others, so the nuclear norm is
kept always. There they are filled with whatever vectors the decomposition returned, which matters
for low-rank (LoRA) donors only. The space outside the common one is taken on the output side, as
there. Where the rounded share of each task would take more directions than there are, it is rounded
down. Computed in float32, returned in the storage dtype; compressed leaves come back dense.
Neutral at lam=0; `iso_cts` with one donor, or with a common share of 1, is `iso_c`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import subspaces
from treesurgeon.merge import weights as weights_lib


def flatten_spectrum(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike = 1.0,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by Iso-C.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change.
    matrix: whether an array of two axes is taken as a matrix; otherwise changes are averaged.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: for a wrong number of weights.

  Example:
    >>> donors = (jnp.diag(jnp.array([3.0, 0.0])), jnp.diag(jnp.array([0.0, 1.0])))
    >>> bool(jnp.allclose(flatten_spectrum(jnp.zeros((2, 2)), donors), 2 * jnp.eye(2)))
    True
  """
  tau = subspaces.task_vectors(w, donors, weights)
  if not matrix or w.ndim != 2:
    return subspaces.added(w, tau.mean(axis=0), lam)
  u, s, v = subspaces.svd(tau.sum(axis=0))
  return subspaces.added(w, _live_mean(s) * subspaces.matmul(u, v.T), lam)


def flatten_common_and_task(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike = 1.0,
  common: float = 0.8,
  axis: int = -1,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by Iso-CTS.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change.
    common: share of the directions that the sum provides, 0 to 1; static. The rest is divided
      among the donors, which may move the border.
    axis: the axis along which one output neuron's weights lie, 0 or -1.
    matrix: whether an array of two axes is taken as a matrix; otherwise changes are averaged.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: for a wrong number of weights.

  Example:
    >>> donors = (jnp.diag(jnp.array([3.0, 0.0])), jnp.diag(jnp.array([0.0, 1.0])))
    >>> out = flatten_common_and_task(jnp.zeros((2, 2)), donors, common=0.0)
    >>> bool(jnp.allclose(out, 2 * jnp.eye(2), atol=1e-6))
    True
  """
  tau = subspaces.task_vectors(w, donors, weights)
  if not matrix or w.ndim != 2:
    return subspaces.added(w, tau.mean(axis=0), lam)
  tau = subspaces.oriented(tau, axis)
  r, count = min(w.shape), len(donors)
  each = min(round((r - int(r * common)) / count), r // count)
  shared = r - each * count
  u, s, v = (x[..., :shared] for x in subspaces.svd(tau.sum(axis=0)))
  outside = tau - subspaces.einsum("mk,lk,tln->tmn", u, u, tau)
  own = subspaces.svd(outside, jnp.sqrt(jnp.square(tau).sum(axis=(1, 2))))
  own_u, own_s, own_v = (x[..., :each] for x in own)
  left = subspaces.polar(jnp.concatenate([u, subspaces.side_by_side(own_u)], axis=1))
  right = subspaces.polar(jnp.concatenate([v, subspaces.side_by_side(own_v)], axis=1))
  sigma = _live_mean(jnp.concatenate([s, own_s.reshape(-1)]))
  merged = sigma * subspaces.matmul(left, right.T)
  return subspaces.added(w, subspaces.oriented(merged, axis), lam)


@step.method("merge.iso_c")
def iso_c(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied = 1.0,
  matrices: str = ".*",
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors and give all directions of the change one singular value (Iso-C).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change; values of 1 to 1.5 are usual, found by validation.
    matrices: regular expression over addresses; other leaves, and leaves that do not have two
      axes, receive the mean of the changes.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a pattern that does not compile.

  Example:
    >>> iso_c(lam=1.5)
    (merge.iso_c(lam=1.5),)

  Reference:
    Marczak et al., No task left behind, 2025, arXiv 2502.04959.
  """
  return _lift(flatten_spectrum, subspaces.hyper(matrices), models, weights, lam, select)


@step.method("merge.iso_cts")
def iso_cts(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied = 1.0,
  common: varied.Varied = 0.8,
  matrices: str = ".*",
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors in common and task-specific subspaces of one spectrum (Iso-CTS).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change.
    common: share of the directions that the sum of changes provides, 0 to 1.
    matrices: regular expression over addresses; other leaves, and leaves that do not have two
      axes, receive the mean of the changes.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a share outside 0 to 1, or a pattern that does not compile.

  Example:
    >>> iso_cts(common=0.5)
    (merge.iso_cts(common=0.5),)

  Reference:
    Marczak et al., No task left behind, 2025, arXiv 2502.04959.
  """
  if not all(0 <= share <= 1 for share in varied.values(common)):
    raise ValueError(f"common={common} must lie between 0 and 1")
  hyper = {**subspaces.hyper(matrices), "common": common, "axis": subspaces.AXES}
  return _lift(flatten_common_and_task, hyper, models, weights, lam, select)


def _lift(
  fn: Any, hyper: Mapping[str, Any], models: Any, weights: Any, lam: Any, select: str | None
) -> step.Step:
  return lifting.over_leaves(
    fn,
    hyper=hyper,
    knobs={"weights": weights, "lam": lam},
    check=weights_lib.check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _live_mean(s: jax.Array) -> jax.Array:
  return s.sum() / jnp.maximum((s > 0).sum(), 1)
