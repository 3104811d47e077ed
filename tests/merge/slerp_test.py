# SPDX-License-Identifier: Apache-2.0
"""Spherical interpolation of two models, against float64 and against its geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import slerp
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


def pair(shape=(9, 7), near=1.0):
  a = RNG.standard_normal(shape)
  return [x.astype(np.float32) for x in (a, a + near * RNG.standard_normal(shape))]


def blend(a, b, t):
  a, b = a.astype(np.float64), b.astype(np.float64)
  theta = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
  return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


@pytest.mark.parametrize("near", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("t", [-0.2, 0.3, 0.5, 1.0])
def test_equals_the_definition(t, near):
  a, b = pair(near=near)
  got = slerp.interpolate(jnp.asarray(a), (jnp.asarray(b),), t=t)
  np.testing.assert_allclose(got, blend(a, b, t), rtol=0, atol=3e-6)


def test_equal_norms_are_kept():
  a, b = pair()
  b *= np.linalg.norm(a) / np.linalg.norm(b)
  got = slerp.interpolate(jnp.asarray(a), (jnp.asarray(b),), t=0.4)
  assert abs(np.linalg.norm(got) / np.linalg.norm(a) - 1) < 1e-6


def test_the_ends_are_exact():
  a, b = map(jnp.asarray, pair())
  assert (slerp.interpolate(a, (b,), t=0.0) == a).all()
  assert (slerp.interpolate(a, (b,), t=1.0) == b).all()


def test_nearly_parallel_arrays_are_interpolated_linearly():
  a, b = pair(near=0.01)
  got = slerp.interpolate(jnp.asarray(a), (jnp.asarray(b),), t=0.25)
  np.testing.assert_allclose(got, 0.75 * a + 0.25 * b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_degenerate_arrays_and_ranks(shape, sign):
  a = jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)
  got = jax.jit(slerp.interpolate)(a, (jnp.asarray(sign, jnp.bfloat16) * a,), t=0.5)
  assert got.dtype == jnp.bfloat16
  assert got.shape == a.shape
  assert jnp.isfinite(got.astype(jnp.float32)).all()


def test_it_takes_one_donor():
  base = model.Model(None, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match="it takes exactly 1 donor; got 2"):
    drivers.run(slerp.slerp(), base, collect.Materials(donors=[base, base]))
