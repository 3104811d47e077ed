# SPDX-License-Identifier: Apache-2.0
"""MagMax: of all task vectors keep, entry by entry, the change of largest magnitude.

Marczak et al., "MagMax: leveraging model merging for seamless continual learning", 2024 (arXiv
2407.06322). Of equal magnitudes the later donor's is kept, as in the authors' code; their scaling
for models that were fine-tuned independently is lam=0.5. Computed in float32, returned in the
storage dtype; compressed leaves come back dense. Neutral at lam=0; with one donor and lam=1 the
result is that donor up to rounding.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib


def add_largest(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  lam: ArrayLike = 0.5,
) -> Float[Array, "*shape"]:
  """Add the donors' change of largest magnitude to an array.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    lam: λ, multiplies the change.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> add_largest(jnp.zeros(2), (jnp.array([1.0, -3.0]), jnp.array([-2.0, 2.0]))).tolist()
    [-1.0, -1.5]
  """
  base = w.astype(jnp.float32)
  largest = jnp.zeros_like(base)
  for donor in donors:
    delta = donor.astype(jnp.float32) - base
    largest = jnp.where(jnp.abs(delta) >= jnp.abs(largest), delta, largest)
  return (base + consensus.times(lam, largest)).astype(w.dtype)


@step.method("merge.magmax")
def magmax(
  *, models: Sequence[str] = (), lam: varied.Varied = 0.5, select: str | None = None
) -> step.Step:
  """Add to a model the largest of its donors' changes, entry by entry.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    lam: multiplies the change.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Example:
    >>> magmax(lam=1.0)
    (merge.magmax(lam=1.0),)

  Reference:
    Marczak et al., MagMax, 2024, arXiv 2407.06322.
  """
  return lifting.over_leaves(
    add_largest,
    hyper={},
    knobs={"lam": lam},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _check(donors: int, *, lam: float) -> None:
  del lam
  weights_lib.check(donors, weights=None)
