# SPDX-License-Identifier: Apache-2.0
"""Quantize a small language model to two bits and less, and test what is claimed of each method.

python -P -m treesurgeon.experiments.vq_directions --config=configs/vq.py --workdir=DIR
"""

import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich import console, table

from treesurgeon import models, registry
from treesurgeon.compress.quantize import bitstack
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import size
from treesurgeon.models import losses
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop, tasks

TEXTS = ("prose", "code")
Numbers = dict[str, dict[str, float]]  # arm -> "loss" and "bits"


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
  out = table.Table(box=None)
  for column in ("claim", "nats a byte by seed (below 0 holds)", "verdict"):
    out.add_column(column)
  verdicts = []
  for text, low, high in config.claims:
    values = [r[low]["loss"] - r[high]["loss"] for r in runs]
    held = "reproduced" if max(values) < 0 else "not reproduced" if min(values) >= 0 else "mixed"
    verdicts.append((text, values, held))
    out.add_row(text, "  ".join(f"{v:+.4f}" for v in values), held)
  console.Console(width=150).print(out)
  (workdir / "claims.json").write_text(json.dumps(verdicts, indent=1) + "\n")


def measure(config: Mapping[str, Any], seed: int) -> Numbers:
  """Train a model and quantize it in every way.

  Args:
    config: see `configs/vq.py`.
    seed: of everything random.

  Returns:
    For each arm the mean loss over both texts, nats a byte, and bits a compressed weight.
  """
  length, batch = config["length"], config["batch"]
  named = {t: tasks.build(t, length=length, items=config["test"], seed=seed) for t in TEXTS}
  spec = models.Spec(vocab_size=tasks.VOCABULARY, max_positions=length, **config["spec"])
  params = models.init(spec, jax.random.key(seed))
  feed = tasks.batches({t: (task, 1.0) for t, task in named.items()}, batch=batch, seed=seed)
  optimizer = {"lr": config["rate"], "warmup": config["steps"] // 10}
  done = loop.fit(
    model_lib.Model(spec, params), feed, steps=config["steps"], optimizer=optimizer, log_every=100
  )
  m = model_lib.Model(spec, jax.tree.map(lambda x: x.astype(jnp.bfloat16), done.params))
  count = config["calibration"] // 2
  rows = np.concatenate([_spread(t.train["tokens"], count) for t in named.values()])
  texts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
  given = collect.Materials(batches=texts)
  learn = collect.Materials(batches=list(itertools.islice(feed, config["tune"])))
  tests = [dict(t.test) for t in named.values()]
  nll = jax.jit(lambda params, batch: losses.nll(spec, params, batch))
  out: Numbers = {}

  def tell(arm: str, made: model_lib.Model) -> None:
    loss = float(np.mean([nll(made.params, t) for t in tests]))
    out[arm] = {"loss": loss, "bits": size.in_memory(made).compressed_bits_per_weight or 16.0}
    print(f"seed {seed}: {arm}: {loss:.4f} at {out[arm]['bits']:.3f} bits", flush=True)

  tell("dense", m)
  for arm, expression in config["arms"]:
    made = m
    for one in registry.parse(expression):
      if one.scope == "model":
        made = drivers.run((one,), made, learn, seed=seed)
      else:
        made = drivers.run_blockwise((one,), made, given, seed=seed)
    tell(arm, made)
  stacks = registry.parse(
    f"compress.quantize.bitstack(blocks={config['blocks']}, rank=4) + "
    "compress.quantize.bitstack_sort()"
  )
  whole = drivers.run(stacks, m, collect.Materials(batches=texts[:2]), seed=seed)
  sizes = _sizes(whole, config["blocks"])
  for blocks, budget in enumerate(sizes, 1):
    cut = registry.parse(f"compress.quantize.bitstack_cut(budget={budget})")
    tell(f"{blocks} blocks", drivers.run(cut, whole))
  return out


def _sizes(whole: model_lib.Model, blocks: int) -> list[int]:
  """List the bytes of a model with 1, 2, ... blocks in every stack."""
  found = [bitstack.stack(whole.leaf(a)) for a in whole.addresses()]
  levels = [sum(s[i].nbytes for s in found if s) for i in range(blocks)]
  rest = whole.nbytes() - sum(levels)
  return [rest + total for total in itertools.accumulate(levels)]


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
  return rows[np.linspace(0, len(rows) - 1, count).astype(int), :-1]


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("workdir", None, "Where to keep numbers and verdicts.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
