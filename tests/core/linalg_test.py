# SPDX-License-Identifier: Apache-2.0
"""Shared linear algebra against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import linalg


def spd(n, seed=0):
  x = np.random.default_rng(seed).normal(size=(4 * n, n))
  return x.T @ x


def test_damped_cholesky_factors_the_damped_matrix():
  h = spd(6)
  low, used = linalg.damped_cholesky(jnp.asarray(h, jnp.float32), 0.01)
  expected = np.linalg.cholesky(h + 0.01 * np.diag(h).mean() * np.eye(6))
  np.testing.assert_allclose(low, expected, rtol=1e-4, atol=1e-4)
  assert float(used) == np.float32(0.01)


def test_damping_rises_until_the_factor_exists():
  h = np.diag([1.0, 1.0, -0.02])  # indefinite: 0.01 is too little, 0.1 is enough
  low, used = linalg.damped_cholesky(jnp.asarray(h, jnp.float32), 0.01)
  assert np.isfinite(low).all()
  np.testing.assert_allclose(used, 0.1, rtol=1e-6)


def test_hopeless_matrix_gives_nan():
  low, _ = linalg.damped_cholesky(jnp.full((2, 2), jnp.nan), 0.01)
  assert np.isnan(np.diag(low)).all()


def test_inverse_from_cholesky():
  h = spd(5, 1)
  low = jnp.asarray(np.linalg.cholesky(h), jnp.float32)
  np.testing.assert_allclose(
    linalg.inverse_from_cholesky(low), np.linalg.inv(h), rtol=1e-3, atol=1e-5
  )


def test_inverse_factor_is_the_upper_cholesky_of_the_inverse():
  h = spd(7, 2)
  upper, _ = linalg.inverse_factor(jnp.asarray(h, jnp.float32), 0.0)
  expected = np.linalg.cholesky(np.linalg.inv(h)).T
  np.testing.assert_allclose(upper, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_gram_is_the_product_with_itself(n):
  x = np.random.default_rng(0).normal(size=(9, n)).astype(np.float32)
  np.testing.assert_allclose(linalg.gram(jnp.asarray(x)), x.T @ x, rtol=1e-5, atol=1e-5)
