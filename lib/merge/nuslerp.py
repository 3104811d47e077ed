# SPDX-License-Identifier: Apache-2.0
"""Spherical interpolation of two models by weights, whole or neuron by neuron, or of their changes.

mergekit 0.1.5's `nuslerp` (Goddard et al., "Arcee's MergeKit", 2024, arXiv 2403.13257): t is
w₁ / (w₀ + w₁), 0.5 where the weights sum to zero. Without `deltas` the two models are the one at
hand and its donor; with `deltas` they are two fine-tuned donors, whose changes of the model at hand
are interpolated and added to it (a `base_model` in mergekit's configuration). One angle an array,
or with `flatten=False` one for each output neuron, or for each input with `row_wise` (mergekit's
names: its vectors lie along the last axis of an (out, in) matrix unless `row_wise`).

Only where float32 cannot tell the angle from 0 or π (1 - cos² of at most four units of the last
place) the two are interpolated linearly. mergekit does so where its rounded cosine is 1 or -1
exactly; at opposite vectors, where the arc is not defined, it may return rounding errors times
3000 instead. Computed in float32, returned in the base's storage dtype; compressed leaves come back
dense. Neutral at weights=(1, 0) without `deltas`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres
from treesurgeon.merge import weights as weights_lib

_TINY = 1e-7
_COLLINEAR = 2.0**-22


def interpolate(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  axis: int | None = None,
  deltas: bool = False,
) -> Float[Array, "*shape"]:
  """Interpolate two arrays, or two changes of one, along the arc between them.

  Args:
    w: the base's array.
    donors: one array; with `deltas` two.
    weights: of the two, any scale; None means equal.
    axis: the axis along which vectors lie that are interpolated each by itself; None takes the
      array as one vector, as arrays of rank 1 always are.
    deltas: whether to interpolate the donors' changes of `w` and add the result to it.

  Returns:
    The interpolated array, in the dtype of `w`.

  Example:
    >>> a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    >>> interpolate(a, (b,), weights=(1.0, 3.0)).round(3).tolist()
    [0.765..., 1.848...]
  """
  base = w.astype(jnp.float32)
  a, b = (x.astype(jnp.float32) for x in (donors if deltas else (w, *donors)))
  if deltas:
    a, b = a - base, b - base
  first, second = weights_lib.resolve(weights, 2, of="models")
  total = jnp.asarray(first + second, jnp.float32)
  none = jnp.abs(total) < 1e-6
  t = jnp.where(none, 0.5, second / jnp.where(none, 1.0, total))
  norms = [jnp.maximum(jnp.sqrt(spheres.dot(x, x, axis)), _TINY) for x in (a, b)]
  cos = jnp.clip(spheres.dot(a, b, axis) / norms[0] / norms[1], -1.0, 1.0)
  linear = (1 - cos) * (1 + cos) <= _COLLINEAR
  near, far = spheres.arc(jnp.where(linear, 0.0, cos), t)
  out = jnp.where(linear, 1 - t, near) * a + jnp.where(linear, t, far) * b
  return (base + out if deltas else out).astype(w.dtype)


@step.method("merge.nuslerp")
def nuslerp(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  flatten: bool = True,
  row_wise: bool = False,
  deltas: bool = False,
  select: str | None = None,
) -> step.Step:
  """Interpolate two models, or their changes of the model at hand, along an arc.

  Args:
    models: directories of the donors: one, with `deltas` two; empty takes those handed to the
      driver.
    weights: of the two models, the model at hand being the first without `deltas`; None means
      equal.
    flatten: whether a leaf is one vector; otherwise each output neuron's weights are one.
    row_wise: without `flatten`, whether a vector holds all weights of one input instead.
    deltas: whether the two are donors whose changes are interpolated and added.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError for another number of donors.

  Example:
    >>> nuslerp(weights=(0.7, 0.3), flatten=False)
    (merge.nuslerp(weights=(0.7, 0.3), flatten=False),)

  Reference:
    Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.
  """
  weights_lib.resolve(weights, 2, of="models")
  return lifting.over_leaves(
    interpolate,
    hyper={
      "axis": None if flatten else spheres.ACROSS if row_wise else spheres.WITHIN,
      "deltas": deltas,
    },
    knobs={"weights": weights},
    check=spheres.exactly(2 if deltas else 1),
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
