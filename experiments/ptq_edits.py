# SPDX-License-Identifier: Apache-2.0
"""Does an edit survive compression? One fact is edited, then the network is compressed."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from treesurgeon import registry
from treesurgeon.edit import requests
from treesurgeon.evaluate import edits, fact_texts, facts
from treesurgeon.experiments import train_facts
from treesurgeon.run import collect, drivers

KEPT = ("ES", "PS", "NS", "world")


class Facts:
  """A network that knows a world of facts, and edits of it.

  Attributes:
    settings: "facts", as `configs/facts.py`; "edit", the transform that edits.
    seed: of the world and the network.
  """

  def __init__(self, settings: Mapping[str, Any], seed: int):
    config: Any = ml_collections.ConfigDict(settings["facts"])
    self.learned = train_facts.learn(config, seed)
    world, model, tokenizer = self.learned
    self.original = edits.record(model, *fact_texts.cloze(world, shown=False), tokenizer)
    self.wanted = fact_texts.edits(world, config.edits)
    rows = fact_texts.batches(
      world, rows=config.calibration_rows // 8, length=config.model.length, seed=2
    )
    self.batches = [next(rows)["tokens"] for _ in range(8)]
    asked = [requests.tokenize(r, tokenizer, separator=facts.STOP) for r in self.wanted]
    (one,) = registry.parse(settings["edit"])
    evidence = collect.evidence(one, model, collect.Materials(batches=self.batches, requests=asked))
    self.edited = [
      one.apply(model, {**evidence, "requests": [r]}, jax.random.key(i))
      for i, r in enumerate(asked)
    ]

  def run(self, text: str) -> dict[str, Any]:
    """Compress every edited network.

    Args:
      text: the transform; `chain()` leaves them as they are.

    Returns:
      Under "scores": efficacy, paraphrases, neighbours and the share of all other facts still
      answered, means over the edits; see `evaluate.edits.score`.
    """
    transform = registry.parse(text)
    go = drivers.run_blockwise if any(s.scope == "block" for s in transform) else drivers.run
    found = []
    for model, request in zip(self.edited, self.wanted, strict=True):
      made = go(transform, model, collect.Materials(batches=self.batches))
      found.append(edits.score(made, request, self.original, self.learned.tokenizer))
    scores = edits.summarize(found)
    return {"scores": {k: scores[k] for k in KEPT}}
