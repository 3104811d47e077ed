# SPDX-License-Identifier: Apache-2.0
"""Interpolate the weights of a model and one donor: (1 - α) θ₀ + α θ₁, and sweep α.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), 2021 (arXiv 2109.01903), where
θ₀ is the zero-shot and θ₁ the fine-tuned model. The same interpolation trades quality for diversity
in "Diversity-rewarded CFG distillation", 2024 (arXiv 2410.06084), between a model tuned for the
one and a model tuned for the other; and with α outside 0 to 1 it extrapolates. A chat vector (Huang
et al., 2023, arXiv 2310.04799) is not an interpolation: it adds the difference of two models to
a third, which is `merge.task_arithmetic` with weights (1, -1). α may vary over the model. Both ends
are exact to the bit. Computed in float32, returned in the storage dtype of θ₀; compressed leaves
come back dense. Neutral at alpha=0.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, model, needs, step, varied
from treesurgeon.merge import spheres


def interpolate(
  w: Float[Array, "*shape"], donors: tuple[Float[Array, "*shape"], ...], *, alpha: ArrayLike = 0.5
) -> Float[Array, "*shape"]:
  """Interpolate between two arrays.

  Args:
    w: the base's array θ₀.
    donors: one array θ₁.
    alpha: α, the donor's share.

  Returns:
    The interpolated array, in the dtype of `w`.

  Example:
    >>> interpolate(jnp.zeros(2), (jnp.ones(2),), alpha=0.25).tolist()
    [0.25, 0.25]
  """
  a, b = w.astype(jnp.float32), donors[0].astype(jnp.float32)
  alpha = jnp.asarray(alpha, jnp.float32)
  mixed = (1 - alpha) * a + alpha * b
  return jnp.where(alpha == 0, a, jnp.where(alpha == 1, b, mixed)).astype(w.dtype)


@step.method("merge.wise_ft")
def wise_ft(
  *, models: Sequence[str] = (), alpha: varied.Varied = 0.5, select: str | None = None
) -> step.Step:
  """Interpolate between a model and one donor.

  Args:
    models: directory of the donor; empty takes the one handed to the driver.
    alpha: the donor's share; 0 is the model, 1 the donor, to the bit.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError unless there is exactly one donor.

  Example:
    >>> wise_ft(alpha=(("layers/[0-3]/.*", 0.2), (".*", 0.8)))
    (merge.wise_ft(alpha=(('layers/[0-3]/.*', 0.2), ('.*', 0.8))),)

  Reference:
    Wortsman et al., Robust fine-tuning of zero-shot models, 2021, arXiv 2109.01903.
  """
  return lifting.over_leaves(
    interpolate,
    hyper={},
    knobs={"alpha": alpha},
    check=spheres.exactly(1),
    split=True,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def sweep(
  base: model.Model,
  donor: needs.Source,
  alphas: Sequence[varied.Varied],
  *,
  select: str | None = None,
) -> Iterator[tuple[varied.Varied, model.Model]]:
  """Walk from a model to a donor; one program serves all steps.

  Args:
    base: the model θ₀.
    donor: the model θ₁.
    alphas: the donor's share at each step.
    select: regular expression over addresses; None means every leaf.

  Yields:
    (alpha, the interpolated model), made when it is asked for.

  Example:
    >>> a, b = (model.Model(None, {"w": jnp.full(1, x)}) for x in (1.0, 3.0))
    >>> [(alpha, m.leaf("w").item()) for alpha, m in sweep(a, b, [0.0, 0.5, 1.0])]
    [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]
  """
  evidence = {"donors": needs.Aligned([donor])}
  for alpha in alphas:
    (one,) = wise_ft(alpha=alpha, select=select)
    yield alpha, one.apply(base, evidence, jax.random.key(0))
