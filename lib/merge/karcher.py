# SPDX-License-Identifier: Apache-2.0
"""The Karcher mean of models: the point of a sphere nearest to all of them along the sphere.

Karcher, "Riemannian center of mass and mollifier smoothing", 1977; Buss and Fillmore, "Spherical
averages", 2001, give the iteration. Every array is one vector; the mean direction is scaled by the
mean norm. Same result as mergekit 0.1.5's `karcher`, stopping rule included, whose models are here
the model at hand and its donors; `weights` is ours, mergekit weighs equally.

The mean stays in the span of the N models, so the arrays are read only for their N(N+1)/2 inner
products and once for the result: the iteration runs on their coordinates in an orthonormal basis of
that span. Models nearer than 3e-4 radians to the mean look parallel to mergekit's float32 arccos,
which then moves its mean by up to that angle at random; here they do not. Opposite vectors have no
direction towards each other and do not pull. Computed in float32, returned in the base's storage
dtype; compressed leaves come back dense. Neutral at weights (1, 0, ...).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres
from treesurgeon.merge import weights as weights_lib

_FLAT = 5e-7  # eigenvalues of cosines below are rounding
_OPPOSITE = 1e-3  # what float32 tells of the direction towards an opposite point is rounding


def mean(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  max_iter: int = 10,
  tol: ArrayLike = 1e-5,
) -> Float[Array, "*shape"]:
  """Average directions along the sphere, and norms.

  Args:
    w: the base's array.
    donors: the donors' arrays.
    weights: one number, not negative, for the base and one for each donor; None means equal.
    max_iter: most steps.
    tol: stop at a step of less, in radians; arrays of no larger norm have no direction.

  Returns:
    The mean, in the dtype of `w`.

  Example:
    >>> a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0])
    >>> mean(a, (b,)).round(3).tolist()
    [2.121..., 2.121...]
  """
  arrays = [x.astype(jnp.float32) for x in (w, *donors)]
  count = len(arrays)
  alpha = jnp.stack(
    [jnp.asarray(c, jnp.float32) for c in weights_lib.resolve(weights, count, of="models")]
  )
  alpha = alpha / jnp.sum(alpha)
  upper = {
    (i, j): spheres.dot(arrays[i], arrays[j]).reshape(())
    for j in range(count)
    for i in range(j + 1)
  }
  gram = jnp.stack([upper[min(i, j), max(i, j)] for i in range(count) for j in range(count)])
  gram = gram.reshape(count, count)
  norms = jnp.sqrt(jnp.diagonal(gram))
  valid = norms > tol
  safe = jnp.where(valid, norms, 1.0)
  cosines = jnp.where(valid[:, None] & valid[None, :], gram, 0.0) / safe[:, None] / safe[None, :]
  share = jnp.where(valid, alpha, 0.0)
  share = share / jnp.maximum(jnp.sum(share), jnp.finfo(jnp.float32).tiny)
  part = jnp.sum(alpha * norms) * _on_sphere(cosines, share, max_iter, tol) / safe
  # One model that has all the weight is itself, to the bit.
  part = jnp.where(alpha == 1, 1.0, part)
  return jnp.asarray(sum(part[i] * x for i, x in enumerate(arrays))).astype(w.dtype)


@step.method("merge.karcher")
def karcher(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  max_iter: int = 10,
  tol: float = 1e-5,
  select: str | None = None,
) -> step.Step:
  """Average a model with its donors along the sphere, leaf by leaf.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number, not negative, for the model itself and one for each donor; None means
      equal.
    max_iter: most steps of the iteration.
    tol: the iteration stops at a step of less, in radians; leaves of no larger norm do not pull.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError for a wrong number of weights, or weights that are
    negative or all zero.

  Raises:
    ValueError: for `max_iter` or `tol` out of range.

  Example:
    >>> karcher(max_iter=20)
    (merge.karcher(max_iter=20),)

  Reference:
    Karcher, Riemannian center of mass and mollifier smoothing, 1977; mergekit refers to arXiv
    2603.04972.
  """
  if max_iter < 0 or not tol > 0:
    raise ValueError(f"max_iter={max_iter}, tol={tol}: valid are max_iter from 0 and tol above 0")
  return lifting.over_leaves(
    mean,
    hyper={"max_iter": max_iter},
    knobs={"weights": weights, "tol": tol},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _on_sphere(
  cosines: Float[Array, "n n"], share: Float[Array, "n"], max_iter: int, tol: ArrayLike
) -> Float[Array, "n"]:
  """Find the mean of unit vectors, as coefficients of these vectors."""
  # Coordinates of the vectors, one a column, in an orthonormal basis of their span.
  scale, basis = jnp.linalg.eigh(cosines)
  units = jnp.sqrt(jnp.where(scale > _FLAT, scale, 0.0))[:, None] * basis.T
  point = jnp.sum(units * share[None, :], axis=1)
  length = jnp.sqrt(jnp.sum(point * point))
  first = jnp.where(jnp.arange(share.size) == jnp.argmax(share > 0), 1.0, 0.0)
  lost = length < tol  # the directions cancel: start at the first
  safe = jnp.where(lost, 1.0, length)
  point = jnp.where(lost, jnp.sum(units * first[None, :], axis=1), point / safe)
  start = (jnp.where(lost, first, share / safe), point, jnp.int32(0), jnp.bool_(False))

  def unfinished(state: tuple) -> Array:
    _, _, i, done = state
    return (i < max_iter) & ~done

  def advance(state: tuple) -> tuple:
    part, point, i, _ = state
    cos = jnp.clip(jnp.sum(units * point[:, None], axis=0), -1.0, 1.0)
    away = units - cos[None, :] * point[:, None]
    sine = jnp.sqrt(jnp.sum(away * away, axis=0))
    theta = jnp.arctan2(sine, cos)
    pulls = (theta >= tol) & ((cos > 0) | (sine >= _OPPOSITE))
    pull = jnp.where(pulls, share * theta / jnp.where(pulls, sine, 1.0), 0.0)
    tangent = jnp.sum(away * pull[None, :], axis=1)
    size = jnp.sqrt(jnp.sum(tangent * tangent))
    done = size < tol
    turn = jnp.sin(size) / jnp.where(done, 1.0, size)
    new = jnp.cos(size) * point + turn * tangent
    # away_i = u_i - cos_i point, so a step along it takes as much of the old coefficients away.
    mixed = jnp.cos(size) * part + turn * (pull - jnp.sum(pull * cos) * part)
    length = jnp.sqrt(jnp.sum(new * new))
    return jnp.where(done, part, mixed / length), jnp.where(done, point, new / length), i + 1, done

  return jax.lax.while_loop(unfinished, advance, start)[0]


def _check(donors: int, *, weights: tuple[float, ...] | None, max_iter: int, tol: float) -> None:
  del max_iter, tol
  weight = weights_lib.resolve(weights, donors + 1, of="models (the base, then its donors)")
  if min(weight) < 0 or sum(weight) == 0:
    raise ValueError(f"weights={weight} must not be negative, nor all zero")
