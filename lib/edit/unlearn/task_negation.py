# SPDX-License-Identifier: Apache-2.0
"""Forget a task by subtracting its task vector: θ − scale Σ (θ_forget − θ).

The donors are this model fine-tuned on what is to be forgotten. Ilharco et al., "Editing models
with task arithmetic", 2022 (arXiv 2212.04089), section 3, "Forgetting via negation"; there
the scale is chosen on held-out data, as the largest that keeps a control task at 95 % of its
accuracy.
Computed in float32, returned in the storage dtype; compressed leaves come back dense. Neutral at
scale=0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied


def subtract_task_vectors(
  w: Float[Array, "*shape"], donors: tuple[Float[Array, "*shape"], ...], *, scale: ArrayLike = 1.0
) -> Float[Array, "*shape"]:
  """Subtract the donors' differences from an array.

  Args:
    w: the array θ.
    donors: the same array fine-tuned on what is to be forgotten.
    scale: multiplies what is subtracted.

  Returns:
    The result, in the dtype of `w`.

  Example:
    >>> subtract_task_vectors(jnp.ones(1), (jnp.full(1, 3.0),), scale=0.5).tolist()
    [0.0]
  """
  base = w.astype(jnp.float32)
  total = sum((x.astype(jnp.float32) - base for x in donors), jnp.zeros_like(base))
  return (base - scale * total).astype(w.dtype)


@step.method("edit.unlearn.task_negation")
def task_negation(
  *, models: Sequence[str] = (), scale: varied.Varied = 1.0, select: str | None = None
) -> step.Step:
  """Forget what donors were fine-tuned on, by subtracting their task vectors.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    scale: multiplies what is subtracted.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Example:
    >>> task_negation(scale=0.5)
    (edit.unlearn.task_negation(scale=0.5),)

  Reference:
    Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089.
  """
  return lifting.over_leaves(
    subtract_task_vectors,
    hyper={},
    knobs={"scale": scale},
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
