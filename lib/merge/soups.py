# SPDX-License-Identifier: Apache-2.0
"""Model soups: average those of several fine-tuned models that help each other on held-out data.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", 2022 (arXiv 2203.05482). The uniform soup is `merge.linear`. As
there, the ingredients are the model at hand and its donors.

Greedy: ingredients are tried from best to worst held-out loss and stay where the average with them
is not worse; so the soup is never worse than the best ingredient on that data. Loss instead of the
paper's accuracy, of which text has no single one. Learned: mixing coefficients, softmax-normalized
or free, for the model, each layer or each tensor, by AdamW through the network; the paper's
temperature is left out, for it scales the soup's logits and has no place among the weights. Formed
in float32, returned in the base's storage dtype. Neutral at lam=0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models as networks
from treesurgeon.core import descend, needs, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import adamerging, mixed_models, mixture

NORMALIZATIONS = ("softmax", "none")


def greedy(losses: Any, loss: Any) -> tuple[jax.Array, jax.Array]:
  """Choose ingredients from best to worst, keeping those that do not raise the loss.

  Args:
    losses: each ingredient's own loss, (n,).
    loss: mixing weights (n,) -> loss; may be traced.

  Returns:
    (mixing weights, their loss).

  Example:
    >>> aims = jnp.array([0.0, 2.0, 9.0])
    >>> weights, _ = greedy(jnp.abs(aims - 1), lambda c: jnp.abs(c @ aims - 1))
    >>> weights.tolist()
    [0.5, 0.5, 0.0]
  """
  losses = jnp.asarray(losses)
  order = jnp.argsort(losses, stable=True)
  inside = jnp.zeros(losses.shape, jnp.float32).at[order[0]].set(1.0)
  best = losses[order[0]]
  for i in range(1, losses.size):
    trial = inside.at[order[i]].set(1.0)
    value = loss(trial / trial.sum())
    helps = value <= best
    inside, best = jnp.where(helps, trial, inside), jnp.where(helps, value, best)
  return inside / inside.sum(), best


def mixed_nll(
  plan: mixture.Plan, coefficients: Any, batch: Any, key: jax.Array, parts: Any
) -> jax.Array:
  """Compute a learned soup's loss on a batch.

  Args:
    plan: what is static; its option tells how coefficients are normalized.
    coefficients: logits or free numbers, the ingredients' axis first, the base's own first.
    batch: see `models.nll`.
    key: not used.
    parts: `mixture.Parts`.

  Returns:
    Nats a label.
  """
  del key
  params = mixture.network(plan, parts, of_donors(plan, coefficients))
  return networks.nll(plan.spec, params, batch)


def of_donors(plan: mixture.Plan, coefficients: Any) -> Any:
  """Turn ingredients' coefficients into those of the donors' differences.

  With Σ c = 1 the base's own share follows from the others. Free coefficients are shares too: what
  they lack of one goes to the base, so that the base's own number is not used.

  Args:
    plan: what is static.
    coefficients: the ingredients' axis first, the base's own first.

  Returns:
    The same without the base.
  """
  soft = plan.option == "softmax"
  return jax.tree.map(lambda c: (jax.nn.softmax(c, axis=0) if soft else c)[1:], coefficients)


@step.method("merge.soup_greedy")
def soup_greedy(
  *, models: Sequence[str] = (), lam: float = 1.0, select: str | None = None
) -> step.Step:
  """Average the model with those of its donors that lower the loss on held-out data.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    lam: how far to go from the model to the soup; 0 leaves it as it is.
    select: regular expression over addresses; None means every leaf. An ingredient lends the
      selected leaves only.

  Returns:
    A transform; its lineage tells each ingredient's weight and loss.

  Example:
    >>> soup_greedy()
    (merge.soup_greedy(),)

  Reference:
    Wortsman et al., Model soups, 2022, arXiv 2203.05482.
  """
  pattern = select or ".*"

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    plan, parts = mixed_models.gather(m, evidence["donors"], pattern, granularity="task")
    count = len(parts.donors) + 1
    batches = list(evidence["batches"])
    if not tuning.learnable(m, batches):
      return mixed_models.put(m, plan, parts, jnp.zeros(count - 1))

    def loss(weights: jax.Array) -> jax.Array:
      total = jnp.zeros(2)
      for batch in batches:
        total = total + _weighed(plan, parts, weights[1:], batch)
      return total[0] / jnp.maximum(total[1], 1.0)

    eye = jnp.eye(count, dtype=jnp.float32)
    alone = jnp.stack([loss(eye[i]) for i in range(count)])
    weights, best = greedy(alone, loss)
    new = mixed_models.put(m, plan, parts, lam * weights[1:])
    if isinstance(best, jax.core.Tracer):
      return new
    note = {"weights": weights.tolist(), "losses": alone.tolist(), "loss": float(best)}
    return new.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), **note}})

  return adamerging.over_model(apply, models, pattern, needs.Batches())


@step.method("merge.soup_learned")
def soup_learned(
  *,
  models: Sequence[str] = (),
  granularity: str = "task",
  normalize: str = "softmax",
  steps: int = 200,
  rate: float = 0.05,
  decay: float = 0.0,
  lam: float = 1.0,
  select: str | None = None,
) -> step.Step:
  """Average the model with its donors, with weights learned from held-out data.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    granularity: "task", "layer" or "tensor": what has weights of its own.
    normalize: "softmax" keeps weights positive with sum 1; "none" leaves the donors' free.
    steps: updates, each on one batch; learning starts at the uniform soup.
    rate: AdamW's step.
    decay: AdamW's weight decay.
    lam: how far to go from the model to the soup; 0 leaves it as it is.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform. The model's `aux["coefficients"]` holds the donors' weights, by address.

  Raises:
    ValueError: for an argument out of range; when applied, if there is no data.

  Example:
    >>> soup_learned(granularity="layer")
    (merge.soup_learned(granularity='layer'),)

  Reference:
    Wortsman et al., Model soups, 2022, arXiv 2203.05482, appendix.
  """
  adamerging.check(granularity=granularity, steps=steps, rate=rate)
  if normalize not in NORMALIZATIONS:
    raise ValueError(f"normalize={normalize!r}; valid: {', '.join(NORMALIZATIONS)}")
  pattern = select or ".*"

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    plan, parts = mixed_models.gather(
      m, evidence["donors"], pattern, granularity=granularity, option=normalize
    )
    count = len(parts.donors) + 1
    found = mixture.start(plan, count, 0.0 if normalize == "softmax" else 1.0 / count)
    losses = np.zeros(0)
    batches = list(evidence["batches"])
    if steps and tuning.learnable(m, batches):
      found, losses = descend.minimize(
        mixed_nll, found, batches, parts, optimizer=_adamw(rate, decay), steps=steps, spec=plan
      )
    shares = jax.tree.map(lambda c: lam * c, of_donors(plan, found))
    return mixed_models.learned(m, plan, parts, shares, losses)

  return adamerging.over_model(apply, models, pattern, needs.Batches())


@functools.partial(jax.jit, static_argnums=0)
def _weighed(plan: mixture.Plan, parts: Any, coefficients: jax.Array, batch: Any) -> jax.Array:
  """Return (sum of losses, number of labels)."""
  params = mixture.network(plan, parts, coefficients)
  logits, labels, weights = networks.predictions(plan.spec, params, batch)
  each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
  return jnp.stack([jnp.sum(each * weights), jnp.sum(weights)])


@functools.lru_cache(maxsize=32)
def _adamw(rate: float, decay: float) -> optax.GradientTransformation:
  return optax.adamw(rate, weight_decay=decay)
