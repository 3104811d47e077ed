# SPDX-License-Identifier: Apache-2.0
"""AdaMerging: learn the coefficients of task vectors from unlabelled data, by entropy.

θ = θ₀ + Σ λ_i τ_i, where the λ minimise the mean entropy of the merged network's predictions on
each task's inputs; labels are not used. Yang et al., "AdaMerging: Adaptive model merging for
multi-task learning", 2023 (arXiv 2310.02575). λ starts at 0.3; Adam with step 1e-3.

`granularity="task"` is task-wise AdaMerging. What paper and code call layer-wise has one λ for each
parameter tensor and task, here "tensor", the default; "layer" shares it within a transformer block,
and among all that lies outside the blocks. `density` makes it AdaMerging++: task vectors are first
trimmed over the whole model and freed of entries against the elected sign, as TIES does (where the
sum is zero the sign is plus, as in `merge.ties`). Entropies are averaged over the tasks, where the
official code adds them, which Adam does not notice. Low entropy is not low loss: on small language
models, whose base is certain of another text, it went far past the best coefficients, so keep an
eye on a loss and stop early (`steps`). The merge is formed in float32 from arrays as
stored and returned in the base's storage dtype. Neutral at init=0, steps=0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models as networks
from treesurgeon.core import descend, meshes, needs, paths, step, trim, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import mixed_models, mixture, ties


def mean_entropy(
  plan: mixture.Plan, coefficients: Any, batch: tuple[Any, ...], key: jax.Array, parts: Any
) -> jax.Array:
  """Compute the entropy of a merged network's predictions, averaged over tasks.

  Args:
    plan: what is static; its option tells whether to clamp coefficients to 0 to 1.
    coefficients: λ, shaped like `mixture.start`'s.
    batch: one batch a task.
    key: not used.
    parts: `mixture.Parts`.

  Returns:
    Nats a prediction.
  """
  del key
  params = mixture.network(plan, parts, clamped(plan, coefficients))
  return jnp.stack([networks.entropy(plan.spec, params, b) for b in batch]).mean()


def clamped(plan: mixture.Plan, coefficients: Any) -> Any:
  """Clamp coefficients to 0 to 1 where the plan's option says so.

  Args:
    plan: what is static.
    coefficients: λ.

  Returns:
    Coefficients to merge with.
  """
  if not plan.option:
    return coefficients
  return jax.tree.map(lambda c: jnp.clip(c, 0.0, 1.0), coefficients)


@functools.partial(jax.jit, static_argnames="density")
def agreeing(parts: mixture.Parts, *, density: float) -> mixture.Parts:
  """Trim task vectors over the whole model and drop entries against the elected sign.

  Args:
    parts: base and donors.
    density: fraction of each donor's changes to keep.

  Returns:
    The same with donors θ₀ + τ̂_i, float32.
  """
  tree = {n: (w, tuple(d[n] for d in parts.donors)) for n, w in parts.base.items()}
  cuts = ties.global_cuts(tree, density=density)
  donors: list[dict[str, jax.Array]] = [{} for _ in parts.donors]
  for name, (w, each) in tree.items():
    base = w.astype(jnp.float32)
    vectors = [d.astype(jnp.float32) - base for d in each]
    cut = [
      t if where is None else jnp.where(trim.kept(t, *where), t, 0.0)
      for t, where in zip(vectors, cuts[name], strict=True)
    ]
    elected = jnp.where(sum(cut) >= 0, 1.0, -1.0)
    for donor, t in zip(donors, cut, strict=True):
      donor[name] = base + jnp.where(jnp.sign(t) == elected, t, 0.0)
  return mixture.Parts(parts.base, tuple(donors), parts.rest)


@step.method("merge.adamerging")
def adamerging(
  *,
  models: Sequence[str] = (),
  granularity: str = "tensor",
  init: float | Sequence[float] = 0.3,
  steps: int = 1000,
  rate: float = 1e-3,
  density: float | None = None,
  clamp: bool = False,
  select: str | None = None,
) -> step.Step:
  """Add task vectors with coefficients that make predictions on unlabelled data certain.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    granularity: "task", "layer" or "tensor": what has a coefficient of its own.
    init: coefficients to begin from, one number or one a donor.
    steps: updates, each on one batch of every donor's data.
    rate: Adam's step.
    density: fraction of each donor's changes to keep (AdaMerging++); None keeps all as they are.
    clamp: whether to keep coefficients between 0 and 1, as the official code does.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform. The model's `aux["coefficients"]` holds what was learned, by address.

  Raises:
    ValueError: for an argument out of range; when applied, if there is no data.

  Example:
    >>> adamerging(granularity="task", steps=500)
    (merge.adamerging(granularity='task', steps=500),)

  Reference:
    Yang et al., AdaMerging, 2023, arXiv 2310.02575.
  """
  check(granularity=granularity, steps=steps, rate=rate)
  if density is not None and not 0 < density <= 1:
    raise ValueError(f"density={density} must lie between 0 and 1, 0 excluded")
  pattern = select or ".*"

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    plan, parts = mixed_models.gather(
      m, evidence["donors"], pattern, granularity=granularity, option=clamp
    )
    if density is not None:
      parts = agreeing(parts, density=density)
    found, losses = mixture.start(plan, len(parts.donors), init), np.zeros(0)
    batches = mixed_models.abreast(evidence["batches"])
    if steps and tuning.learnable(m, batches):
      found, losses = descend.minimize(
        mean_entropy, found, batches, parts, optimizer=_adam(rate), steps=steps, spec=plan
      )
    return mixed_models.learned(m, plan, parts, clamped(plan, found), losses)

  return over_model(apply, models, pattern, needs.Batches(of="donors"))


def check(*, granularity: str, steps: int, rate: float) -> None:
  """Refuse arguments that no learned merge takes.

  Args:
    granularity: see `mixture.Plan`.
    steps: updates.
    rate: optimizer's step.

  Raises:
    ValueError: naming the argument.

  Example:
    >>> check(granularity="task", steps=0, rate=1.0)
  """
  if granularity not in mixture.GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(mixture.GRANULARITIES)}")
  if steps < 0 or rate <= 0:
    raise ValueError(f"steps={steps} must not be negative and rate={rate} must be above 0")


def over_model(
  apply: Any, models: Sequence[str], pattern: str, batches: needs.Batches
) -> step.Step:
  """Make a step of a merge that learns from batches.

  Args:
    apply: (model, evidence, key) -> model; the evidence is "donors" and "batches".
    models: names of the donors.
    pattern: which addresses it changes.
    batches: whose batches it wants.

  Returns:
    A step of scope "model".
  """

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  wants: dict[str, needs.Need] = {"donors": needs.Donors(tuple(models)), "batches": batches}
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, units)


@functools.lru_cache(maxsize=32)
def _adam(rate: float) -> optax.GradientTransformation:
  return optax.adam(rate)
