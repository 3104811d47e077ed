# SPDX-License-Identifier: Apache-2.0
"""Add task vectors to a model: θ = θ₀ + λ Σ w_i (θ_i − θ₀).

Ilharco et al., "Editing models with task arithmetic", 2022 (arXiv 2212.04089). Same arithmetic as
mergekit's `task_arithmetic`; its `normalize` divides by Σ w_i (by 1 where that is zero). Computed
in float32, returned in the storage dtype; compressed leaves come back dense. Neutral at lam=0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib


def add_task_vectors(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike = 1.0,
  normalize: bool = False,
) -> Float[Array, "*shape"]:
  """Add the weighted sum of the donors' differences to an array.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number a donor; None means ones.
    lam: λ, multiplies the sum.
    normalize: whether to divide the sum by Σ w_i.

  Returns:
    The result, in the dtype of `w`.

  Example:
    >>> add_task_vectors(jnp.ones(1), (jnp.zeros(1), jnp.full(1, 3.0)), lam=0.5).tolist()
    [1.5]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  base = w.astype(jnp.float32)
  changes = [x.astype(jnp.float32) - base for x in donors]
  merged = consensus.add(base, changes, weights=weight, lam=lam, normalize=normalize)
  return merged.astype(w.dtype)


@step.method("merge.task_arithmetic")
def task_arithmetic(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied = 1.0,
  normalize: bool = False,
  select: str | None = None,
) -> step.Step:
  """Add the task vectors of fine-tuned donors to the model they started from.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones. A negative weight takes a task away.
    lam: multiplies the summed task vectors.
    normalize: whether to divide the sum by the sum of the weights.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Example:
    >>> task_arithmetic(lam=0.3)
    (merge.task_arithmetic(lam=0.3),)

  Reference:
    Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089.
  """
  return lifting.over_leaves(
    add_task_vectors,
    hyper={"normalize": normalize},
    knobs={"weights": weights, "lam": lam},
    check=weights_lib.check,
    split=True,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
