# SPDX-License-Identifier: Apache-2.0
"""Generalized Gaussians against scipy: moments, quantiles, draws; shapes are found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from treesurgeon.core import model
from treesurgeon.models import gg_init
from treesurgeon.stats import generalized_gaussian as gg


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.6, 2.0])
def test_shape_and_scale_are_found_again(shape):
  x = stats.gennorm.rvs(shape, scale=0.03, size=200_000, random_state=0)
  found = gg.fit(jnp.asarray(x, jnp.float32))
  assert float(found.shape) == pytest.approx(shape, abs=0.05)
  expected = np.sqrt((x**2).mean() / stats.gennorm.var(float(found.shape)))
  assert float(found.scale) == pytest.approx(expected, rel=1e-4)


def test_moments_in_closed_form():
  rho = [stats.gennorm.var(v) / stats.gennorm.expect(abs, (v,)) ** 2 for v in (0.5, 1.0, 3.0)]
  np.testing.assert_allclose(gg.ratio(np.array([0.5, 1.0, 3.0])), rho, rtol=1e-6)
  assert (gg.SHAPES[0], gg.SHAPES[-1], len(gg.SHAPES)) == (0.1, 3.0, 291)


@pytest.mark.parametrize("shape", [0.3, 1.0, 1.7, 3.0])
def test_quantiles(shape):
  tail = np.geomspace(1e-7, 1, 400)
  expected = stats.gennorm.isf(tail / 2, shape)
  got = gg.quantile(jnp.asarray(tail, jnp.float32), shape)
  np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)


def test_zeros_alone():
  found = gg.fit(jnp.zeros(8))
  assert (float(found.shape), float(found.scale)) == (2.0, 0.0)


def test_kernels_are_redrawn_and_nothing_else():
  ones = {"up": {"kernel": jnp.ones((2, 200, 100)), "bias": jnp.ones((2, 100))}}
  m = model.Model(None, {"embed": jnp.ones((5, 4)), "layers": {"0:2": ones}})
  out = gg_init.redraw(m, jax.random.key(0), shape=1.2, xi=1.0)
  kernels = np.stack([out.leaf(f"layers/{i}/up/kernel") for i in range(2)])
  assert stats.kstest(kernels.ravel(), stats.gennorm(1.2, scale=_scale(1.2, 200)).cdf).pvalue > 0.01
  assert (kernels[0] != kernels[1]).mean() > 0.99
  np.testing.assert_array_equal(out.leaf("layers/1/up/bias"), 1)
  np.testing.assert_array_equal(out.leaf("embed"), 1)
  with pytest.raises(ValueError, match=r"shape=0, xi=2.0: both must be positive"):
    gg_init.redraw(m, jax.random.key(0), shape=0)


def _scale(shape, inputs):
  return np.sqrt(1 / inputs / stats.gennorm.var(shape))
