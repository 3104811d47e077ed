# SPDX-License-Identifier: Apache-2.0
"""Distillation: train a student on the distribution over tokens that its teacher gives.

The loss is (1 - a) CE + a T² KL(teacher || student), both softened by the temperature T (Hinton et
al., arXiv:1503.02531), plus f times the mean squared difference of all blocks' outputs where
teacher and student have the same depth and width. With a = 1, T = 1 and f = 0, the default, it is
the loss that Minitron finds best for a pruned model (Muralidharan et al., arXiv:2407.14679); ZipLM
adds the blocks' outputs (Kurtic et al., arXiv:2302.04089).

As a step it trains a model in place, with Adam at a constant rate on float32 masters: after a
pruning step it retrains what is left. The teacher is a donor, of any architecture with the same
vocabulary. Quantized leaves stay as they are, thin factors train as factors. `losses.objective` is
the same for the training loop. Neutral at steps=0.
"""

from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models
from treesurgeon.compress.distill import losses, student
from treesurgeon.core import descend, needs, paths, step, tuning
from treesurgeon.core import model as model_lib


def loss(
  plan: tuple[Any, Any, bool, bool],
  train: Any,
  batch: Any,
  key: jax.Array,
  rest: Any,
  teacher: Any,
  strengths: Any,
) -> jax.Array:
  """Compute the loss of a student, the teacher run along.

  Args:
    plan: (student's architecture, teacher's, whether labels count, whether blocks' outputs do).
    train: stored name to what trains of the student.
    batch: tokens or images.
    key: unused.
    rest: stored name to what does not train.
    teacher: the teacher's parameters.
    strengths: temperature, alpha and the weight of blocks' outputs.

  Returns:
    The loss.
  """
  del key
  spec, master, hard, features = plan
  params = paths.nest({**rest, **train})
  temperature, alpha, weight = strengths
  logits, labels, weights = models.predictions(spec, params, batch)
  said = jax.lax.stop_gradient(models.predictions(master, teacher, batch)[0])
  total = alpha * losses.divergence(logits, said, weights, temperature=temperature)
  if hard:
    total = total + (1 - alpha) * losses.cross_entropy(logits, labels, weights)
  if features:
    total = total + weight * losses.difference(spec, params, teacher, models.inputs(batch))
  return total


@step.method("compress.distill.logits")
def logits(
  *,
  teacher: str | None = None,
  temperature: float = 1.0,
  alpha: float = 1.0,
  features: float = 0.0,
  steps: int = 500,
  rate: float = 1e-4,
) -> step.Step:
  """Train a model on what a larger one says.

  Args:
    teacher: the larger model, by name; None is the donor handed to the driver.
    temperature: T, which softens both distributions.
    alpha: the teacher's share; the rest is the cross entropy of the labels.
    features: weight of the mean squared difference of the blocks' outputs; needs a teacher of the
      same depth and width.
    steps: updates; 0 leaves the model as it is, the neutral setting.
    rate: Adam's step.

  Returns:
    A transform. It reads the batches in turn, as often as the steps ask.

  Raises:
    ValueError: for an argument out of range; when applied, for no data, more than one teacher, or
      one that does not fit.

  Example:
    >>> logits(teacher="big", steps=1000)
    (compress.distill.logits(teacher='big', steps=1000),)

  Reference:
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
  """
  tuning.check(steps=steps, rate=rate)
  losses.check(temperature=temperature, alpha=alpha, features=features)

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    batches = list(evidence["batches"])
    if not steps or not tuning.learnable(m, batches):
      return m
    master = student.one_teacher(evidence["teacher"])
    if features and (shape := _frame(master.spec)) != _frame(m.spec):
      raise ValueError(
        f"features={features} compares block by block: the teacher has {shape[0]} layers of width "
        f"{shape[1]}, the student {_frame(m.spec)[0]} of {_frame(m.spec)[1]}; use features=0"
      )
    train, rest = student.masters(m)
    strengths = tuple(jnp.float32(x) for x in (temperature, alpha, features))
    train, course = descend.minimize(
      loss, train, batches, rest, master.params, strengths, optimizer=tuning.adam(rate),
      steps=steps, spec=(m.spec, master.spec, alpha < 1, features > 0),
    )  # fmt: skip
    told = {"first_loss": float(course[0]), "last_loss": float(course[-1])} if len(course) else {}
    return tuning.noted(student.put(m, train), {"steps": steps, **told})

  wants = {"teacher": needs.Donors((teacher,) if teacher else (), alike=False)}
  return tuning.over_model(apply, {**wants, "batches": needs.Batches()})


def _frame(spec: Any) -> tuple[int, int]:
  return spec.num_layers, spec.d_model
