# SPDX-License-Identifier: Apache-2.0
"""Sums and elections against programs that round after every operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.merge import consensus

RNG = np.random.default_rng(0)
WEIGHTS = tuple(map(np.float32, (0.3, -0.7, 1.3)))
LAM = np.float32(0.7)


def draw():
  base = RNG.standard_normal((97, 101)).astype(np.float32)
  return base, [(0.02 * RNG.standard_normal(base.shape)).astype(np.float32) for _ in WEIGHTS]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_compiled_sum_rounds_every_product_and_quotient(normalize):
  base, deltas = draw()
  total = sum(c * d for c, d in zip(WEIGHTS, deltas, strict=True))
  total = total / (WEIGHTS[0] + WEIGHTS[1] + WEIGHTS[2]) if normalize else total

  def run(base, deltas, weights, lam):
    return consensus.add(base, deltas, weights=weights, lam=lam, normalize=normalize)

  got = jax.jit(run)(base, deltas, WEIGHTS, LAM)
  np.testing.assert_array_equal(got, base + LAM * total)


def test_a_compiled_election_rounds_every_product():
  base, deltas = draw()
  weighted = [c * d for c, d in zip(WEIGHTS, deltas, strict=True)]
  sign = np.where(weighted[0] + weighted[1] + weighted[2] >= 0, 1, -1)
  total = np.zeros_like(base)
  for d in weighted:
    total += np.where(np.sign(d) == sign, d, np.float32(0))

  def run(base, deltas, weights, lam):
    return consensus.elect(base, deltas, weights=weights, lam=lam, normalize=False)

  np.testing.assert_array_equal(jax.jit(run)(base, deltas, WEIGHTS, LAM), base + LAM * total)


def test_weights_that_cancel_are_not_divided_by():
  one = jnp.ones(2)
  got = consensus.add(0 * one, [one, 3 * one], weights=(1.0, -1.0), normalize=True)
  assert got.tolist() == [-2.0, -2.0]


def test_zero_is_elected_plus():
  got = consensus.elect(jnp.zeros(1), [jnp.ones(1), -jnp.ones(1)], weights=(1.0, 1.0))
  assert got.tolist() == [1.0]


def test_l1_is_restored_unless_void():
  delta = jnp.asarray(RNG.standard_normal(50), jnp.float32)
  kept = jnp.where(jnp.arange(50) < 10, delta, 0.0)
  got = consensus.rescale_l1(delta, kept)
  np.testing.assert_allclose(jnp.abs(got).sum(), jnp.abs(delta).sum(), rtol=1e-6)
  for void in (jnp.zeros(50), 1e-10 * delta):
    np.testing.assert_array_equal(consensus.rescale_l1(void, void / 2), void / 2)
