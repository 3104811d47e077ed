# SPDX-License-Identifier: Apache-2.0
"""NearSwap: no weight moves further than t."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import nearswap
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
A = RNG.standard_normal((30, 20)).astype(np.float32)
B = (A + 0.1 * RNG.standard_normal(A.shape)).astype(np.float32)


@pytest.mark.parametrize("t", [0.01, 0.1])
def test_moves_by_at_most_t(t):
  got = np.asarray(nearswap.swap_near(jnp.asarray(A), (jnp.asarray(B),), t=t))
  near = np.abs(A - B) < 0.999 * t
  assert near.any() and not near.all()
  assert (got[near] == B[near]).all()
  np.testing.assert_allclose(got, A + np.clip(B - A, -t, t), rtol=0, atol=1e-6)


def test_ends():
  assert (nearswap.swap_near(jnp.asarray(A), (jnp.asarray(B),), t=0.0) == A).all()
  assert (nearswap.swap_near(jnp.asarray(A), (jnp.asarray(B),), t=9.0) == B).all()
  assert (nearswap.swap_near(jnp.asarray(A), (jnp.asarray(A),), t=0.1) == A).all()


def test_mistakes_are_named():
  base = model.Model(None, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match="it takes exactly 1 donor; got 2"):
    drivers.run(nearswap.nearswap(t=0.1), base, collect.Materials(donors=[base, base]))
  with pytest.raises(ValueError, match="merge.nearswap needs the argument 't'"):
    nearswap.nearswap()
