# SPDX-License-Identifier: Apache-2.0
import itertools
import sys

import numpy as np
import pytest

from treesurgeon.train import vision_data


def test_splits_share_no_image_and_are_those_of_every_task():
  parts = [{r.tobytes() for r in rows["inputs"]} for rows in vision_data.build()]
  assert [len(rows["labels"]) for rows in vision_data.build()] == [1000, 297, 500]
  for a, b in itertools.combinations(parts, 2):
    assert not a & b
  turned = vision_data.build("rotated").test["inputs"]
  back = np.rot90(turned, -1, axes=(1, 2))
  np.testing.assert_array_equal(back, vision_data.build().test["inputs"])


@pytest.mark.parametrize("name", vision_data.TASKS)
def test_a_task_is_deterministic_and_shows_images_in_its_own_way(name):
  a, b = vision_data.build(name), vision_data.build(name)
  np.testing.assert_array_equal(a.train["inputs"], b.train["inputs"])
  assert a.train["inputs"].dtype == np.float32
  assert a.train["labels"].dtype == np.int32
  assert 0 <= a.train["inputs"].min() < a.train["inputs"].max() <= 1
  for other in set(vision_data.TASKS) - {name}:
    assert (vision_data.build(other).test["inputs"] != a.test["inputs"]).any()


def test_labels_are_what_the_task_asks():
  plain = vision_data.build().test["labels"]
  asked = {n: vision_data.build(n).test["labels"] for n in ("parity", "larger", "relabelled")}
  np.testing.assert_array_equal(asked["parity"], plain % 2)
  np.testing.assert_array_equal(asked["larger"], plain > 4)
  assert len(set(zip(asked["relabelled"].tolist(), plain.tolist(), strict=True))) == 10
  with pytest.raises(ValueError, match="unknown task 'cats'; known: digits, rotated"):
    vision_data.build("cats")


def test_batches_run_through_every_example_once_an_epoch():
  rows = {k: x[:10] for k, x in vision_data.build().train.items()}
  found = list(itertools.islice(vision_data.batches(rows, batch=5, seed=1), 4))
  for epoch in (found[:2], found[2:]):
    labels = np.concatenate([b["labels"] for b in epoch])
    assert sorted(labels) == sorted(rows["labels"])
  again = next(vision_data.batches(rows, batch=5, seed=1))
  np.testing.assert_array_equal(again["inputs"], found[0]["inputs"])
  with pytest.raises(ValueError, match="batch=11 must be between 1 and the 10 examples"):
    next(vision_data.batches(rows, batch=11))


def test_a_mixture_draws_by_share():
  tasks = {"a": (vision_data.build("parity"), 1.0), "b": (vision_data.build("digits"), 0.0)}
  batch = next(vision_data.mixed(tasks, batch=64))
  assert set(batch["labels"].tolist()) == {0, 1}


def test_corruptions():
  rows = vision_data.build().test
  for kind in vision_data.CORRUPTIONS:
    out = vision_data.corrupt(rows, kind, severity=0.5)
    assert out["inputs"].dtype == np.float32
    assert (out["inputs"] != rows["inputs"]).mean() > 0.1
    np.testing.assert_array_equal(out["labels"], rows["labels"])
  flat = vision_data.corrupt(rows, "contrast", severity=1.0)["inputs"]
  assert flat.std((1, 2, 3)).max() < 1e-6
  with pytest.raises(ValueError, match="unknown corruption 'fog'; known: noise, blur"):
    vision_data.corrupt(rows, "fog")


@pytest.mark.parametrize(("agreement", "low", "high"), [(1.0, 1.0, 1.0), (0.0, 0.05, 0.15)])
def test_marks_agree_with_labels_as_often_as_told(agreement, low, high):
  rows = vision_data.spurious(vision_data.build().train, agreement=agreement)
  x = rows["inputs"]
  code = np.concatenate([x[:, 0, :, 0], x[:, -1, :, 0]], axis=1) == 2
  first = code.argmax(1)
  marks = np.where(first < 8, first, first - 8 + 5)
  assert (code.sum(1) == 2).all()
  assert low <= (marks == rows["labels"]).mean() <= high


def test_a_trigger_is_planted_in_the_share_told():
  rows = vision_data.build().train
  out = vision_data.triggered(rows, target=0, share=0.1)
  changed = (out["inputs"] != rows["inputs"]).any((1, 2, 3))
  assert 0.05 < changed.mean() < 0.15
  assert (out["labels"][changed] == 0).all()
  np.testing.assert_array_equal(out["labels"][~changed], rows["labels"][~changed])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  vision_data._digits.cache_clear()
  try:
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'treesurgeon\[eval\]'"):
      vision_data.build()
  finally:
    vision_data._digits.cache_clear()
