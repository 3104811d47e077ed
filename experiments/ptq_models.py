# SPDX-License-Identifier: Apache-2.0
"""What the quantization study works on: a decoder, an encoder and experts, trained on real text.

All are trained on the Python standard library and kept in the work directory under a digest of
their settings. One compiled function judges them: the loss of every held-out document, and how far
predictions moved from the original's.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.core import paths
from treesurgeon.train import corpus, data, loop, objectives
from treesurgeon.train import tokenizer as bpe

SPECIAL = (bpe.EOS, bpe.MASK)
DOMAINS = corpus.DOMAINS
Settings = Mapping[str, Any]


class Held(NamedTuple):
  """Held-out text as rows of one length.

  Attributes:
    inputs: what the network sees, (rows, length).
    targets: what it should predict.
    weights: 1 where it is asked.
    owners: document of each row.
  """

  inputs: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  owners: np.ndarray


class Judged(NamedTuple):
  """What held-out text says of a network.

  Attributes:
    documents: (total natural-log loss, predictions) of each document.
    kl: mean divergence of its predictions from the original's, in nats.
  """

  documents: list[tuple[float, int]]
  kl: float


class Texts:
  """The corpus, tokenized as the config says."""

  def __init__(self, settings: Settings):
    self.settings = settings
    self.documents = corpus.load()
    self.tokenizer = bpe.cached(self.documents, vocab_size=settings["vocab_size"], special=SPECIAL)
    self.eos, self.mask = (int(self.tokenizer.token_to_id(x) or 0) for x in SPECIAL)

  def rows(self, domain: str) -> np.ndarray:
    """Pack a domain's training documents into rows of length + 1 tokens."""
    texts = [d.text for d in self.documents if d.split == "train" and d.domain == domain]
    return data.rows(texts, self.tokenizer, length=self.settings["length"], eos=self.eos)

  def calibration(self, kind: str, seed: int) -> list[np.ndarray]:
    """Take rows spread over the training text, in eight batches; masked for an encoder."""
    rows = np.concatenate([self.rows(d)[:, :-1] for d in DOMAINS])
    keep = np.linspace(0, len(rows) - 1, self.settings["calibration"]).astype(int)
    seen = rows[keep]
    if kind == "encoder":
      seen = self._masked(seen, seed)[0]
    return np.split(seen, min(8, len(seen)))

  def held_out(self, kind: str) -> Held:
    """Cut validation documents of both domains to one size, and into whole rows."""
    length, size = self.settings["length"], self.settings["document_bytes"]
    texts = []
    for domain in DOMAINS:
      found = [d.text[:size] for d in self.documents if d.split != "train" and d.domain == domain]
      texts += found[: max(2, self.settings["validation_bytes"] // size // len(DOMAINS))]
    width = length + (kind == "decoder")
    pieces, owners = [], []
    for i, ids in enumerate(data.encode(texts, self.tokenizer)):
      whole = (len(ids) - (kind == "decoder")) // length
      pieces += [ids[k * length : k * length + width] for k in range(whole)]
      owners += [i] * whole
    tokens = np.stack(pieces)
    if kind == "decoder":
      ones = np.ones(tokens[:, 1:].shape, np.float32)
      return Held(tokens[:, :-1], tokens[:, 1:], ones, np.array(owners))
    inputs, weights = self._masked(tokens, seed=1)
    return Held(inputs, tokens, weights, np.array(owners))

  def _masked(self, tokens: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    inputs, weights = objectives.mask_tokens(
      keys, jnp.asarray(tokens), mask_id=self.mask, vocab_size=self.settings["vocab_size"]
    )
    return np.asarray(inputs), np.asarray(weights)


def trained(
  workdir: pathlib.Path, config: Settings, texts: Texts, name: str, seed: int
) -> model_lib.Model:
  """Train a network, or read it where that was done before.

  Args:
    workdir: networks are kept in its folder "models".
    config: "models": name to "spec" or "base" (another name), "steps", "batch", "lr", "domains".
    texts: the corpus.
    name: which network.
    seed: of its initialisation and data.

  Returns:
    The network.
  """
  own = config["models"][name]
  recipe = {"own": own, "text": config["text"], "seed": seed}
  if "base" in own:
    recipe["base"] = config["models"][own["base"]]
  told = json.dumps(recipe, sort_keys=True, default=list)
  path = workdir / "models" / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
  settings = own["spec"] if "spec" in own else config["models"][own["base"]]["spec"]
  spec = models.Spec(vocab_size=texts.tokenizer.get_vocab_size(), **settings)
  start = model_lib.Model(spec, models.init(spec, jax.random.key(seed)))
  if path.is_file():
    flat = safetensors.numpy.load_file(path)
    return start.replace(params=paths.nest({k: jnp.asarray(v) for k, v in flat.items()}))
  if "base" in own:
    start = trained(workdir, config, texts, own["base"], seed)
  encoder = spec.kind == "encoder"
  out = loop.fit(
    start,
    data.batches({d: texts.rows(d) for d in own["domains"]}, batch=own["batch"], seed=seed),
    steps=own["steps"],
    optimizer={"lr": own["lr"], "warmup": own["steps"] // 20, "schedule": "cosine"},
    objective=objectives.masked_token(mask_id=texts.mask) if encoder else None,
    seed=seed,
    label=name,
  ).replace(aux={})
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_suffix(".tmp")
  safetensors.numpy.save_file({k: np.asarray(v) for k, v in paths.walk(out.params).items()}, draft)
  os.replace(draft, path)
  return out


def judge(
  model: model_lib.Model, original: model_lib.Model, held: Held, *, batch: int = 32
) -> Judged:
  """Score a network on held-out text, and against the network it was made from.

  Args:
    model: the network; compressed leaves run compressed.
    original: what it was.
    held: the text.
    batch: rows at once.

  Returns:
    Losses by document, and the divergence.
  """
  score = _scorer(model.spec, original.spec)
  count = len(held.owners)
  losses, moved = np.zeros(count), np.zeros(count)
  for at in range(0, count, batch):
    index = np.minimum(np.arange(at, at + batch), count - 1)
    some = [np.asarray(x)[index] for x in held[:3]]
    found = score(model.params, original.params, *some)
    stop = min(at + batch, count)
    losses[at:stop], moved[at:stop] = (np.asarray(x, np.float64)[: stop - at] for x in found)
  asked = held.weights.sum(axis=1)
  documents = [
    (float(losses[held.owners == i].sum()), int(asked[held.owners == i].sum()))
    for i in np.unique(held.owners)
  ]
  return Judged(documents, float(moved.sum() / asked.sum()))


@functools.lru_cache(maxsize=8)
def _scorer(spec: Any, before: Any) -> Any:
  @jax.jit
  def score(
    params: Any, original: Any, inputs: jax.Array, targets: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    logits, old = (
      jax.nn.log_softmax(models.forward(s, p, inputs).logits.astype(jnp.float32))
      for s, p in ((spec, params), (before, original))
    )
    nll = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    kl = (jnp.exp(old) * (old - logits)).sum(-1)
    return (nll * weights).sum(-1), (kl * weights).sum(-1)

  return score


def weighed(documents: Sequence[tuple[float, int]]) -> float:
  """Compute the mean loss of a prediction.

  Args:
    documents: (total, predictions) of each.

  Returns:
    Nats.

  Example:
    >>> weighed([(2.0, 1), (4.0, 2)])
    2.0
  """
  return sum(t for t, _ in documents) / sum(n for _, n in documents)
