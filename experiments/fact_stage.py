# SPDX-License-Identifier: Apache-2.0
"""The stage that teaches a network facts and edits one: what the edit did, and what it broke."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from treesurgeon import registry
from treesurgeon.core import model as model_lib
from treesurgeon.edit import requests
from treesurgeon.evaluate import edits, fact_texts, facts
from treesurgeon.experiments import train_facts
from treesurgeon.run import collect, drivers


def edit(
  folder: pathlib.Path, settings: Mapping[str, Any], seed: int
) -> tuple[model_lib.Model, dict[str, Any]]:
  """Train on a world of facts, compare editors over several facts, and keep one edited model.

  Args:
    folder: where the trained network is kept, with its tokenizer.
    settings: "facts", as in `configs/facts.py`, and "transform", the edit to keep.
    seed: of the world and the network.

  Returns:
    The edited model; its scores by method, recall, tracing, and one fact before and after.
  """
  config = ml_collections.ConfigDict(settings["facts"])
  config.cache = str(folder / "facts")
  learned = train_facts.learn(config, seed)
  subject, last = train_facts.effects(learned)
  request = fact_texts.edits(learned.world, 1)[0]
  rows = fact_texts.batches(
    learned.world, rows=32, length=settings["facts"]["model"]["length"], seed=2
  )
  materials = collect.Materials(
    batches=[next(rows)["tokens"] for _ in range(8)],
    requests=[requests.tokenize(request, learned.tokenizer, separator=facts.STOP)],
  )
  edited = drivers.run(registry.parse(settings["transform"]), learned.model, materials, seed=seed)
  before, after = (_answers(m, request, learned) for m in (learned.model, edited))
  return edited, {
    "edit": train_facts.compare(learned, config),
    "recall": [train_facts.recall(learned, shown=s) for s in (True, False)],
    "tracing": {"subject": subject.tolist(), "last": last.tolist()},
    "example": {"target": request.target_new, "true": request.target_true,
                "before": before, "after": after},
    "tokenizer_from": str(next(pathlib.Path(config.cache).iterdir())),
  }  # fmt: skip


def _answers(model: model_lib.Model, request: Any, learned: train_facts.Learned) -> list[list[str]]:
  """Ask the edited question, a paraphrase and a neighbour: [kind, prompt, answer]."""
  asked = [("edited", request.text)]
  asked += [("paraphrase", p) for p in request.paraphrases[:2]]
  asked += [("neighbour", p) for p in request.neighbours[:2]]
  said = edits.ask(model, [(p, request.target_true) for _, p in asked], learned.tokenizer)
  best = jax.numpy.argmax(said.logprobs, axis=1)
  words = [learned.tokenizer.id_to_token(int(i)) for i in best]
  return [[kind, prompt, word] for (kind, prompt), word in zip(asked, words, strict=True)]
