# SPDX-License-Identifier: Apache-2.0
"""The cut keeps exactly the entries that a stable sort by magnitude puts first."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treesurgeon.core import trim


def by_sorting(arrays, k):
  flat = np.concatenate([a.ravel() for a in arrays])
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-np.abs(flat), kind="stable")[:k]] = True
  return np.split(mask, np.cumsum([a.size for a in arrays])[:-1])


@functools.partial(jax.jit, static_argnames="k")
def by_cutting(arrays, k):
  threshold, ties = trim.cut(arrays, k)
  return [trim.kept(a, threshold, t) for a, t in zip(arrays, ties, strict=True)]


def agree(arrays, k):
  for got, wanted in zip(by_cutting(arrays, k), by_sorting(arrays, k), strict=True):
    np.testing.assert_array_equal(np.asarray(got).ravel(), wanted)


KINDS = {
  "normal": lambda x: x,
  "many ties": lambda x: np.round(2 * x) / 2,
  "mostly zero": lambda x: np.where(np.abs(x) > 1.5, x, 0).astype(np.float32),
  "all equal": lambda x: np.full_like(x, -0.25),
  "all zero": np.zeros_like,
  "wide range": lambda x: np.exp(8 * x).astype(np.float32),
  "subnormal": lambda x: (x * 1e-40).astype(np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (97,), (13, 7), (3, 4, 5), (300, 301)])
def test_equals_a_stable_sort(kind, shape):
  x = KINDS[kind](np.random.default_rng(0).standard_normal(shape).astype(np.float32))
  for k in sorted({1, max(1, x.size // 5), max(1, x.size - 1), x.size}):
    agree([x], k)


def test_several_arrays_are_one_vector():
  rng = np.random.default_rng(1)
  arrays = [np.round(rng.standard_normal(s)).astype(np.float32) for s in [(4, 5), (7,), (2, 3)]]
  for k in (1, 5, 12, 20, 33):
    agree(arrays, k)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  hnp.arrays(np.float32, 24, elements=st.floats(-4, 4, width=16)), st.sampled_from([1, 7, 23])
)
def test_any_values(x, k):
  agree([x.reshape(4, 6)], k)


def test_infinity_is_largest():
  x = np.array([1.0, -np.inf, 3.0, np.inf], np.float32)
  agree([x], 2)


def test_counts_do_not_overflow():
  high, low = trim._count([jnp.ones(1 << 15, jnp.int32)] * 5, jnp.int32(1))
  assert (int(high) << 16) + int(low) == 5 << 15


def test_passes_stay_few(monkeypatch):
  x = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)
  passes = []
  count = trim._count

  def counting(bits, pivot):
    if bits[0].size == x.size:  # not the sample
      jax.debug.callback(lambda: passes.append(1))
    return count(bits, pivot)

  monkeypatch.setattr(trim, "_count", counting)
  jax.block_until_ready(trim.cut([x], 50_000))
  jax.effects_barrier()
  assert 0 < len(passes) <= 12  # plain bisection takes 31


def test_k_out_of_range():
  for k in (0, 4):
    with pytest.raises(ValueError, match=f"k={k} entries cannot be kept of 3; valid: 1 to 3"):
      trim.cut([jnp.ones(3)], k)
