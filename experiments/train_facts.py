# SPDX-License-Identifier: Apache-2.0
"""Train a network on a world of facts, trace where it recalls them, and compare ways to edit one.

The trained network is kept in the cache folder under a digest of its recipe, as a Hugging Face
directory with its tokenizer, so that a second run edits at once.
"""

import functools
import hashlib
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from treesurgeon import io, models, registry, train
from treesurgeon.core import model as model_lib
from treesurgeon.core import paths
from treesurgeon.edit import requests, tokens, tracing, value
from treesurgeon.evaluate import edits, fact_texts, facts
from treesurgeon.io import cache
from treesurgeon.run import collect
from treesurgeon.train import optimizers

RECIPE = 1  # raised when training changes in a way that the configuration does not show
COLUMNS = ("ES", "PS", "NS", "EM", "PM", "NM", "ES_exact", "PS_exact", "NS_exact", "others",
           "shared", "world", "world_kl", "growth")  # fmt: skip


class Learned(NamedTuple):
  """A world and the network that knows it."""

  world: facts.World
  model: model_lib.Model
  tokenizer: Any


def learn(config: Any, seed: int) -> Learned:
  """Train a network on a world, or load it from the cache.

  Args:
    config: see `configs/facts.py`.
    seed: of the world, the initial parameters and the data.

  Returns:
    The world, the network and its tokenizer.
  """
  world = facts.build(facts.Sizes(**config.world, seed=seed))
  tokenizer = facts.tokenizer(world)
  spec = facts.spec(world, **config.model)
  recipe = {k: dict(config[k]) for k in ("world", "model", "train")}
  text = json.dumps({**recipe, "seed": seed, "version": RECIPE}, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:16]
  folder = pathlib.Path(config.cache or cache.folder() / "facts") / name
  if (folder / "config.json").is_file():
    return Learned(world, io.load(folder), tokenizer)
  t = config.train
  data = fact_texts.batches(
    world, rows=t.rows, length=config.model.length, seed=1, object_weight=t.object_weight
  )
  start = models.init(spec, jax.random.key(seed), jnp.float32)
  settings = {"lr": t.lr, "warmup": t.warmup, "final": 0.05, "weight_decay": 0.01, "b2": 0.98}
  optimizer = optimizers.build(**settings, steps=t.steps)
  began = time.process_time()
  trained = train.fit(
    model_lib.Model(spec, start), data, steps=t.steps, optimizer=optimizer, seed=seed,
    label="facts",
  ).replace(aux={})  # fmt: skip
  logging.info("seed %d: trained in %.0f CPU seconds", seed, time.process_time() - began)
  with tempfile.TemporaryDirectory() as scratch:
    tokenizer.save(str(pathlib.Path(scratch) / "tokenizer.json"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    io.save(trained, folder, tokenizer_from=scratch, overwrite=True)
  return Learned(world, trained, tokenizer)


def recall(learned: Learned, *, shown: bool) -> float:
  """Measure the share of facts that the network answers exactly.

  Args:
    learned: from `learn`.
    shown: asked in templates it saw the fact in, or in others.

  Returns:
    A share.
  """
  questions = list(zip(*fact_texts.cloze(learned.world, shown=shown), strict=True))
  return float(edits.ask(learned.model, questions, learned.tokenizer).exact.mean())


def effects(learned: Learned, count: int = 16) -> tuple[np.ndarray, np.ndarray]:
  """Trace facts causally.

  Args:
    learned: from `learn`.
    count: how many facts.

  Returns:
    Restored probability by layer, at the subject's last token and at the prompt's.
  """
  rows = []
  for r in fact_texts.edits(learned.world, min(count, learned.world.sizes.subjects), seed=1):
    made = requests.tokenize(r, learned.tokenizer)
    rows.append((made.prompt, tokens.encode(learned.tokenizer, r.target_true)))
  model = learned.model
  out = tracing.trace(model.spec, model.params, tokens.statements(rows), jax.random.key(0))
  subject, last = out.effect()
  return np.asarray(subject), np.asarray(last)


def compare(learned: Learned, config: Any) -> dict[str, dict[str, float]]:
  """Edit one fact at a time by each method, always from the original.

  Args:
    learned: from `learn`.
    config: see `configs/facts.py`.

  Returns:
    Method to mean scores, see `evaluate.edits.score`; "unedited" comes first.
  """
  world, model, tokenizer = learned
  original = edits.record(model, *fact_texts.cloze(world, shown=False), tokenizer)
  wanted = fact_texts.edits(world, config.edits)
  rows = fact_texts.batches(
    world, rows=config.calibration_rows // 8, length=config.model.length, seed=2
  )
  text = [next(rows)["tokens"] for _ in range(8)]
  asked = [requests.tokenize(r, tokenizer, separator=facts.STOP) for r in wanted]
  out = {"unedited": [edits.score(model, r, original, tokenizer) for r in wanted]}
  for name, expression in config.methods.items():
    (one,) = registry.parse(expression.format(layer=config.layer))
    evidence = collect.evidence(one, model, collect.Materials(batches=text, requests=asked))
    out[name] = []
    for i, r in enumerate(wanted):
      changed = one.apply(model, {**evidence, "requests": [asked[i]]}, jax.random.key(i))
      out[name].append(edits.score(changed, r, original, tokenizer))
  out["fine-tuning"] = []
  for r, ids in zip(wanted, asked, strict=True):
    changed = fine_tune(model, ids, config.layer, **config.fine_tuning)
    out["fine-tuning"].append(edits.score(changed, r, original, tokenizer))
  return {name: edits.summarize(scores) for name, scores in out.items()}


def fine_tune(
  model: model_lib.Model, request: tokens.Tokenized, layer: int, *, lr: float, steps: int
) -> model_lib.Model:
  """Fit the matrix that ROME changes to one statement by Adam: the paper's baseline FT.

  Args:
    model: the model; not modified.
    request: what to write.
    layer: whose output matrix.
    lr: learning rate.
    steps: at most so many; it ends when the loss falls below 0.05 nats.

  Returns:
    The changed model.
  """
  address = f"layers/{layer}/mlp/down/kernel"
  # One length for all requests: each other one would compile again.
  length = model.spec.max_positions
  rows = tokens.statements([(request.prompt, request.new)], before=request.lead, length=length)
  w = _descend(model.spec, model.params, rows, address=address, lr=lr, steps=steps)
  return model.update({address: w})


@functools.partial(jax.jit, static_argnames=("spec", "address", "lr", "steps"))
def _descend(
  spec: models.Spec,
  params: Mapping[str, Any],
  rows: tokens.Statements,
  *,
  address: str,
  lr: float,
  steps: int,
) -> jax.Array:
  optimizer = optax.adam(lr)

  def loss(w: jax.Array) -> jax.Array:
    return value.attained(spec, paths.update(params, {address: w}), rows)

  def body(state: tuple) -> tuple:
    w, memory, i, _ = state
    nll, g = jax.value_and_grad(loss)(w)
    change, memory = optimizer.update(g, memory)
    return jnp.where(nll < 0.05, w, w + change), memory, i + 1, nll

  def going(state: tuple) -> jax.Array:
    return (state[2] < steps) & (state[3] >= 0.05)

  w = paths.get(params, address)
  return jax.lax.while_loop(going, body, (w, optimizer.init(w), 0, jnp.float32(jnp.inf)))[0]


def table(results: Mapping[str, Mapping[str, float]]) -> str:
  """Lay scores out as text.

  Args:
    results: method to scores.

  Returns:
    One line a method.

  Example:
    >>> print(table({"a": {"ES": 1.0}}).splitlines()[1])
    a             1.000
  """
  names = [c for c in COLUMNS if any(c in r for r in results.values())]
  lines = [" " * 12 + "".join(f"{n:>9}" for n in names)]
  for method, scores in results.items():
    lines.append(f"{method:<12}" + "".join(f"{scores.get(n, np.nan):9.3f}" for n in names))
  return "\n".join(x.rstrip() for x in lines)


def main(argv: list[str]) -> None:
  """Train, trace, edit, print."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  config = flags.FLAGS.config
  logging.info("%s", config)
  everything = {}
  for seed in config.seeds:
    learned = learn(config, seed)
    shown, unseen = recall(learned, shown=True), recall(learned, shown=False)
    subject, last = effects(learned)
    print(f"seed {seed}: {learned.model.size():,} parameters, recall {shown:.3f} seen templates, "
          f"{unseen:.3f} unseen")  # fmt: skip
    print(f"  tracing, by layer: subject's last token {np.round(subject, 2)}, "
          f"last token {np.round(last, 2)}")  # fmt: skip
    if subject.max() < tracing.EDITABLE:
      print(f"  warning: below {tracing.EDITABLE}, edits should not be expected to hold")
    scores = compare(learned, config)
    print(table(scores), flush=True)
    everything[seed] = {"seen": shown, "unseen": unseen, "subject": subject.tolist(),
                        "last": last.tolist(), "scores": scores}  # fmt: skip
  methods = next(iter(everything.values()))["scores"]
  mean = {m: edits.summarize(e["scores"][m] for e in everything.values()) for m in methods}
  print(f"mean over {len(everything)} seeds\n{table(mean)}")
  if flags.FLAGS.workdir:
    path = pathlib.Path(flags.FLAGS.workdir) / "facts.json"
    cache.write(path, json.dumps({"seeds": everything, "mean": mean}, indent=1))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Experiment.", lock_config=True)
  flags.DEFINE_string("workdir", "", "Where to write facts.json; empty writes nothing.")
  flags.mark_flag_as_required("config")
  app.run(main)
