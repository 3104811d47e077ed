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
  "second_moment": lambda x: x.T @ x,
  "sum_squares": lambda x: (x * x).sum(0),
  "sum_magnitudes": lambda x: np.abs(x).sum(0),
  "absmax": lambda x: np.abs(x).max(0),
}


def arrays(state):
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def fold(name, *batches):
  one = stats.FOLDS[name]
  state = one.init(batches[0].shape[1])
  for b in batches:
    state = one.update(state, jnp.asarray(b))
  return state


def draw(seed, tokens=5, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal((tokens, 3)).astype(dtype)


def test_every_fold_has_an_oracle():
  assert set(stats.FOLDS) == set(EXACT)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_is_what_float64_gives(name, dtype):
  x = jnp.asarray(draw(0, 64)).astype(dtype)
  value, count = arrays(fold(name, x))
  assert value.dtype == np.float32 and count == 64
  np.testing.assert_allclose(value, EXACT[name](np.asarray(x, np.float64)), rtol=2e-6)


@pytest.mark.parametrize("name", EXACT)
def test_an_empty_state_is_neutral(name):
  state = fold(name, draw(0))
  one = stats.FOLDS[name]
  for merged in (one.merge(state, one.init(3)), one.merge(one.init(3), state)):
    for a, b in zip(arrays(merged), arrays(state), strict=True):
      np.testing.assert_array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(EXACT)), st.permutations(range(4)), st.integers(0, 3))
def test_the_order_and_the_split_of_batches_do_not_matter(name, order, cut):
  # Small integers: their sums are exact, so the laws hold to the bit.
  parts = [np.round(4 * draw(i, 1 + i)) for i in range(4)]
  whole = arrays(fold(name, np.concatenate(parts)))
  turned = [parts[i] for i in order]
  merge = stats.FOLDS[name].merge
  states = [fold(name, p) for p in turned]
  left, right = states[:cut], states[cut:]
  empty = stats.FOLDS[name].init(3)
  total = merge(
    functools.reduce(merge, left, empty),
    functools.reduce(merge, right, empty),
  )
  for a, b, c in zip(whole, arrays(total), arrays(fold(name, *turned)), strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_means_divide_by_the_tokens():
  x = draw(1)
  np.testing.assert_allclose(fold("second_moment", x).mean(), x.T @ x / 5, rtol=1e-6)
  np.testing.assert_allclose(fold("sum_squares", x).mean(), (x * x).mean(0), rtol=1e-6)
