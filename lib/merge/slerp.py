# SPDX-License-Identifier: Apache-2.0
"""Spherical interpolation between a model and one donor, at t from 0 (the model) to 1.

Shoemake, "Animating rotation with quaternion curves", 1985, on every array as one long vector; the
norm moves along, since the vectors themselves are weighted, not their directions. Same arithmetic
as mergekit 0.1.5's `slerp`: an array of norm 1e-8 or less counts as orthogonal to all others, and
where |cos θ| exceeds 0.9995 the two are interpolated linearly; entries agree to rounding except
where the cosine is within rounding of that threshold. Computed in float32, returned in the base's
storage dtype; compressed leaves come back dense. Neutral at t=0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres

_COLLINEAR = 0.9995
_TINY = 1e-8


def interpolate(
  w: Float[Array, "*shape"], donors: tuple[Float[Array, "*shape"], ...], *, t: ArrayLike = 0.5
) -> Float[Array, "*shape"]:
  """Interpolate on the arc from an array to another: (sin((1-t)θ) v₀ + sin(tθ) v₁) / sin θ.

  Args:
    w: the base's array v₀.
    donors: one array v₁.
    t: position on the arc, 0 at `w`; values outside 0 to 1 go beyond the ends.

  Returns:
    The interpolated array, in the dtype of `w`.

  Example:
    >>> interpolate(jnp.array([1.0, 0.0]), (jnp.array([0.0, 1.0]),), t=0.5).round(3).tolist()
    [0.707..., 0.707...]
  """
  a, b = w.astype(jnp.float32), donors[0].astype(jnp.float32)
  norms = [jnp.sqrt(spheres.dot(x, x)) for x in (a, b)]
  norms = [jnp.where(n > _TINY, n, 1.0) for n in norms]
  cos = jnp.clip(spheres.dot(a, b) / norms[0] / norms[1], -1.0, 1.0)
  linear = jnp.abs(cos) > _COLLINEAR
  first, second = spheres.arc(jnp.where(linear, 0.0, cos), t)
  out = jnp.where(linear, 1 - t, first) * a + jnp.where(linear, t, second) * b
  return out.astype(w.dtype)


@step.method("merge.slerp")
def slerp(
  *, models: Sequence[str] = (), t: varied.Varied = 0.5, select: str | None = None
) -> step.Step:
  """Interpolate a model with one donor along the arc between them, leaf by leaf.

  Args:
    models: directory of the donor; empty takes the one handed to the driver.
    t: position on the arc, 0 at the model, 1 at the donor.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError unless there is exactly one donor.

  Example:
    >>> slerp(t=(("layers/0/.*", 0.2), (".*", 0.5)))
    (merge.slerp(t=(('layers/0/.*', 0.2), ('.*', 0.5))),)

  Reference:
    Shoemake, Animating rotation with quaternion curves, 1985.
  """
  return lifting.over_leaves(
    interpolate,
    hyper={},
    knobs={"t": t},
    check=spheres.exactly(1),
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
