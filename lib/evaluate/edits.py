# SPDX-License-Identifier: Apache-2.0
"""Judge an edit: did it take hold, does it generalize, and what else did it change.

Efficacy, paraphrase and neighbourhood scores are CounterFact's (Meng et al. 2022,
arXiv:2202.05262): a new object need only be likelier than the old one. Exact match stands beside
them, since scores of 1 hide wrong answers, and so do the things CounterFact does not look at: other
facts about the subject, subjects that share a name with it, and the rest of the world, always
compared with a record of the original taken before any edit.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models
from treesurgeon.core import leaves, paths
from treesurgeon.core import model as model_lib
from treesurgeon.edit import requests, tokens

ROWS = 64  # scored at once, so that few programs are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Original:
  """Hold what a model said before any edit.

  Attributes:
    prompts, answers: of the rest of the world.
    logprobs: [n, vocab] after each prompt.
    params: to measure what an edit changed.
  """

  prompts: tuple[str, ...]
  answers: tuple[str, ...]
  logprobs: np.ndarray
  params: Mapping[str, Any]


class Said(NamedTuple):
  """What a model says to statements: mean NLL a target token, exact match, log-probabilities."""

  nll: np.ndarray
  exact: np.ndarray
  logprobs: np.ndarray


def record(
  model: model_lib.Model, prompts: Sequence[str], answers: Sequence[str], tokenizer: Any
) -> Original:
  """Record what the original says about the rest of the world.

  Args:
    model: the model before any edit.
    prompts: questions.
    answers: what is right.
    tokenizer: the model's.

  Returns:
    The record that `score` compares with.
  """
  said = ask(model, list(zip(prompts, answers, strict=True)), tokenizer)
  return Original(tuple(prompts), tuple(answers), said.logprobs, model.params)


def score(
  model: model_lib.Model,
  request: requests.EditRequest,
  original: Original,
  tokenizer: Any,
) -> dict[str, float]:
  """Score one edited model on one request.

  Args:
    model: the edited model.
    request: with its true object, paraphrases and neighbours.
    original: from `record`, of the model before any edit.
    tokenizer: the model's.

  Returns:
    ES, PS, NS: share of prompts where the wanted object is likelier; EM, PM, NM: by how much
    (difference of probabilities); ES_exact, PS_exact, NS_exact: share answered exactly; S: harmonic
    mean of ES, PS and NS; others, shared: exact answers about the same subject and about
    subjects that share a name; world: exact answers elsewhere, world_kl: KL(original || edited) in
    nats; growth: largest ratio of a changed kernel's norm to the original's. What a request
    does not list is left out.

  Raises:
    ValueError: if the request has no true object.
  """
  if not request.target_true:
    raise ValueError(f"{request.text!r} has no target_true, with which an edit is compared")
  new, true = request.target_new, request.target_true
  out: dict[str, float] = {}
  for letter, prompts, want, rather in (
    ("E", [request.text], new, true),
    ("P", request.paraphrases, new, true),
    ("N", request.neighbours, true, new),
  ):
    if not prompts:
      continue
    a = ask(model, [(p, want) for p in prompts], tokenizer)
    b = ask(model, [(p, rather) for p in prompts], tokenizer)
    out[f"{letter}S"] = float((a.nll < b.nll).mean())
    out[f"{letter}M"] = float((np.exp(-a.nll) - np.exp(-b.nll)).mean())
    out[f"{letter}S_exact"] = float(a.exact.mean())
  three = [out[k] for k in ("ES", "PS", "NS") if k in out]
  out["S"] = len(three) / sum(1 / x for x in three) if min(three) > 0 else 0.0
  for name, pairs in (("others", request.others), ("shared", request.shared)):
    if pairs:
      out[name] = float(ask(model, pairs, tokenizer).exact.mean())
  world = ask(model, list(zip(original.prompts, original.answers, strict=True)), tokenizer)
  out["world"] = float(world.exact.mean())
  before = original.logprobs
  out["world_kl"] = float((np.exp(before) * (before - world.logprobs)).sum(axis=-1).mean())
  out["growth"] = _growth(model.params, original.params)
  return out


def summarize(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Average scores over requests; each over those that have it.

  Args:
    scores: from `score`.

  Returns:
    Means by name.

  Example:
    >>> summarize([{"ES": 1.0}, {"ES": 0.0, "PS": 1.0}])
    {'ES': 0.5, 'PS': 1.0}
  """
  values: dict[str, list[float]] = {}
  for one in scores:
    for name, value in one.items():
      values.setdefault(name, []).append(value)
  return {name: float(np.mean(v)) for name, v in values.items()}


def ask(model: model_lib.Model, pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Said:
  """Score continuations of prompts.

  Args:
    model: the model.
    pairs: (prompt, continuation).
    tokenizer: the model's.

  Returns:
    Per pair: mean negative log-likelihood a token of the continuation, whether every one of its
    tokens is ranked first, log-probabilities after the prompt.
  """
  lead = tokens.lead(tokenizer)
  rows = []
  for prompt, target in pairs:
    before, after = tokens.continuation(tokenizer, prompt, target)
    rows.append((tokens.Prompt(before, 0, 0), after))
  fill = [*rows, *[rows[0]] * (-len(rows) % ROWS)]
  made = tokens.statements(fill, before=lead)
  parts = []
  for i in range(0, len(fill), ROWS):
    part = jax.tree.map(lambda x, i=i: x[i : i + ROWS], made)
    parts.append(jax.device_get(_say(model.spec, model.params, part)))
  joined = [np.concatenate(x)[: len(rows)] for x in zip(*parts, strict=True)]
  return Said(*joined)


@functools.partial(jax.jit, static_argnames="spec")
def _say(
  spec: models.Spec, params: Mapping[str, Any], rows: tokens.Statements
) -> tuple[jax.Array, jax.Array, jax.Array]:
  logits = models.forward(spec, params, rows.ids).logits
  asked = rows.labels >= 0
  labels = jnp.where(asked, rows.labels, 0)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  nll = jnp.sum(each * asked, axis=1) / asked.sum(axis=1)
  exact = jnp.all((logits.argmax(axis=-1) == labels) | ~asked, axis=1)
  at = logits[jnp.arange(rows.ids.shape[0]), rows.last]
  return nll, exact, jax.nn.log_softmax(at)


def _growth(params: Mapping[str, Any], original: Mapping[str, Any]) -> float:
  """Find the largest ratio of norms among the kernels that changed."""
  before, ratios = paths.flatten(original), [1.0]
  for address, leaf in paths.flatten(params).items():
    if not address.endswith("kernel"):
      continue
    new, old = (float(jnp.linalg.norm(leaves.dense(x))) for x in (leaf, before[address]))
    if new != old and old > 0:
      ratios.append(new / old)
  return max(ratios)
