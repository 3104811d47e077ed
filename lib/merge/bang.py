# SPDX-License-Identifier: Apache-2.0
"""BANG, balanced averaging: fine-tune without growing overconfident, then average with the start.

Lin et al., "Spurious feature diversification improves out-of-distribution generalization", 2023
(arXiv 2309.17230), section 4. Averaging the weights of a pre-trained and a fine-tuned model
diversifies the spurious features that the average relies on, but a fine-tuned model that is
overconfident outvotes the other. So the fine-tuning smooths labels, mixes examples up, or both, and
the average is WiSE-FT's, `merge.wise_ft`. This step does both in one: it takes the pre-trained
model and its own fine-tuning data. `train.objectives.classification` is the same objective for the
training loop, where a schedule is wanted.

The loss is a mean over labels, (1 − s) nll + s · the mean nll over all classes; mixup draws one
share of Beta(a, a) a batch, mixes each image with its neighbour, and needs images, tokens
having no average. Adam with a constant step, float32 masters. Neutral at alpha=0 or steps=0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import models as networks
from treesurgeon.core import descend, needs, paths, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import wise_ft


def smoothed(
  logits: Float[Array, "n classes"],
  labels: Int[Array, " n"],
  weights: Float[Array, " n"],
  *,
  smoothing: ArrayLike,
) -> Float[Array, ""]:
  """Compute the mean cross entropy to labels a share of which is spread over all classes.

  Args:
    logits: predictions.
    labels: classes.
    weights: one a label.
    smoothing: s, the share that is spread.

  Returns:
    Nats a label.

  Example:
    >>> one = jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([1]), jnp.ones(1)
    >>> round(float(smoothed(*one, smoothing=0.5)), 3)  # 0.75 ln(4/3) + 0.25 ln 4
    0.562
  """
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  at = jnp.take_along_axis(logp, labels[:, None], axis=1)[:, 0]
  each = -(1 - smoothing) * at - smoothing * logp.mean(axis=1)
  return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def loss(plan: tuple[Any, bool], flat: Any, batch: Any, key: jax.Array, strengths: Any) -> Any:
  """Compute the fine-tuning loss.

  Args:
    plan: (architecture, whether to mix examples up).
    flat: stored name to array.
    batch: tokens or images.
    key: of the step.
    strengths: smoothing and mixup.

  Returns:
    The loss.
  """
  spec, mixes = plan
  params = paths.nest(flat)
  smoothing, mixup = strengths
  if not mixes:
    return smoothed(*networks.predictions(spec, params, batch), smoothing=smoothing)
  share = jax.random.beta(key, mixup, mixup)
  x = networks.inputs(batch)
  mixed = {**batch, "inputs": share * x + (1 - share) * jnp.roll(x, 1, axis=0)}
  logits, labels, weights = networks.predictions(spec, params, mixed)
  other = jnp.roll(labels, 1, axis=0)
  first = smoothed(logits, labels, weights, smoothing=smoothing)
  return share * first + (1 - share) * smoothed(logits, other, weights, smoothing=smoothing)


@step.method("merge.bang")
def bang(
  *,
  alpha: float = 0.5,
  smoothing: float = 0.1,
  mixup: float = 0.0,
  steps: int = 500,
  rate: float = 1e-3,
) -> step.Step:
  """Fine-tune on batches with soft labels and average the result with the model it began from.

  Args:
    alpha: the fine-tuned model's share in the average; 1 is that model.
    smoothing: share of each label that is spread over all classes.
    mixup: a of Beta(a, a), from which the share of mixed examples is drawn; 0 is off.
    steps: updates.
    rate: Adam's step.

  Returns:
    A transform. It reads the batches in turn, as often as the steps ask.

  Raises:
    ValueError: for an argument out of range, no data, or mixup of tokens.

  Example:
    >>> bang(mixup=0.2, steps=300)
    (merge.bang(mixup=0.2, steps=300),)

  Reference:
    Lin et al., Spurious feature diversification improves out-of-distribution generalization, 2023,
    arXiv 2309.17230.
  """
  tuning.check(steps=steps, rate=rate, mixup=mixup)
  if not 0 <= smoothing < 1:
    raise ValueError(f"smoothing={smoothing} must be in [0, 1)")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    batches = list(evidence["batches"])
    start = tuning.masters(m)
    if not steps or not tuning.learnable(m, batches):
      return tuning.put(m, start)
    if mixup and not all(isinstance(b, Mapping) and "inputs" in b for b in batches):
      raise ValueError(f"mixup={mixup} averages images; tokens have no average, use mixup=0")
    found, losses = descend.minimize(
      loss,
      start,
      batches,
      (jnp.float32(smoothing), jnp.float32(mixup)),
      optimizer=tuning.adam(rate),
      steps=steps,
      spec=(m.spec, bool(mixup)),
    )
    mean = {n: wise_ft.interpolate(start[n], (found[n],), alpha=alpha) for n in start}
    note = {"first_loss": float(losses[0]), "last_loss": float(losses[-1])} if len(losses) else {}
    return tuning.noted(tuning.put(m, mean), {"steps": steps, **note})

  return tuning.over_model(apply, {"batches": needs.Batches()})
