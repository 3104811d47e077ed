# SPDX-License-Identifier: Apache-2.0
"""The search: finds optima, keeps the incumbent, repeats and resumes exactly."""

import json

import numpy as np
import pytest

from treesurgeon.merge import search


def bowl(x):
  return float(np.sum((x - np.array([0.2, -0.5, 3.0])) ** 2))


BOX = {"start": [0.0, 0.0, 1.0], "low": [-1.0, -1.0, 0.0], "high": [1.0, 1.0, 4.0]}


def test_finds_the_least_of_a_bowl():
  found = search.minimize(bowl, **BOX, budget=300, seed=1)
  np.testing.assert_allclose(found.x, [0.2, -0.5, 3.0], atol=0.02)
  assert found.value == min(found.values) and found.values[0] == bowl(np.array(BOX["start"]))
  assert len(found.values) <= 300


def test_one_number_and_a_fixed_one():
  found = search.minimize(lambda x: abs(x[0] - 0.25), start=[0.9], low=[0], high=[1], budget=80)
  assert abs(found.x[0] - 0.25) < 0.02
  found = search.minimize(
    lambda x: abs(x[0] - 0.25), start=[0.9, 2.0], low=[0, 2], high=[1, 2], budget=80
  )
  assert abs(found.x[0] - 0.25) < 0.05
  assert found.x[1] == 2.0


def test_the_start_is_never_lost():
  values = iter([1.0, *range(2, 100)])
  found = search.minimize(lambda x: next(values), **BOX, budget=20)
  assert found.value == 1.0
  np.testing.assert_array_equal(found.x, BOX["start"])
  found = search.minimize(lambda x: float("nan"), **BOX, budget=5)
  assert found.value == np.inf
  np.testing.assert_array_equal(found.x, BOX["start"])


def test_the_seed_decides():
  a, b, c = (search.minimize(bowl, **BOX, budget=30, seed=s).values for s in (1, 1, 2))
  assert a == b
  assert a != c


def test_a_search_broken_off_goes_on(tmp_path):
  path = tmp_path / "trials.jsonl"
  whole = search.minimize(bowl, **BOX, budget=30)
  calls = []

  def stopping(x):
    calls.append(x)
    if len(calls) == 12:
      raise KeyboardInterrupt
    return bowl(x)

  with pytest.raises(KeyboardInterrupt):
    search.minimize(stopping, **BOX, budget=30, history=path)
  path.write_text(path.read_text() + '{"trial": 11, "x": [0.')  # killed while writing
  count = len(calls)
  again = search.minimize(stopping, **BOX, budget=30, history=path)
  assert again.values == whole.values
  assert len(calls) - count == 30 - 11
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [x["trial"] for x in lines] == list(range(30))
  with pytest.raises(ValueError, match=r"trials.jsonl'?: trial 1 is another point"):
    search.minimize(bowl, **BOX, budget=30, history=path, seed=9)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="coordinate 2 starts at 9.0, outside 0.0 to 4.0"):
    search.minimize(bowl, **{**BOX, "start": [0.0, 0.0, 9.0]}, budget=3)
  with pytest.raises(ValueError, match="have 3, 2 and 3 numbers"):
    search.minimize(bowl, **{**BOX, "low": [0.0, 0.0]}, budget=3)
  with pytest.raises(ValueError, match="budget=0 must be at least 1"):
    search.minimize(bowl, **BOX, budget=0)
