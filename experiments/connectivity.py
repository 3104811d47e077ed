# SPDX-License-Identifier: Apache-2.0
"""Train pairs of networks apart, match their units, and test what is claimed of the line between.

python -P -m treesurgeon.experiments.connectivity --config=configs/connectivity.py --workdir=DIR
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax
from rich import console
from rich import table as table_lib

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs
from treesurgeon.evaluate import connectivity
from treesurgeon.experiments import launch
from treesurgeon.train import tasks

Settings = Mapping[str, Any]
Numbers = dict[str, dict[str, float]]  # arm -> quantity -> value
LENGTH = 64  # of a language model's rows


def value(terms: Sequence[tuple[float, str, str, str]], results: Mapping[str, Numbers]) -> float:
  """Evaluate a claim's linear form.

  Args:
    terms: (coefficient, cell, arm, quantity).
    results: cell to arm to quantity to value.

  Returns:
    The sum; negative where the claim holds.

  Example:
    >>> value([(1.0, "mlp", "a", "x"), (-1.0, "mlp", "b", "x")], {"mlp": {"a": {"x": 1.0}, "b":
    ...   {"x": 3.0}}})
    -2.0
  """
  return sum(c * results[cell][arm][quantity] for c, cell, arm, quantity in terms)


def main(config: Settings, workdir: pathlib.Path) -> None:
  """Run every seed's cells, then print and keep numbers and verdicts.

  Args:
    config: see `configs/connectivity.py`.
    workdir: where numbers, plots and verdicts are kept.
  """
  runs = []
  for seed in config["seeds"]:
    results = {}
    for name in config["order"]:
      print(f"\nseed {seed}, {name}", flush=True)
      results[name] = run(config["cells"][name], seed, workdir / f"{name} {seed}.png")
    runs.append(results)
    (workdir / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
  claims = {c: [value(t, r) for r in runs] for c, t in config["claims"]}
  out = table_lib.Table(box=None)
  for column in ("claim", "by seed (below 0 holds)", "verdict"):
    out.add_column(column)
  for claim, values in claims.items():
    verdict = "reproduced" if max(values) < 0 else "not reproduced" if min(values) > 0 else "mixed"
    out.add_row(claim, "  ".join(f"{v:+.4f}" for v in values), verdict)
  console.Console(width=150).print(out)
  (workdir / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")


def run(settings: Settings, seed: int, picture: pathlib.Path) -> Numbers:
  """Train one pair and measure what is asked for; prints a table.

  Args:
    settings: a cell of the config.
    seed: of initial values and orders.
    picture: file of the plot.

  Returns:
    Arm to quantity to value.
  """
  data = _digits if settings["data"] == "digits" else _text
  spec, feeds, test, calibration = data(settings, seed)
  a, b = _pair(spec, feeds, settings, seed)
  out: Numbers = {}
  lines = {"as trained": connectivity.line(spec, a.params, b.params, test,
                                           points=settings["points"])}  # fmt: skip
  for method in settings["methods"]:
    expression = f"merge.rebasin(weights=(0, 1), method={method!r}, steps={settings['ste']})"
    placed = _apply(expression, a, b, calibration, seed)
    found = connectivity.line(spec, a.params, placed.params, test, points=settings["points"])
    lines[method] = found
  for arm, found in lines.items():
    middle = len(found.alphas) // 2
    out[arm] = {
      "barrier": found.barrier,
      "drop": found.drop,
      "distance": found.distance,
      "accuracy": float(found.accuracies[middle]),
      "loss": float(found.losses[middle]),
    }
    out[arm] |= {f"R {g:g}": r for g, r in found.alignment.items()}  # fmt: skip
  print(connectivity.table(lines), flush=True)
  figure = matplotlib.figure.Figure(figsize=(6, 4))
  connectivity.plot(lines, figure.add_subplot())
  figure.savefig(picture, dpi=120)
  if "ratios" in settings:
    out["average"] = {"accuracy": out["as trained"]["accuracy"]}
    ends = lines["as trained"].accuracies[[0, -1]]
    out |= {n: {"accuracy": float(x)} for n, x in zip(("first", "second"), ends, strict=True)}
    for ratio in settings["ratios"]:
      merged = _apply(f"merge.pleas(ratio={ratio})", a, b, calibration, seed)
      out[f"pleas {ratio:g}"] = {"accuracy": _accuracy(merged, test)}
    print("  ".join(f"{n}: {x['accuracy']:.4f}" for n, x in out.items()), flush=True)
  return out


def _pair(
  spec: Any, feeds: Sequence[Callable[[int], Iterator[Any]]], settings: Settings, seed: int
) -> tuple[model_lib.Model, model_lib.Model]:
  """Train two networks, the first steps of both together if they share a base."""
  base, made = None, []
  if settings["branch"]:
    start = models.init(spec, jax.random.key(100 * seed))
    base = _train(spec, start, feeds[0](100 * seed), settings["branch"], settings["rate"])
  for i, feed in enumerate(feeds):
    start = models.init(spec, jax.random.key(100 * seed + i + 1)) if base is None else base
    params = _train(spec, start, feed(100 * seed + i + 1), settings["steps"], settings["rate"])
    made.append(model_lib.Model(spec, params))
  return made[0], made[1]


def _train(spec: Any, params: Any, feed: Iterator[Any], steps: int, rate: float) -> Any:
  optimizer = _optimizer(rate, steps)
  state = optimizer.init(params)
  for _ in range(steps):
    params, state = _update(spec, optimizer, params, state, next(feed))
  return params


@functools.lru_cache
def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(rate, steps))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(spec: Any, optimizer: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
  slope = jax.grad(models.nll, argnums=1)(spec, params, batch)
  change, state = optimizer.update(slope, state)
  return optax.apply_updates(params, change), state


def _apply(
  expression: str, a: model_lib.Model, b: model_lib.Model, batches: list[Any], seed: int
) -> model_lib.Model:
  (one,) = registry.parse(expression)
  evidence = {"donors": needs.Aligned([b]), "batches": batches}
  return one.apply(a, evidence, jax.random.key(seed))


def _accuracy(m: model_lib.Model, test: list[Any]) -> float:
  return float(connectivity.line(m.spec, m.params, m.params, test, points=3).accuracies[0])


def _digits(settings: Settings, seed: int) -> tuple[Any, list[Any], list[Any], list[Any]]:
  """Return (spec, two feeds, test batches, calibration batches) of handwritten digits."""
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ValueError(
      "handwritten digits need scikit-learn: pip install 'treesurgeon[eval]'"
    ) from error
  images, labels = datasets.load_digits(return_X_y=True)
  x, y = (np.asarray(images) / 16.0 - 0.3).astype(np.float32), np.asarray(labels).astype(np.int32)
  order = np.random.default_rng(0).permutation(len(x))  # one split for all seeds
  train, test = order[:1347], order[1347:]
  spec = models.VisionSpec(image_size=8, num_classes=10, **settings["spec"])

  def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": x[rows], "labels": y[rows]}

  def feed(half: int) -> Callable[[int], Iterator[Any]]:
    share = settings.get("split", 0.5)
    chance = np.where((y[train] < 5) == (half == 0), share, 1 - share)

    def draw(seed: int) -> Iterator[Any]:
      rng = np.random.default_rng(seed)
      while True:
        yield batch(rng.choice(train, settings["batch"], p=chance / chance.sum()))

    return draw

  calibration = [batch(rows) for rows in np.split(train[:1280], 10)]
  return spec, [feed(0), feed(1)], [batch(test)], calibration


def _text(settings: Settings, seed: int) -> tuple[Any, list[Any], list[Any], list[Any]]:
  task = tasks.build(settings["data"], length=LENGTH, items=64)
  spec = models.Spec(vocab_size=tasks.VOCABULARY, max_positions=LENGTH, **settings["spec"])

  def feed(seed: int) -> Iterator[Any]:
    return tasks.batches({"one": (task, 1.0)}, batch=settings["batch"], seed=seed)

  draw = feed(seed + 7)
  return spec, [feed, feed], [dict(task.test)], [next(draw) for _ in range(4)]


if __name__ == "__main__":
  launch.run(main)
