# SPDX-License-Identifier: Apache-2.0
"""A byte-level decoder of prose and code to compress, and the verdicts on what is claimed of it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import console, table

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.train import loop, tasks

TEXTS = ("prose", "code")  # the general one first
Numbers = dict[str, dict[str, float]]  # "arm at cut" -> quantity -> value


class Trained(NamedTuple):
  """A trained model and its texts.

  Attributes:
    model: float32.
    sets: calibration batches of each text.
    tests: held-out rows of each.
    feed: goes on with what the model was trained on.
  """

  model: model_lib.Model
  sets: list[list[np.ndarray]]
  tests: list[Mapping[str, np.ndarray]]
  feed: Iterator[Any]


def train(config: Mapping[str, Any], seed: int) -> Trained:
  """Train a decoder on the standard library's prose and code.

  Args:
    config: "spec", "length", "batch", "steps", "rate", and the rows "calibration" and "test".
    seed: of everything random.

  Returns:
    The model and its texts.
  """
  length, batch = config["length"], config["batch"]
  named = {t: tasks.build(t, length=length, items=config["test"], seed=seed) for t in TEXTS}
  spec = models.Spec(vocab_size=tasks.VOCABULARY, max_positions=length, **config["spec"])
  fresh = model_lib.Model(spec, models.init(spec, jax.random.key(seed)))
  feed = tasks.batches({t: (task, 1.0) for t, task in named.items()}, batch=batch, seed=seed)
  optimizer = {"lr": config["rate"], "warmup": config["steps"] // 10}
  done = loop.fit(fresh, feed, steps=config["steps"], optimizer=optimizer, log_every=100)
  sets = [
    _calibration(t.train["tokens"], config["calibration"] // 2, batch) for t in named.values()
  ]
  return Trained(model_lib.Model(spec, done.params), sets, [t.test for t in named.values()], feed)


def loss(m: model_lib.Model, tests: Sequence[Mapping[str, np.ndarray]]) -> float:
  """Measure the mean loss over texts.

  Args:
    m: the model.
    tests: held-out rows of each text.

  Returns:
    Nats a byte.
  """
  return float(np.mean([_nll(m.spec)(m.params, dict(rows)) for rows in tests]))


def value(found: Numbers, low: str, high: str, quantity: str, cut: str) -> float:
  """Evaluate a claim.

  Args:
    found: a seed's numbers.
    low: the arm that shall have less.
    high: the arm that shall have more.
    quantity: of what.
    cut: where.

  Returns:
    The difference; negative where the claim holds.

  Example:
    >>> value({"a at x": {"loss": 1.0}, "b at x": {"loss": 3.0}}, "a", "b", "loss", "x")
    -2.0
  """
  return found[f"{low} at {cut}"][quantity] - found[f"{high} at {cut}"][quantity]


def verdicts(runs: Sequence[Numbers], claims: Sequence[Any]) -> list[tuple[str, str, list[float]]]:
  """Judge claims by all seeds.

  Args:
    runs: each seed's numbers.
    claims: (text, arm that shall have less, arm that shall have more, quantity, cuts).

  Returns:
    (text and cut, verdict, a value for each seed), a claim and cut.

  Example:
    >>> runs = [{"a at x": {"loss": 1.0}, "b at x": {"loss": 3.0}}]
    >>> verdicts(runs, [("a: better", "a", "b", "loss", ("x",))])
    [('a: better, x', 'reproduced', [-2.0])]
  """
  out = []
  for text, low, high, quantity, cuts in claims:
    for cut in cuts:
      values = [value(r, low, high, quantity, cut) for r in runs]
      held = "reproduced" if max(values) < 0 else "not reproduced" if min(values) >= 0 else "mixed"
      out.append((f"{text}, {cut}", held, values))
  return out


def show(columns: Sequence[str], rows: Sequence[tuple[Any, ...]], form: str) -> None:
  """Print a table whose last column holds a number for each seed.

  Args:
    columns: headers.
    rows: words, and the numbers.
    form: how a number is written.
  """
  out = table.Table(box=None)
  for column in columns:
    out.add_column(column)
  for *words, values in rows:
    out.add_row(*words, "  ".join(form.format(v) for v in values))
  console.Console(width=150).print(out)


def _calibration(rows: np.ndarray, count: int, batch: int) -> list[np.ndarray]:
  keep = rows[np.linspace(0, len(rows) - 1, count).astype(int), :-1]
  return [keep[i : i + batch] for i in range(0, count, batch)]


@functools.lru_cache(maxsize=4)
def _nll(spec: models.Spec) -> Any:
  return jax.jit(functools.partial(models.nll, spec))
