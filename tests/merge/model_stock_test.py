# SPDX-License-Identifier: Apache-2.0
"""Model Stock against its formula in float64, and at angles where the answer is known."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import model_stock
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
BASE = RNG.standard_normal((6, 5)).astype(np.float32)


def interpolate(base, tuned):
  base, *tuned = (x.astype(np.float64) for x in (base, *tuned))
  d = [x - base for x in tuned]
  c = np.mean(
    [np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(d, 2)]
  )
  n = len(tuned)
  t = n * c / (1 + (n - 1) * c)
  return t * np.mean(tuned, axis=0) + (1 - t) * base


def apply(transform, base, *donors, name="w/kernel"):
  models = [model.Model(None, {"w": {name[2:]: jnp.asarray(x)}}) for x in (base, *donors)]
  out = drivers.run(transform, models[0], collect.Materials(donors=models[1:]))
  return np.asarray(out.leaf(name))


@pytest.mark.parametrize("count", [2, 4])
def test_equals_the_definition(count):
  common = RNG.standard_normal(BASE.shape)
  tuned = [
    (BASE + common + 0.5 * RNG.standard_normal(BASE.shape)).astype(np.float32) for _ in range(count)
  ]
  got = apply(model_stock.model_stock(), BASE, *tuned)
  np.testing.assert_allclose(got, interpolate(BASE, tuned), rtol=0, atol=3e-6)
  got = apply(model_stock.model_stock(filter_wise=True), BASE, *tuned)
  columns = [interpolate(BASE[:, j], [x[:, j] for x in tuned]) for j in range(5)]
  np.testing.assert_allclose(got, np.stack(columns, 1), rtol=0, atol=2e-5)
  got = apply(model_stock.model_stock(filter_wise=True), BASE, *tuned, name="w/embedding")
  rows = [interpolate(BASE[i], [x[i] for x in tuned]) for i in range(6)]
  np.testing.assert_allclose(got, np.stack(rows), rtol=0, atol=2e-5)


def test_equal_models_are_kept_and_orthogonal_changes_dropped():
  a = BASE + RNG.standard_normal(BASE.shape).astype(np.float32)
  np.testing.assert_allclose(apply(model_stock.model_stock(), BASE, a, a), a, rtol=0, atol=1e-6)
  x, y = np.zeros((2, *BASE.shape), np.float32)
  x[0], y[1] = 1, 1
  got = apply(model_stock.model_stock(), BASE, BASE + x, BASE + y)
  np.testing.assert_allclose(got, BASE, rtol=0, atol=1e-6)


def test_changes_that_cancel_or_vanish_leave_the_base():
  d = np.full(BASE.shape, 0.5, np.float32)
  base = np.round(BASE)  # so that nothing is rounded
  assert (apply(model_stock.model_stock(), base, base + d, base - d) == base).all()
  assert (apply(model_stock.model_stock(), BASE, BASE, BASE) == BASE).all()


def test_lam_scales_the_way():
  a, b = (BASE + 0.1 * RNG.standard_normal(BASE.shape).astype(np.float32) for _ in range(2))
  full, half = (apply(model_stock.model_stock(lam=x), BASE, a, b) for x in (1.0, 0.5))
  np.testing.assert_allclose(half - BASE, 0.5 * (full - BASE), rtol=0, atol=1e-6)


def test_it_takes_at_least_two_donors():
  with pytest.raises(ValueError, match="at least two donors; got 1"):
    apply(model_stock.model_stock(), BASE, BASE)
