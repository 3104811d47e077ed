# SPDX-License-Identifier: Apache-2.0
"""Averaging against float64 arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import linear
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5), (2.0, -0.5, 0.25)])
def test_equals_the_definition(weights, normalize):
  arrays = [RNG.standard_normal((5, 7)).astype(np.float32) for _ in range(3)]
  got = linear.average(
    jnp.asarray(arrays[0]), tuple(map(jnp.asarray, arrays[1:])),
    weights=weights, normalize=normalize,
  )  # fmt: skip
  w = np.array(weights or (1.0, 1.0, 1.0))
  wanted = np.einsum("i,ijk->jk", w, np.array(arrays, np.float64))
  np.testing.assert_allclose(got, wanted / w.sum() if normalize else wanted, atol=2e-6, rtol=0)


def test_all_weight_on_one_model_is_that_model():
  a, b = jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4])
  assert (linear.average(a, (b,), weights=(1.0, 0.0)) == a).all()
  assert (linear.average(a, (b,), weights=(0.0, 2.0)) == b).all()


def test_storage_dtype():
  a = jnp.ones(4, jnp.bfloat16)
  assert linear.average(a, (jnp.full(4, 3.0),)).dtype == jnp.bfloat16


def test_mistakes_are_named():
  base, donor = (model.Model(None, {"w": jnp.full(1, x)}) for x in (1.0, 2.0))
  with pytest.raises(ValueError, match=r"weights=\(1.0, -1.0\) sum to zero"):
    drivers.run(linear.linear(weights=(1.0, -1.0)), base, collect.Materials(donors=[donor]))
  with pytest.raises(ValueError, match=r"has 1 entries for 2 models \(the base, then its donors\)"):
    linear.average(jnp.ones(1), (jnp.ones(1),), weights=(1.0,))
  with pytest.raises(ValueError, match="must be finite"):
    linear.average(jnp.ones(1), (jnp.ones(1),), weights=(1.0, float("inf")))
