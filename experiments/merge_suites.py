# SPDX-License-Identifier: Apache-2.0
"""What the merge benchmark is run on: tasks, a base's training mixture, and how experts are tuned.

"language" is a byte-level decoder on the tasks of `train.tasks`; "digits" a classifier of
handwritten digits on the variants of `train.vision_data`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.train import objectives, tasks, vision_data


@dataclasses.dataclass(frozen=True)
class Suite:
  """One benchmark's tasks.

  Attributes:
    spec: architecture.
    tasks: by name; those without an expert are held out.
    mixture: task to its share in the base's training.
    objective: of training.
    draw: (mixture, batch, seed) -> endless training batches.
  """

  spec: Any
  tasks: Mapping[str, Any]
  mixture: Mapping[str, float]
  objective: Any
  draw: Callable[..., Iterator[dict[str, np.ndarray]]]

  def batches(self, task: str | None, batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Draw training batches of a task, or of the base's mixture."""
    shares = self.mixture if task is None else {task: 1.0}
    named = {t: (self.tasks[t], s) for t, s in shares.items()}
    return self.draw(named, batch=batch, seed=seed)

  def base_nll(self, m: model_lib.Model) -> float:
    """Return the mean loss over the base's own mixture, in nats: what merging forgets."""
    values = []
    for t, share in self.mixture.items():
      rows = {k: v[:128] for k, v in self.tasks[t].test.items()}
      values.append((share, float(_nll(m.spec, m.params, rows))))
    return sum(s * v for s, v in values) / sum(s for s, _ in values)

  def materials(self, names: list[str], seed: int) -> dict[str, Any]:
    """Give what methods with data may ask for: every task's own rows, and all tasks in turn."""
    own = []
    for t in names:
      stream = self.draw({t: (self.tasks[t], 1.0)}, batch=32, seed=seed + 77)
      own.append(list(itertools.islice(stream, 8)))
    turns = [b for group in zip(*own, strict=True) for b in group]
    return {"batches": turns, "donor_batches": own}


def build(settings: Mapping[str, Any], seed: int) -> Suite:
  """Make a suite.

  Args:
    settings: "suite", "spec", "tasks", "held_out", "mixture", "items", "length".
    seed: of what is drawn.

  Returns:
    The suite.

  Raises:
    ValueError: for an unknown suite.
  """
  kind = settings["suite"]
  if kind == "language":
    return _language(settings, seed)
  if kind == "digits":
    return _digits(settings, seed)
  raise ValueError(f"suite={kind!r}; valid: language, digits")


def _language(settings: Mapping[str, Any], seed: int) -> Suite:
  names = [*settings["tasks"], *settings["held_out"]]
  names += [t for t in settings["mixture"] if t not in names]
  length = settings["length"]
  made = {t: tasks.build(t, length=length, items=settings["items"], seed=seed) for t in names}
  spec = models.Spec(vocab_size=tasks.VOCABULARY, max_positions=length, **dict(settings["spec"]))
  return Suite(spec, made, settings["mixture"], objectives.next_token(), tasks.batches)


class _Images(NamedTuple):
  """A task of images; every image is one question."""

  exact: bool
  train: Mapping[str, np.ndarray]
  validation: Mapping[str, np.ndarray]
  test: Mapping[str, np.ndarray]


def _digits(settings: Mapping[str, Any], seed: int) -> Suite:
  del seed  # the images and their split are what they are
  names = list(dict.fromkeys([*settings["tasks"], *settings["held_out"], *settings["mixture"]]))
  spec = models.VisionSpec(
    image_size=vision_data.SIDE, num_classes=vision_data.CLASSES, **dict(settings["spec"])
  )
  made = {t: _Images(True, *vision_data.build(t)) for t in names}
  return Suite(spec, made, settings["mixture"], objectives.classification(), vision_data.mixed)


_nll = jax.jit(models.nll, static_argnums=0)
