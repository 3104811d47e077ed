# SPDX-License-Identifier: Apache-2.0
"""Take a donor's weights where they are near the model's own.

Alchemonaut, "NearSwap", 2024 (QuartetAnemoi-70B): a weight moves to the donor's by the share
t / |difference|, at most 1, so differences up to t are taken whole and no weight moves further
than t. Same arithmetic as mergekit 0.1.5's `nearswap`. Computed in float32, returned in the storage
dtype; compressed leaves come back dense. Neutral at t=0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import spheres


def swap_near(
  w: Float[Array, "*shape"], donors: tuple[Float[Array, "*shape"], ...], *, t: ArrayLike
) -> Float[Array, "*shape"]:
  """Move each entry towards the donor's by at most t.

  Args:
    w: the base's array.
    donors: one array.
    t: the distance, in units of the weights.

  Returns:
    The moved array, in the dtype of `w`.

  Example:
    >>> swap_near(jnp.zeros(2), (jnp.array([0.25, -4.0]),), t=0.5).tolist()
    [0.25, -0.5]
  """
  a, b = w.astype(jnp.float32), donors[0].astype(jnp.float32)
  share = jnp.clip(t / jnp.maximum(jnp.abs(a - b), 1e-6), 0.0, 1.0)
  return (share * b + (1 - share) * a).astype(w.dtype)


@step.method("merge.nearswap")
def nearswap(
  *, models: Sequence[str] = (), t: varied.Varied, select: str | None = None
) -> step.Step:
  """Move a model's weights towards one donor's, none further than t.

  Args:
    models: directory of the donor; empty takes the one handed to the driver.
    t: the distance, in units of the weights; 0.0001 made the model it is known for.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError unless there is exactly one donor.

  Example:
    >>> nearswap(t=0.0001)
    (merge.nearswap(t=0.0001),)

  Reference:
    Alchemonaut, NearSwap, 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
  """
  return lifting.over_leaves(
    swap_near,
    hyper={},
    knobs={"t": t},
    check=spheres.exactly(1),
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
