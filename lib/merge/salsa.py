# SPDX-License-Identifier: Apache-2.0
"""SALSA: tune a model by preferences with a soup of fine-tuned models as the reference.

Chegini et al., "SALSA: Soup-based alignment learning for stronger adaptation in RLHF", 2024 (arXiv
2411.01798): the policy starts from one fine-tuned model, and the divergence that keeps it in place
is measured from the average of two that were fine-tuned apart, π_ref = (1 − α) θ₁ + α θ₂ with
α = 0.5. The policy may then go further, towards where the soup is.

The model at hand is the first, its donors are the others, which share α. Where we differ: the paper
optimizes by PPO with a learned reward; a transform has no reward model and samples nothing, so the
step learns from given pairs by DPO, which has the same optimum for the reward that the pairs imply.
`train.preferences.ppo` takes the same reference for those who sample. The soup's log probabilities
are computed once for every batch. alpha=0 is plain DPO. Tuned in float32, returned in the base's
storage dtype. Neutral at steps=0.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon.core import descend, needs, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import adamerging, mixed_models, mixture
from treesurgeon.models import preferences

OPTIMIZERS = ("adamw", "sgd")


def preference_loss(
  plan: mixture.Plan,
  masters: mixture.Flat,
  batch: Mapping[str, Any],
  key: jax.Array,
  base: mixture.Flat,
  rest: mixture.Flat,
  beta: jax.Array,
) -> jax.Array:
  """Compute the mean DPO loss of a batch of pairs.

  Args:
    plan: what is static.
    masters: the policy's weights in float32, by stored name.
    batch: pairs, with the reference's log probabilities.
    key: not used.
    base: the model it started from, by stored name.
    rest: stored name to what does not train.
    beta: how dear it is to leave the reference.

  Returns:
    Nats a pair.
  """
  del key
  params = mixture.network(plan, mixture.Parts(base, (masters,), rest), jnp.ones(1))
  mine = preferences.pair_log_probs(plan.spec, params, batch)
  reference = (batch["reference_chosen"], batch["reference_rejected"])
  return preferences.dpo(*mine, *reference, beta=beta)[0].mean()


@functools.partial(jax.jit, static_argnums=0)
def reference(
  plan: mixture.Plan, parts: mixture.Parts, shares: jax.Array, batch: dict[str, Any]
) -> dict[str, Any]:
  """Add to a batch of pairs what the soup says of it.

  Args:
    plan: what is static.
    parts: base and donors.
    shares: of each donor in the soup.
    batch: pairs, see `models.preferences`.

  Returns:
    The batch with "reference_chosen" and "reference_rejected".
  """
  params = mixture.network(plan, parts, shares)
  chosen, rejected = preferences.pair_log_probs(plan.spec, params, batch)
  return {**batch, "reference_chosen": chosen, "reference_rejected": rejected}


@step.method("merge.salsa")
def salsa(
  *,
  models: Sequence[str] = (),
  alpha: float = 0.5,
  beta: float = 0.1,
  steps: int = 100,
  optimizer: str = "adamw",
  rate: float = 1e-4,
  decay: float = 0.0,
  select: str | None = None,
) -> step.Step:
  """Tune the model by preferences, held by its average with its donors.

  Args:
    models: directories of the donors, fine-tuned apart from one base; empty takes those handed to
      the driver.
    alpha: the donors' share of the reference, divided equally; 0 is plain DPO.
    beta: how dear it is to leave the reference.
    steps: updates, each on one batch of pairs; 0 leaves the model as it is.
    optimizer: "adamw", or "sgd" with momentum 0.9.
    rate: size of the first step, falling linearly to zero.
    decay: AdamW's weight decay.
    select: regular expression over addresses; None means every leaf. The others neither train nor
      differ in the reference.

  Returns:
    A transform whose batches are pairs (`models.preferences`); its lineage tells the first and
    last loss.

  Raises:
    ValueError: for an argument out of range; when applied, if there are no pairs.

  Example:
    >>> salsa(beta=0.05, steps=20)
    (merge.salsa(beta=0.05, steps=20),)

  Reference:
    Chegini et al., SALSA: Soup-based alignment learning, 2024, arXiv 2411.01798.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha={alpha} must lie between 0 and 1")
  if beta <= 0 or rate <= 0:
    raise ValueError(f"beta={beta} and rate={rate} must be above 0")
  if steps < 0 or decay < 0:
    raise ValueError(f"steps={steps} and decay={decay} must not be negative")
  if optimizer not in OPTIMIZERS:
    raise ValueError(f"optimizer={optimizer!r}; valid: {', '.join(OPTIMIZERS)}")
  pattern = select or ".*"

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    plan, parts = mixed_models.gather(m, evidence["donors"], pattern, granularity="task")
    batches = list(evidence["batches"])
    for batch in batches:
      preferences.check(batch)
    if not steps or not tuning.learnable(m, batches):
      return m
    shares = mixture.start(plan, len(parts.donors), alpha / len(parts.donors))
    batches = [reference(plan, parts, shares, dict(b)) for b in batches]
    masters = {n: x.astype(jnp.float32) for n, x in parts.base.items()}
    tuned, losses = descend.minimize(
      preference_loss, masters, batches, parts.base, parts.rest, jnp.float32(beta),
      optimizer=_optimizer(optimizer, rate, decay, steps), steps=steps, spec=plan,
    )  # fmt: skip
    new = mixed_models.put(
      m, plan, mixture.Parts(parts.base, (tuned,), parts.rest), np.ones(1, np.float32)
    )
    if not losses.size:
      return new
    note = {"steps": steps, "first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    return new.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), **note}})

  return adamerging.over_model(apply, models, pattern, needs.Batches())


@functools.lru_cache(maxsize=32)
def _optimizer(name: str, rate: float, decay: float, steps: int) -> optax.GradientTransformation:
  schedule = optax.linear_schedule(rate, 0.0, steps)
  if name == "sgd":
    return optax.sgd(schedule, momentum=0.9)
  return optax.adamw(schedule, weight_decay=decay)
