# SPDX-License-Identifier: Apache-2.0
"""Small tasks: no leak between splits, answers weighed and nothing else, seeds that repeat."""

import numpy as np
import pytest

from treesurgeon.train import tasks


def text(row):
  return bytes(row[row < 256].astype(np.uint8)).decode(errors="replace")


@pytest.fixture(scope="module", params=sorted(tasks.TASKS))
def made(request):
  return request.param, tasks.build(request.param, length=64, items=32)


def test_shapes_and_ids(made):
  _, task = made
  for rows in (task.train, task.validation, task.test):
    assert rows["tokens"].shape[1] == 65
    assert rows["weights"].shape == (len(rows["tokens"]), 64)
    assert 0 <= rows["tokens"].min()
    assert rows["tokens"].max() <= tasks.EOS
    assert (rows["weights"].sum(1) > 0).any()


def test_splits_do_not_overlap(made):
  name, task = made
  lines = [{text(r) for r in x["tokens"]} for x in (task.train, task.validation, task.test)]
  if task.exact:  # rows of training hold many items
    lines[0] = {f"{x}\n" for r in task.train["tokens"] for x in text(r).split("\n")}
  assert not lines[1] & lines[2]
  if name not in ("weather", "recipes"):  # whose lines of a grammar recur as parts
    assert not lines[0] & lines[2]


def test_only_answers_weigh(made):
  name, task = made
  if not task.exact:
    return
  for row, weight in zip(task.test["tokens"], task.test["weights"], strict=True):
    asked = row[1:][weight > 0].astype(np.uint8).tobytes().decode()
    assert asked.endswith("\n")
    if name == "addition":
      question = text(row)[: -len(asked)]
      a, b = question.rstrip("=").split("+")
      assert int(a) + int(b) == int(asked)
    if name == "sorting":
      letters = text(row).split()[1].rstrip(":")
      assert "".join(sorted(letters)) == asked.strip()


def test_facts_are_asked_in_words_that_were_not_taught():
  task = tasks.build("facts", length=64, items=400)
  taught = "".join(text(r) for r in task.train["tokens"])
  assert all(text(r).strip() not in taught.split("\n") for r in task.test["tokens"])
  again = tasks.build("facts", length=64, items=400)
  np.testing.assert_array_equal(task.test["tokens"], again.test["tokens"])


def test_batches_repeat_by_seed_and_mix():
  pair = {n: (tasks.build(n, length=32, items=4), 1.0) for n in ("sorting", "capitals")}
  a, b, c = (next(tasks.batches(pair, batch=16, seed=s)) for s in (0, 0, 1))
  np.testing.assert_array_equal(a["tokens"], b["tokens"])
  assert (a["tokens"] != c["tokens"]).any()
  both = "".join(text(r) for r in a["tokens"])
  assert "sort" in both
  assert "capitals" in both


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="unknown task 'poetry'; known: code, prose"):
    tasks.build("poetry")
  with pytest.raises(ValueError, match="does not fit rows of 8"):
    tasks.build("sorting", length=8)
