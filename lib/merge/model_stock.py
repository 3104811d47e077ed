# SPDX-License-Identifier: Apache-2.0
"""Model Stock: average fine-tuned models and interpolate towards the model they started from.

Jang et al., "Model Stock: all we need is just a few fine-tuned models", 2024 (arXiv 2403.19522):
with c the mean cosine between the N changes, the average counts t = N c / (1 + (N - 1) c) and the
base 1 - t. Same arithmetic as mergekit 0.1.5's `model_stock`: c by leaf, or by output neuron with
`filter_wise`; products of norms below 1e-6 count as 1e-6; t = 0 where its denominator is below
1e-6; changes that oppose each other give a negative t, which moves away from the average. `lam`,
which multiplies t, is ours. Computed in float32, returned in the storage dtype; compressed leaves
come back dense. Neutral at lam=0.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres

_TINY = 1e-6


def interpolate(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  axis: int | None = None,
  lam: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
  """Interpolate between an array and the average of fine-tuned ones by the angle between them.

  Args:
    w: the base's array w₀.
    donors: at least two fine-tuned arrays.
    axis: the axis along which a neuron's weights lie, to interpolate each by itself; None takes the
      array as one vector, as arrays of rank 1 always are.
    lam: multiplies t.

  Returns:
    t · average + (1 - t) w₀, in the dtype of `w`.

  Example:
    >>> a, b = jnp.array([3.0, 4.0]), jnp.array([4.0, 3.0])
    >>> interpolate(jnp.zeros(2), (a, b)).round(3).tolist()
    [3.429..., 3.429...]
  """
  base = w.astype(jnp.float32)
  tuned = [x.astype(jnp.float32) for x in donors]
  changes = [x - base for x in tuned]
  norms = [jnp.sqrt(spheres.dot(d, d, axis)) for d in changes]
  cosines = [
    jnp.clip(
      spheres.dot(changes[i], changes[j], axis) / jnp.maximum(norms[i] * norms[j], _TINY), -1.0, 1.0
    )
    for i, j in itertools.combinations(range(len(changes)), 2)
  ]
  count = len(tuned)
  c = jnp.asarray(sum(cosines)) / len(cosines)
  denominator = 1 + (count - 1) * c
  singular = jnp.abs(denominator) < _TINY
  t = jnp.asarray(lam, jnp.float32) * jnp.where(
    singular, 0.0, count * c / jnp.where(singular, 1.0, denominator)
  )
  average = jnp.asarray(sum(tuned)) / count
  return (t * average + (1 - t) * base).astype(w.dtype)


@step.method("merge.model_stock")
def model_stock(
  *,
  models: Sequence[str] = (),
  filter_wise: bool = False,
  lam: varied.Varied = 1.0,
  select: str | None = None,
) -> step.Step:
  """Average fine-tuned donors, nearer to the model they started from the less they agree.

  Args:
    models: directories of at least two donors; empty takes those handed to the driver.
    filter_wise: whether each output neuron is interpolated by itself, instead of each leaf.
    lam: multiplies how far to go from the model to the donors' average.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError for less than two donors.

  Example:
    >>> model_stock(filter_wise=True)
    (merge.model_stock(filter_wise=True),)

  Reference:
    Jang et al., Model Stock, 2024, arXiv 2403.19522.
  """
  return lifting.over_leaves(
    interpolate,
    hyper={"axis": spheres.WITHIN if filter_wise else None},
    knobs={"lam": lam},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _check(donors: int, **rest: object) -> None:
  del rest
  if donors < 2:
    raise ValueError(f"Model Stock needs the angle between at least two donors; got {donors}")
