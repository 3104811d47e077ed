# SPDX-License-Identifier: Apache-2.0
"""Cut a small language model's shape and rank by every method, and test what is claimed of each.

python -P -m treesurgeon.experiments.structure_directions --config=configs/structure.py \
  --workdir=DIR
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from treesurgeon import models, registry
from treesurgeon.compress import residual
from treesurgeon.core import model as model_lib
from treesurgeon.core import programs
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop, tasks

TEXTS = ("prose", "code")
DRAWS = 3  # of what is chosen at random; their mean counts


def main(argv: list[str]) -> None:
  """Run every seed, then print and keep numbers and verdicts.

  Args:
    argv: no positional arguments.
  """
  del argv
  logging.set_verbosity(logging.WARNING)
  config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  runs = []
  for seed in config.seeds:
    runs.append(measure(config.to_dict(), seed))
    (workdir / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
  told = {text: verdict([r[low] - r[high] for r in runs]) for text, low, high in config.claims}
  for text, (held, values) in told.items():
    print(f"{text}: {'  '.join(f'{v:+.4f}' for v in values)}  {held}")
  (workdir / "claims.json").write_text(json.dumps(told, indent=1) + "\n")


def verdict(values: Sequence[float]) -> tuple[str, list[float]]:
  """Judge a claim.

  Args:
    values: one a seed, negative where it holds.

  Returns:
    (verdict, values).

  Example:
    >>> verdict([-1.0, 2.0])
    ('mixed', [-1.0, 2.0])
  """
  held = "reproduced" if max(values) < 0 else "not reproduced" if min(values) >= 0 else "mixed"
  return held, list(values)


def measure(config: Mapping[str, Any], seed: int) -> dict[str, float]:
  """Train a model and make it smaller in every way.

  Args:
    config: see `configs/structure.py`.
    seed: of everything random.

  Returns:
    Mean loss over both texts by arm, in nats a byte.
  """
  length, batch = config["length"], config["batch"]
  named = {t: tasks.build(t, length=length, items=config["test"], seed=seed) for t in TEXTS}
  spec = models.Spec(vocab_size=tasks.VOCABULARY, max_positions=length, **config["spec"])
  dense = model_lib.Model(spec, models.init(spec, jax.random.key(seed)))
  feed = tasks.batches({t: (task, 1.0) for t, task in named.items()}, batch=batch, seed=seed)
  optimizer = {"lr": config["rate"], "warmup": config["steps"] // 10}
  done = loop.fit(dense, feed, steps=config["steps"], optimizer=optimizer, log_every=100)
  dense = model_lib.Model(spec, done.params)
  learn = list(itertools.islice(feed, config["tune"]))
  given = [b["tokens"][:, :-1] for b in itertools.islice(feed, config["calibration"])]
  tests = [t.test for t in named.values()]
  out = {"dense": _loss(dense, tests)}
  for arm, expressions in config["arms"]:
    made = dense
    for text in expressions:
      trains = "steps=" in text
      materials = collect.Materials(batches=learn if trains else given, donors=[dense])
      go = drivers.run if trains else drivers.run_blockwise
      made = go(registry.parse(text), made, materials, seed=seed)
    out[arm] = _loss(made, tests)
    print(f"seed {seed}: {arm}: {out[arm]:.4f}", flush=True)
  rng = np.random.default_rng(seed)
  for arm, how, count in config["controls"]:
    make = random_layers if how == "layers" else random_slice
    out[arm] = float(np.mean([_loss(make(dense, count, rng), tests) for _ in range(DRAWS)]))
    print(f"seed {seed}: {arm}: {out[arm]:.4f}", flush=True)
  return out


def random_layers(m: model_lib.Model, drop: int, rng: np.random.Generator) -> model_lib.Model:
  """Drop layers at random: the control of depth.

  Args:
    m: the model.
    drop: how many.
    rng: chooses them.

  Returns:
    The model without them.
  """
  gone = rng.choice(m.spec.num_layers, size=drop, replace=False).tolist()
  return drivers.run(registry.load("compress.prune.layer_drop")(layers=tuple(gone)), m)


def random_slice(m: model_lib.Model, width: int, rng: np.random.Generator) -> model_lib.Model:
  """Turn the residual stream at random and cut it: the control of width.

  Args:
    m: the model.
    width: channels that stay.
    rng: draws the turn.

  Returns:
    The narrower model, its norms dividing over the channels that stay.
  """
  q = np.linalg.qr(rng.normal(size=(m.spec.d_model, m.spec.d_model)))[0][:, :width]
  return residual.rotate(m, jnp.asarray(q, jnp.float32))


def _loss(m: model_lib.Model, tests: Sequence[Mapping[str, np.ndarray]]) -> float:
  nll = programs.compiled(_nll, (("spec", m.spec),))
  return float(np.mean([nll(m.params, {"batch": dict(rows)}) for rows in tests]))


def _nll(params: Any, batch: Any, *, spec: models.Spec) -> jax.Array:
  return models.nll(spec, params, batch)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("workdir", None, "Where to keep numbers and verdicts.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
