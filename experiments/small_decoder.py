# SPDX-License-Identifier: Apache-2.0
"""A byte-level decoder of prose and code to compress, and the verdicts on what is claimed of it."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import console, table

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.train import loop, tasks

TEXTS = ("prose", "code")  # the general one first
Numbers = dict[str, dict[str, float]]  # arm, or "arm at cut" -> quantity -> value


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


def study(
  measure: Callable[[Mapping[str, Any], int], Numbers],
  config: Mapping[str, Any],
  workdir: pathlib.Path,
) -> None:
  """Measure every seed, then print and keep numbers and verdicts.

  Args:
    measure: config and seed -> numbers.
    config: "seeds", "claims" (see `verdicts`), and what `measure` reads.
    workdir: where `results.json` and `claims.json` go.
  """
  runs = []
  for seed in config["seeds"]:
    runs.append(measure(config, seed))
    (workdir / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
  rows = [(arm, q, [r[arm][q] for r in runs]) for arm, found in runs[0].items() for q in found]
  show(("arm", "", "by seed"), rows, "{:.4f}")
  told = verdicts(runs, config["claims"])
  show(("claim", "verdict", "by seed (below 0 holds)"), told, "{:+.4f}")
  (workdir / "claims.json").write_text(json.dumps(told, indent=1) + "\n")


def verdicts(runs: Sequence[Numbers], claims: Sequence[Any]) -> list[tuple[str, str, list[float]]]:
  """Judge claims by all seeds: each is a difference that is negative where it holds.

  Args:
    runs: each seed's numbers.
    claims: (text, arm that shall have less, arm that shall have more), of the loss; or these,
      of which quantity, and at which cuts.

  Returns:
    (text and cut, verdict, a value for each seed), a claim and cut.

  Example:
    >>> runs = [{"a at x": {"loss": 1.0}, "b at x": {"loss": 3.0}}]
    >>> verdicts(runs, [("a: better", "a", "b", "loss", ("x",))])
    [('a: better, x', 'reproduced', [-2.0])]
    >>> verdicts([{"a": {"loss": 1.0}, "b": {"loss": 0.5}}], [("a: better", "a", "b")])
    [('a: better', 'not reproduced', [0.5])]
  """
  out = []
  for text, low, high, *more in claims:
    quantity, cuts = more or ("loss", ("",))
    for cut in cuts:
      less, most = (f"{arm} at {cut}" if cut else arm for arm in (low, high))
      values = [r[less][quantity] - r[most][quantity] for r in runs]
      held = "reproduced" if max(values) < 0 else "not reproduced" if min(values) >= 0 else "mixed"
      out.append((f"{text}, {cut}" if cut else text, held, values))
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
