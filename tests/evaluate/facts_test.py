# SPDX-License-Identifier: Apache-2.0
"""The world of facts: balanced, reproducible, and with everything an edit is judged by."""

import itertools

import numpy as np
import pytest

from treesurgeon import io, models
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import fact_texts, facts

SIZES = facts.Sizes(subjects=24, first=6, last=12, relations=3, objects=6, shown=5)


@pytest.fixture(scope="module")
def world():
  return facts.build(SIZES)


def test_equal_sizes_give_equal_worlds(world):
  again = facts.build(SIZES)
  for name in ("names", "facts", "shown"):
    assert np.array_equal(getattr(world, name), getattr(again, name))
  other = facts.build(facts.Sizes(**{**vars(SIZES), "seed": 1}))
  assert not np.array_equal(world.facts, other.facts)


def test_names_are_distinct_and_shared(world):
  assert len({tuple(n) for n in world.names}) == 24
  assert np.bincount(world.names[:, 1]).tolist() == [2] * 12
  assert np.array_equal(world.shown.sum(axis=-1), np.full((24, 3), 5))
  for r in range(4):
    assert np.bincount(world.facts[:, r]).tolist() == [4] * 6


@pytest.mark.parametrize("last", [24, 64])
def test_worlds_of_the_experiment_have_distinct_subjects(last):
  first, count = (24, 256) if last == 24 else (16, 128)
  world = facts.build(facts.Sizes(subjects=count, first=first, last=last))
  assert len({tuple(n) for n in world.names}) == count


def test_no_batch_shows_an_unseen_statement(world):
  ids = {w: i for i, w in enumerate(world.vocabulary)}
  prompts, answers = fact_texts.cloze(world, shown=False)
  hidden = {
    tuple(ids[w] for w in f"{p} {a}".split()) for p, a in zip(prompts, answers, strict=True)
  }
  stop = ids[facts.STOP]
  seen = set()
  for batch in itertools.islice(fact_texts.batches(world, rows=16, length=32, seed=0), 20):
    for row in batch["tokens"]:
      cuts = [-1, *np.flatnonzero(row == stop)]
      seen |= {tuple(row[a + 1 : b]) for a, b in itertools.pairwise(cuts)}
  assert len(seen) > 100
  assert not seen & hidden


def test_objects_weigh_more(world):
  batch = next(fact_texts.batches(world, rows=4, length=20, seed=0, object_weight=7.0))
  objects = np.array([w.startswith(("object", "job")) for w in world.vocabulary])
  expected = np.where(objects[batch["tokens"][:, 1:]], 7.0, 1.0)
  assert np.array_equal(batch["weights"], expected)


def test_requests_are_true_to_the_world(world):
  made = fact_texts.edits(world, 10)
  assert len({r.subject for r in made}) == 10
  said = dict(zip(*fact_texts.cloze(world), strict=True))
  for r in made:
    kind, new = r.target_new.rsplit("_", 1)
    old_kind, old = r.target_true.rsplit("_", 1)
    assert (kind, new) != (old_kind, old)
    assert kind == old_kind
    assert len(r.paraphrases) == 7
    assert len(r.neighbours) == 3
    assert len(r.others) == 3
    assert r.shared
    assert all(r.subject not in p for p, _ in r.shared)
    for prompt, answer in (*r.others, *r.shared):
      assert said.get(prompt, answer) == answer


def test_the_tokenizer_covers_every_text_and_comes_back_from_a_file(world, tmp_path):
  tokenizer = facts.tokenizer(world)
  path = tmp_path / "tokenizer.json"
  tokenizer.save(str(path))
  spec = facts.spec(world, d_model=8, num_layers=3, num_heads=1)
  assert spec.vocab_size % 8 == 0
  out = io.save(
    model_lib.Model(spec, models.init(spec, __import__("jax").random.key(0))),
    tmp_path / "m", tokenizer_from=tmp_path,
  )  # fmt: skip
  assert io.load(out).spec == spec
  from treesurgeon.io import tokenizer as io_tokenizer

  again = io_tokenizer.load(out)
  for text in fact_texts.cloze(world)[0]:
    ids = again.encode(text)
    assert tokenizer.token_to_id(facts.UNKNOWN) not in ids
    assert ids.tolist() == tokenizer.encode(text).ids


def test_mistakes_are_named(world):
  with pytest.raises(ValueError, match="99 subjects need as many pairs of names; .* give 16"):
    facts.build(facts.Sizes(subjects=99, first=4, last=4))
  with pytest.raises(ValueError, match=r"shown=8 must be in \[1, 7\]"):
    facts.build(facts.Sizes(shown=8))
  with pytest.raises(ValueError, match="count=25 edits of distinct subjects; the world has 24"):
    fact_texts.edits(world, 25)
