# SPDX-License-Identifier: Apache-2.0
"""MagMax against argmax over magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import magmax

RNG = np.random.default_rng(0)


def test_equals_the_largest():
  base, *donors = (RNG.standard_normal((6, 7)).astype(np.float32) for _ in range(4))
  deltas = np.stack([d - base for d in donors])
  best = np.take_along_axis(deltas, np.abs(deltas).argmax(axis=0)[None], axis=0)[0]
  got = magmax.add_largest(jnp.asarray(base), tuple(map(jnp.asarray, donors)), lam=0.7)
  np.testing.assert_allclose(got, base + 0.7 * best, atol=1e-6)


def test_the_later_wins_a_tie_and_one_donor_is_itself():
  got = magmax.add_largest(jnp.zeros(1), (jnp.ones(1), -jnp.ones(1)), lam=1.0)
  assert got.tolist() == [-1.0]
  donor = jnp.array([2.0, -3.0], jnp.bfloat16)
  got = magmax.add_largest(jnp.zeros(2, jnp.bfloat16), (donor,), lam=1.0)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, donor)


def test_no_donors():
  (one,) = magmax.magmax()
  with pytest.raises(ValueError, match="at least one model among the donors"):
    one.apply(model.Part(None, {"a": jnp.ones(1)}), {"donors": {"a": ()}}, jax.random.key(0))
