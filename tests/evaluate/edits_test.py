# SPDX-License-Identifier: Apache-2.0
"""Scores of edits against hand-computed ones, on a network whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.edit import requests
from treesurgeon.evaluate import edits, fact_texts, facts

WORLD = facts.build(facts.Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
TOKENIZER = facts.tokenizer(WORLD)


@pytest.fixture(scope="module")
def model():
  spec = facts.spec(WORLD, d_model=16, num_layers=3, num_heads=2)
  params = models.init(spec, jax.random.key(0), jnp.float32)
  return model_lib.Model(spec, jax.tree.map(lambda x: 3 * x, params))


def test_nothing_changed_scores_nothing(model):
  original = edits.record(model, *fact_texts.cloze(WORLD), TOKENIZER)
  out = edits.score(model, fact_texts.edits(WORLD, 1)[0], original, TOKENIZER)
  assert out["world_kl"] == pytest.approx(0, abs=1e-6)
  assert out["growth"] == 1
  assert out["EM"] == pytest.approx(-out["NM"], abs=1) and -1 <= out["PM"] <= 1


def test_scores_equal_brute_force(model):
  request = fact_texts.edits(WORLD, 1)[0]
  original = edits.record(model, *fact_texts.cloze(WORLD), TOKENIZER)
  noisy = model.replace(params=jax.tree.map(lambda x: 1.3 * x, model.params))
  out = edits.score(noisy, request, original, TOKENIZER)

  def logp(m, text):
    ids = jnp.asarray([TOKENIZER.encode(text).ids])
    return np.asarray(jax.nn.log_softmax(models.forward(m.spec, m.params, ids).logits[0, -1]))

  new, true = (TOKENIZER.token_to_id(t) for t in (request.target_new, request.target_true))
  p = np.stack([logp(noisy, t) for t in request.paraphrases])
  assert out["PS"] == pytest.approx((p[:, new] > p[:, true]).mean())
  assert out["PM"] == pytest.approx((np.exp(p[:, new]) - np.exp(p[:, true])).mean(), abs=1e-6)
  n = np.stack([logp(noisy, t) for t in request.neighbours])
  assert out["NS"] == pytest.approx((n[:, true] > n[:, new]).mean())
  assert out["NS_exact"] == pytest.approx((n.argmax(-1) == true).mean())
  prompts, answers = fact_texts.cloze(WORLD)
  before = np.stack([logp(model, t) for t in prompts])
  after = np.stack([logp(noisy, t) for t in prompts])
  kl = (np.exp(before) * (before - after)).sum(-1).mean()
  assert out["world_kl"] == pytest.approx(kl, rel=1e-3)
  right = [TOKENIZER.token_to_id(a) for a in answers]
  assert out["world"] == pytest.approx((after.argmax(-1) == right).mean())
  assert out["growth"] == pytest.approx(1.3, rel=1e-5)


def test_objects_of_several_tokens_are_scored_by_the_token(model):
  said = edits.ask(model, [("first0 last0 is", "a job0"), ("first0 last0", "is")], TOKENIZER)
  ids = [TOKENIZER.token_to_id(w) for w in "first0 last0 is a job0".split()]
  logits = models.forward(model.spec, model.params, jnp.asarray([ids])).logits[0]
  logp = np.asarray(jax.nn.log_softmax(logits))
  assert said.nll[0] == pytest.approx(-(logp[2, ids[3]] + logp[3, ids[4]]) / 2, rel=1e-4)
  assert said.nll[1] == pytest.approx(-logp[1, ids[2]], rel=1e-4)


def test_the_harmonic_mean_is_zero_with_any_part():
  assert edits.summarize([{"S": 0.0}, {"S": 1.0, "NS": 0.5}]) == {"S": 0.5, "NS": 0.5}


def test_a_request_without_the_true_object_is_refused(model):
  original = edits.record(model, *fact_texts.cloze(WORLD), TOKENIZER)
  request = dataclasses.replace(fact_texts.edits(WORLD, 1)[0], target_true="")
  with pytest.raises(ValueError, match="has no target_true"):
    edits.score(model, request, original, TOKENIZER)
  assert isinstance(request, requests.EditRequest)
