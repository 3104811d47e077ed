# SPDX-License-Identifier: Apache-2.0
"""Spherical interpolation by weights: whole, by neuron, and of changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import nuslerp
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
A, B, C = (RNG.standard_normal((6, 5)).astype(np.float32) for _ in range(3))


def blend(a, b, t):
  theta = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
  return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def whole(a, b, t):
  a, b = a.astype(np.float64), b.astype(np.float64)
  return blend(a.ravel(), b.ravel(), t).reshape(a.shape)


def by_row(a, b, t):
  return np.stack([blend(x, y, t) for x, y in zip(*map(np.float64, (a, b)), strict=True)])


def apply(transform, base, *donors, name="w/kernel"):
  models = [model.Model(None, {"w": {name[2:]: jnp.asarray(x)}}) for x in (base, *donors)]
  out = drivers.run(transform, models[0], collect.Materials(donors=models[1:]))
  return np.asarray(out.leaf(name))


@pytest.mark.parametrize(("weights", "t"), [(None, 0.5), ((1.0, 3.0), 0.75), ((1.0, -1.0), 0.5)])
def test_equals_the_definition(weights, t):
  got = apply(nuslerp.nuslerp(weights=weights), A, B)
  np.testing.assert_allclose(got, whole(A, B, t), rtol=0, atol=1e-6)
  got = apply(nuslerp.nuslerp(weights=weights, deltas=True), C, A, B)
  np.testing.assert_allclose(got, C + whole(A - C, B - C, t), rtol=0, atol=2e-6)


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_neuron_is_a_column_of_a_kernel_and_a_row_of_anything_else(row_wise):
  transform = nuslerp.nuslerp(weights=(1.0, 1.0), flatten=False, row_wise=row_wise)
  rows, columns = by_row(A, B, 0.5), by_row(A.T, B.T, 0.5).T
  got = apply(transform, A, B)
  np.testing.assert_allclose(got, rows if row_wise else columns, rtol=0, atol=1e-6)
  got = apply(transform, A, B, name="w/weight")
  np.testing.assert_allclose(got, columns if row_wise else rows, rtol=0, atol=1e-6)
  got = apply(transform, A[0], B[0], name="w/bias")
  np.testing.assert_allclose(got, blend(A[0], B[0], 0.5), rtol=0, atol=1e-6)


def test_opposite_and_empty_arrays_are_interpolated_without_noise():
  got = apply(nuslerp.nuslerp(weights=(0.7, 0.3)), A, -A)
  np.testing.assert_allclose(got, 0.4 * A, rtol=0, atol=1e-6)
  zero = np.zeros_like(A)
  assert (apply(nuslerp.nuslerp(), zero, zero) == 0).all()
  got = apply(nuslerp.nuslerp(weights=(1.0, 1.0), flatten=False), A * (np.arange(5) > 1), B)
  assert np.isfinite(got).all()


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="has 3 entries for 2 models"):
    nuslerp.nuslerp(weights=(1.0, 1.0, 1.0))
  with pytest.raises(ValueError, match="it takes exactly 1 donor; got 2"):
    apply(nuslerp.nuslerp(), A, B, C)
  with pytest.raises(ValueError, match="it takes exactly 2 donors; got 1"):
    apply(nuslerp.nuslerp(deltas=True), A, B)
