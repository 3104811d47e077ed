# SPDX-License-Identifier: Apache-2.0
"""WUDI against a float64 transcription of the official code, and its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.merge import wudi

RNG = np.random.default_rng(0)
# Compiled as one program: by itself, each of its operations would be compiled for each shape.
run = jax.jit(
  wudi.least_interference, static_argnames=("solver", "steps", "axis", "matrix")
)  # fmt: skip


def merge(base, donors, **more):
  return run(jnp.asarray(base), tuple(map(jnp.asarray, donors)), **more)


def draw(shape, count, size=0.02):
  base = RNG.standard_normal(shape).astype(np.float32)
  near = [(base + size * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]
  return base, near


def deltas_of(base, donors):
  return [d.astype(np.float64) - base for d in donors]


def loss(tau, deltas):
  """L as published; rows are output neurons."""
  return sum(np.square((tau - d) @ d.T).sum() / np.square(d).sum() for d in deltas)


def slope(tau, deltas):
  return sum(2 * (tau - d) @ d.T @ d / np.square(d).sum() for d in deltas)


def adam(start, gradient, lr, steps):
  x, m, v = start.copy(), 0.0, 0.0
  for t in range(1, steps + 1):
    g = gradient(x)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    x = x - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return x


def closed(deltas):
  c = sum(d.T @ d / np.square(d).sum() for d in deltas)
  right = sum(d @ d.T @ d / np.square(d).sum() for d in deltas)
  return right @ np.linalg.pinv(c, rcond=1e-10)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_adam_equals_the_official_loop(shape):
  base, donors = draw(shape, 3)
  deltas = deltas_of(base, donors)
  wanted = base + adam(sum(deltas), lambda x: slope(x, deltas), 1e-5, 300)
  np.testing.assert_allclose(merge(base, donors), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_closed_form_is_the_minimum(shape):
  base, donors = draw(shape, 3)
  deltas = deltas_of(base, donors)
  got = np.asarray(merge(0 * base, deltas_32(deltas), solver="closed"), np.float64)
  np.testing.assert_allclose(got, closed(deltas), atol=1e-5, rtol=0)
  assert np.abs(slope(got, deltas)).max() < 1e-5 * np.abs(slope(sum(deltas), deltas)).max()


def deltas_32(deltas):
  return [d.astype(np.float32) for d in deltas]


def test_where_nothing_reads_the_sum_stays():
  # Two donors of rank 2 in 20 inputs: what lies outside their row spaces is free.
  deltas = [RNG.standard_normal((9, 2)) @ RNG.standard_normal((2, 20)) for _ in range(2)]
  got = merge(np.zeros((9, 20), np.float32), deltas_32(deltas), solver="closed")
  np.testing.assert_allclose(got, closed(deltas), atol=2e-4, rtol=0)
  assert np.linalg.matrix_rank(np.asarray(got), tol=1e-3) <= 4


def test_losses_are_ordered():
  base, donors = draw((16, 24), 4)
  deltas = deltas_of(base, donors)
  found = [merge(0 * base, deltas_32(deltas), solver=s) for s in ("adam", "closed")]
  at_sum, at_adam, at_closed = (
    loss(np.asarray(x, np.float64), deltas) for x in (sum(deltas), *found)
  )
  assert at_sum > at_adam > at_closed
  filtered = [
    loss(np.asarray(merge(0 * base, deltas_32(deltas), solver="closed", time=t)), deltas)
    for t in (0.0, 1.0, 10.0, 300.0)
  ]
  assert filtered == sorted(filtered, reverse=True)
  np.testing.assert_allclose(filtered[0], at_sum, rtol=1e-5)


def test_time_is_the_published_filter():
  base, donors = draw((10, 14), 3)
  deltas = deltas_of(base, donors)
  c = sum(d.T @ d / np.square(d).sum() for d in deltas)
  right = sum(d @ d.T @ d / np.square(d).sum() for d in deltas)
  values, vectors = np.linalg.eigh(c)
  share = 1 - np.exp(-7.0 * values)
  start = sum(deltas)
  wanted = (
    start - start @ vectors * share @ vectors.T + right @ vectors * share / values @ vectors.T
  )
  got = merge(0 * base, deltas_32(deltas), solver="closed", time=7.0)
  np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", wudi.SOLVERS)
def test_one_donor_and_idle_donors(solver):
  base, donors = draw((7, 9), 2)
  got = merge(base, donors[:1], solver=solver)
  np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)
  got = merge(base, [donors[0], base], solver=solver)
  np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)
  np.testing.assert_array_equal(merge(base, [base, base], solver=solver), base)


def test_donors_that_share_no_input_are_added():
  base = RNG.standard_normal((8, 10)).astype(np.float32)
  deltas = [0.1 * RNG.standard_normal((8, 10)) for _ in range(2)]
  deltas[0][:, 5:] = 0
  deltas[1][:, :5] = 0
  donors = [(base + d).astype(np.float32) for d in deltas]
  got = merge(base, donors, solver="closed")
  np.testing.assert_allclose(got, base + sum(deltas), atol=3e-6, rtol=0)


def test_a_kernel_is_turned():
  base, donors = draw((12, 20), 3)
  for solver in wudi.SOLVERS:
    wanted = merge(base, donors, solver=solver)
    got = merge(base.T, [d.T for d in donors], solver=solver, axis=0)
    np.testing.assert_allclose(got.T, wanted, atol=3e-6, rtol=0)


def test_other_leaves_and_dtypes():
  base, donors = draw((11,), 3)
  got = merge(base, donors, lam=0.5)
  mean = np.mean(deltas_of(base, donors), axis=0)
  np.testing.assert_allclose(got, base + 0.5 * mean, atol=1e-6, rtol=0)
  base, donors = draw((8, 13), 2)
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  wide = [np.asarray(x, np.float32) for x in cast]
  got = merge(cast[0], cast[1:], steps=20)
  assert got.dtype == jnp.bfloat16
  wanted = merge(wide[0], wide[1:], steps=20).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wanted)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="solver='newton'; valid: adam, closed"):
    registry.parse("merge.wudi(solver='newton')")
  with pytest.raises(ValueError, match=r"time=3.0 is of the gradient flow; it takes solver='clo"):
    registry.parse("merge.wudi(time=3.0)")
  with pytest.raises(ValueError, match="steps=-1 must not be negative"):
    registry.parse("merge.wudi(steps=-1)")
