# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import stats

EXACT = {
  "sum": lambda x: x.sum(0),
  "second_moment": lambda x: x.T @ x,
  "sum_squares": lambda x: (x * x).sum(0),
  "sum_magnitudes": lambda x: np.abs(x).sum(0),
  "absmax": lambda x: np.abs(x).max(0),
}


def arrays(state):
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def fold(name, *batches, numbers=None):
  one = stats.FOLDS[name]
  state = one.init(batches[0].shape[1])
  for i, b in enumerate(batches):
    state = one.update(state, jnp.asarray(b), None if numbers is None else jnp.asarray(numbers[i]))
  return state


def draw(seed, tokens=5, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal((tokens, 3)).astype(dtype)


def test_every_fold_has_an_oracle():
  assert set(stats.FOLDS) == {*EXACT, "range", "samples"}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_is_what_float64_gives(name, dtype):
  x = jnp.asarray(draw(0, 64)).astype(dtype)
  value, count = arrays(fold(name, x))
  assert value.dtype == np.float32 and count == 64
  np.testing.assert_allclose(value, EXACT[name](np.asarray(x, np.float64)), rtol=2e-6)


@pytest.mark.parametrize("name", stats.FOLDS)
def test_an_empty_state_is_neutral(name):
  state = fold(name, draw(0))
  one = stats.FOLDS[name]
  for merged in (one.merge(state, one.init(3)), one.merge(one.init(3), state)):
    for a, b in zip(arrays(merged), arrays(state), strict=True):
      np.testing.assert_array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(stats.FOLDS)), st.permutations(range(4)), st.integers(0, 3))
def test_the_order_and_the_split_of_batches_do_not_matter(name, order, cut):
  # Small integers: their sums are exact, so the laws hold to the bit.
  parts = [np.round(4 * draw(i, 1 + i)) for i in range(4)]
  ends = np.cumsum([len(p) for p in parts])
  tokens = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
  whole = arrays(fold(name, np.concatenate(parts)))
  turned = [parts[i] for i in order]
  numbers = [tokens[i] for i in order]
  merge = stats.FOLDS[name].merge
  states = [fold(name, p, numbers=[n]) for p, n in zip(turned, numbers, strict=True)]
  left, right = states[:cut], states[cut:]
  empty = stats.FOLDS[name].init(3)
  total = merge(
    functools.reduce(merge, left, empty),
    functools.reduce(merge, right, empty),
  )
  for a, b, c in zip(
    whole, arrays(total), arrays(fold(name, *turned, numbers=numbers)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_means_divide_by_the_tokens():
  x = draw(1)
  np.testing.assert_allclose(fold("second_moment", x).mean(), x.T @ x / 5, rtol=1e-6)
  np.testing.assert_allclose(fold("sum_squares", x).mean(), (x * x).mean(0), rtol=1e-6)


@pytest.mark.parametrize("name", stats.FOLDS)
def test_tokens_of_negative_number_are_left_out(name):
  x = draw(2, 6)
  keep = np.array([0, -1, 2, 3, -1, 5], np.int32)
  some = fold(name, x, numbers=[keep])
  for a, b in zip(
    arrays(some), arrays(fold(name, x[keep >= 0], numbers=[keep[keep >= 0]])), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert some.count == 4


def test_a_range_keeps_the_signs():
  x = np.array([[1.0, -2.0, 3.0], [0.5, -4.0, -1.0]], np.float32)
  found = fold("range", x)
  assert found.low.tolist() == [0.5, -4.0, -1.0] and found.high.tolist() == [1.0, -2.0, 3.0]


def test_samples_are_whole_rows_drawn_evenly_over_all_tokens():
  x = np.arange(40000, dtype=np.float32)[:, None] * np.array([[1.0, -1.0]], np.float32)
  found = fold("samples", x)
  rows = np.asarray(found.rows)
  assert found.count == 40000 and found.weights().sum() == len(rows) == stats.SAMPLES
  np.testing.assert_array_equal(rows[:, 0], -rows[:, 1])
  assert len(np.unique(rows[:, 0])) == len(rows)
  # The count in each tenth is binomial: within four standard deviations.
  tenths = np.histogram(rows[:, 0], bins=10, range=(0, 40000))[0]
  assert np.abs(tenths - stats.SAMPLES / 10).max() < 4 * np.sqrt(stats.SAMPLES * 0.09)
  few = fold("samples", x[1:4])
  assert few.weights().sum() == 3 and sorted(few.rows[:3, 0].tolist()) == [1.0, 2.0, 3.0]
