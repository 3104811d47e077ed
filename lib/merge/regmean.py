# SPDX-License-Identifier: Apache-2.0
"""RegMean: the linear layer whose outputs are nearest to every donor's on that donor's own inputs.

With G_i = E[x xᵀ] of donor i's inputs, the W that minimises Σ E|x W - x W_i|² is
(Σ G_i)⁻¹ Σ G_i W_i. Off-diagonal entries of G_i are scaled by alpha < 1, which draws W to an
average weighted by the inputs' squares. All else (embeddings, norms, biases) is averaged. Jin et
al., "Dataless knowledge fusion by merging weights of language models", 2022 (arXiv 2212.09849).

alpha is what is *kept*, as in FusionBench (0.95 for CLIP, 0.6 for GPT-2, 0.1 for a plain base); the
paper uses 0.9, and 0.1 for T5. G_i is a mean, so donors count alike whatever the amount of their
data. The system is solved for the difference from the donors' average, with a small relative ridge:
directions that no input has, where the system is singular, get the average. Solved in float32 by
Cholesky factorization, returned in the base's storage dtype. The base itself is not merged. Under
the blockwise driver the inputs come through the already merged blocks, which makes it RegMean++
(`regmean_pp`). Neutral at lam=0.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, linalg, needs, paths, step, varied
from treesurgeon.core import model as model_lib
from treesurgeon.merge import weights as weights_lib


def regress(
  donors: tuple[Float[Array, "rows cols"], ...],
  grams: tuple[Float[Array, "rows rows"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  alpha: ArrayLike = 0.9,
  ridge: ArrayLike = 1e-6,
) -> Float[Array, "rows cols"]:
  """Solve (Σ c_i G_i) W = Σ c_i G_i W_i.

  Args:
    donors: kernels W_i, input first.
    grams: mean second moments G_i of the donors' inputs.
    weights: c_i, one number a donor; None means ones.
    alpha: what off-diagonal entries of G_i are multiplied by.
    ridge: pull towards the average of the donors, relative to the mean diagonal.

  Returns:
    W, float32.

  Example:
    >>> grams = (jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([0.0, 1.0])))
    >>> w = regress((jnp.zeros((2, 1)), jnp.ones((2, 1))), grams)
    >>> [round(x, 4) for x in w[:, 0].tolist()]
    [0.0, 1.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  donors = tuple(d.astype(jnp.float32) for d in donors)
  mean = sum(c * d for c, d in zip(weight, donors, strict=True)) / sum(weight)
  keep = jnp.where(jnp.eye(donors[0].shape[0], dtype=bool), 1.0, alpha)
  scaled = [c * keep * g.astype(jnp.float32) for c, g in zip(weight, grams, strict=True)]
  right = sum(
    jnp.matmul(g, d - mean, precision="highest") for g, d in zip(scaled, donors, strict=True)
  )
  left = jnp.asarray(sum(scaled))
  never = jnp.trace(left) == 0  # no input was ever active
  left = left + jnp.where(never, 1.0, 0.0) * jnp.eye(left.shape[0])
  low, _ = linalg.damped_cholesky(left, jnp.asarray(ridge))
  return mean + jax.scipy.linalg.cho_solve((low, True), right)


def solve_leaf(
  w: Float[Array, "rows cols"],
  donors: tuple[Float[Array, "rows cols"], ...],
  grams: tuple[Any, ...],
  *,
  lam: ArrayLike,
  **knobs: Any,
) -> Float[Array, "rows cols"]:
  """Merge one kernel.

  Args:
    w: the base's kernel.
    donors: the donors' kernels.
    grams: `stats.SecondMoment` of each donor's inputs.
    lam: how far to go from the base to the solution.
    **knobs: see `regress`.

  Returns:
    The kernel, in the dtype of `w`.
  """
  return _towards(w, regress(donors, tuple(g.mean() for g in grams), **knobs), lam)


def mean_leaf(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None,
  lam: ArrayLike,
) -> Float[Array, "*shape"]:
  """Average what is no linear kernel.

  Args:
    w: the base's array.
    donors: the donors' arrays.
    weights: one number a donor; None means ones.
    lam: how far to go from the base to the average.

  Returns:
    The average, in the dtype of `w`.
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  total = sum(c * d.astype(jnp.float32) for c, d in zip(weight, donors, strict=True))
  return _towards(w, jnp.asarray(total) / sum(weight), lam)


@step.method("merge.regmean")
def regmean(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  alpha: varied.Varied = 0.9,
  ridge: varied.Varied = 1e-6,
  lam: varied.Varied = 1.0,
  kernels: str = step.BLOCK_KERNELS,
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors so that every linear layer's outputs are kept on each donor's data.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, not negative; None means ones.
    alpha: what off-diagonal entries of the second moments are multiplied by, 0 to 1.
    ridge: pull towards the donors' average, relative to the mean diagonal.
    lam: how far to go from the model at hand to the merge; 0 leaves it as it is.
    kernels: which addresses are solved for; all others are averaged.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it needs each donor's data.

  Raises:
    ValueError: for a number out of range.

  Example:
    >>> regmean(alpha=0.6)
    (merge.regmean(alpha=0.6),)

  Reference:
    Jin et al., Dataless knowledge fusion by merging weights of language models, 2022,
    arXiv 2212.09849.
  """
  return build(
    tuple(models), weights=weights, alpha=alpha, ridge=ridge, lam=lam, kernels=kernels,
    pattern=select or ".*", scope="leaf",
  )  # fmt: skip


def build(
  models: tuple[str, ...],
  *,
  weights: Sequence[varied.Varied] | None,
  alpha: varied.Varied,
  ridge: varied.Varied,
  lam: varied.Varied,
  kernels: str,
  pattern: str,
  scope: Literal["leaf", "block"],
) -> step.Step:
  """Make the step: some leaves solved for, the others averaged.

  Args:
    models: names of the donors.
    weights, alpha, ridge, lam, kernels: as `regmean`.
    pattern: which addresses change.
    scope: "block" asks for the blockwise driver.

  Returns:
    The step.

  Raises:
    ValueError: for a number out of range.
  """
  if not all(0 <= a <= 1 for a in varied.values(alpha)):
    raise ValueError(f"alpha={alpha} must lie between 0 and 1")
  if not all(r >= 0 for r in varied.values(ridge)):
    raise ValueError(f"ridge={ridge} must not be negative")
  donors: dict[str, needs.Need] = {"donors": needs.Donors(models)}
  solve = lifting.over_leaves(
    solve_leaf,
    hyper={},
    knobs={"weights": weights, "alpha": alpha, "ridge": ridge, "lam": lam},
    check=_check,
    select=pattern,
    domain=kernels,
    wants={**donors, "grams": needs.Statistic("second_moment", of="donors")},
    scope=scope,
  )
  rest = lifting.over_leaves(
    mean_leaf,
    hyper={},
    knobs={"weights": weights, "lam": lam},
    check=_check,
    select=pattern,
    domain=rf"(?!(?:{kernels})\Z).*",
    wants=donors,
    scope=scope,
  )

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    return solve.apply(rest.apply(m, evidence, key), evidence, key)

  def units(names: Sequence[str]) -> step.Units:
    return [(n,) for n in paths.select(names, pattern)]

  def reselect(narrower: str) -> step.Step:
    return build(
      models, weights=weights, alpha=alpha, ridge=ridge, lam=lam, kernels=kernels,
      pattern=step.both(pattern, narrower), scope=scope,
    )  # fmt: skip

  return step.Step(solve.needs, apply, scope, {}, units, reselect)


def _towards(w: jax.Array, goal: jax.Array, lam: ArrayLike) -> jax.Array:
  return jnp.asarray((1 - lam) * w.astype(jnp.float32) + lam * goal).astype(w.dtype)


def _check(donors: int, *, weights: Sequence[float] | None, **rest: Any) -> None:
  del rest
  weight = weights_lib.resolve(weights, donors, of="donors")
  if min(weight) < 0 or sum(weight) == 0:
    raise ValueError(f"weights={weight} must not be negative, and not all zero")
