# SPDX-License-Identifier: Apache-2.0
"""Barycentric interpolation of any number of models on a sphere.

Goddard, "multislerp", 2024, as mergekit 0.1.5 has it: directions u_i = θ_i / (‖θ_i‖ + ε), their
weighted mean m = Σ w_i u_i, and the result (Σ w_i ‖θ_i‖) m / ‖m‖. mergekit further walks from m
along the weighted sum of the u_i's tangents at m; that sum is zero by the choice of m, whatever the
weights, so only a factor cos ε is left of it, which is kept here. Opposite models that cancel are
averaged linearly: where ‖m‖ is below ε or below 1e-6, which float32 cannot tell from zero. mergekit
does so for two models and ε alone, and fails for more.

Without `deltas` the models are the one at hand and its donors; with `deltas` they are the donors,
and their changes of the model at hand are interpolated and added to it; a single donor is then
returned whatever its weight. Computed in float32, returned in the base's storage dtype;
compressed leaves come back dense. Neutral at weights (1, 0, ...) without `deltas`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres
from treesurgeon.merge import weights as weights_lib

_NOISE = 1e-6


def barycenter(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  normalize_weights: bool = True,
  eps: ArrayLike = 1e-8,
  deltas: bool = False,
) -> Float[Array, "*shape"]:
  """Average directions and norms of arrays, or of changes of one, apart.

  Args:
    w: the base's array.
    donors: the donors' arrays.
    weights: one number a model; None means ones.
    normalize_weights: whether to divide the weights by their sum.
    eps: ε.
    deltas: whether the models are the donors, as changes of `w`, instead of `w` and the donors.

  Returns:
    The average, in the dtype of `w`.

  Example:
    >>> a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    >>> barycenter(a, (b,)).round(3).tolist()
    [1.414..., 1.414...]
  """
  base = w.astype(jnp.float32)
  arrays = [x.astype(jnp.float32) for x in (donors if deltas else (w, *donors))]
  weight = jnp.stack(
    [jnp.asarray(c, jnp.float32) for c in weights_lib.resolve(weights, len(arrays), of="models")]
  )
  if len(arrays) == 1:
    return arrays[0].astype(w.dtype)
  if deltas:
    arrays = [x - base for x in arrays]
  if normalize_weights:
    weight = weight / jnp.sum(weight)
  norms = jnp.sqrt(jnp.stack([spheres.dot(x, x).reshape(()) for x in arrays]))
  part = weight / (norms + eps)
  mean = _combine(part, arrays)
  length = jnp.sqrt(jnp.sum(mean * mean))
  opposed = length < jnp.maximum(eps, _NOISE)
  factor = jnp.sum(norms * weight) * jnp.cos(eps) / jnp.where(opposed, 1.0, length)
  # One model that has all the weight is itself, to the bit.
  alone = jnp.abs(weight) == jnp.sum(jnp.abs(weight))
  part = jnp.where(alone, jnp.abs(weight), jnp.where(opposed, weight, factor * part))
  out = _combine(part, arrays)
  return (base + out if deltas else out).astype(w.dtype)


@step.method("merge.multislerp")
def multislerp(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  normalize_weights: bool = True,
  eps: float = 1e-8,
  deltas: bool = False,
  select: str | None = None,
) -> step.Step:
  """Average models on a sphere, leaf by leaf.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a model, the model at hand being the first without `deltas`; None means
      ones.
    normalize_weights: whether to divide the weights by their sum.
    eps: added to norms, and the length below which a mean direction counts as none.
    deltas: whether to average the donors' changes of the model at hand and add them to it.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError for a wrong number of weights, or weights to be
    normalized that sum to zero.

  Example:
    >>> multislerp(weights=(0.5, 0.3, 0.2))
    (merge.multislerp(weights=(0.5, 0.3, 0.2)),)

  Reference:
    Goddard, multislerp, 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
  """
  if not eps > 0:
    raise ValueError(f"eps={eps} must be positive")
  return lifting.over_leaves(
    barycenter,
    hyper={"normalize_weights": normalize_weights, "deltas": deltas},
    knobs={"weights": weights, "eps": eps},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _combine(part: Float[Array, "n"], arrays: Sequence[Array]) -> Array:
  return jnp.asarray(sum(part[i] * x for i, x in enumerate(arrays)))


def _check(
  donors: int,
  *,
  weights: tuple[float, ...] | None,
  normalize_weights: bool,
  eps: float,
  deltas: bool,
) -> None:
  del eps
  weight = weights_lib.resolve(weights, donors + (not deltas), of="models")
  if normalize_weights and abs(sum(weight)) < 1e-8:
    raise ValueError(f"weights={weight} sum to zero, so they cannot be normalized")
