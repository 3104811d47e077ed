# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices: orthogonal for every order, of one size where a construction is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import hadamard


def dense(n):
  """Multiplies the factors out in float64."""
  out = np.ones((1, 1))
  for f in hadamard.factors(n):
    out = np.kron(out, f.astype(np.float64))
  return out / n**0.5


def test_every_order_is_orthogonal_and_flat():
  for n in range(1, 130):
    h = dense(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5, err_msg=str(n))
    assert np.abs(h).max() <= (2 / n) ** 0.5 + 1e-6, n


def test_orders_that_models_have_are_hadamard_matrices():
  for n in (12, 28, 36, 60, 80, 96, 108, 140, 200, 576, 768, 896, 960, 1600, 2560):
    parts = hadamard.factors(n)
    assert np.prod([len(f) for f in parts]) == n
    for f in parts:
      assert (np.abs(f) == 1).all(), n
      np.testing.assert_array_equal(f @ f.T, len(f) * np.eye(len(f)))


@pytest.mark.parametrize("n", [64, 24, 44, 33])
def test_the_fast_product_is_the_matrix(n):
  x = np.random.default_rng(0).normal(size=(2, 3, n)).astype(np.float32)
  np.testing.assert_allclose(hadamard.transform(jnp.asarray(x)), x @ dense(n), atol=1e-5)
  back = hadamard.transform(jnp.asarray(x), back=True)
  np.testing.assert_allclose(back, x @ dense(n).T, atol=1e-5)
  np.testing.assert_allclose(hadamard.matrix(n), dense(n), atol=1e-6)


def test_what_has_no_order_is_named():
  with pytest.raises(ValueError, match="no matrix of order 0"):
    hadamard.factors(0)
