# SPDX-License-Identifier: Apache-2.0
"""The Karcher mean against the iteration on whole vectors in float64, and its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import karcher
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


def draw(count, near, shape=(9, 8)):
  center = RNG.standard_normal(shape)
  return [(center + near * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]


def iterate(arrays, weights=None, max_iter=10, tol=1e-5):
  x = np.stack([a.astype(np.float64).ravel() for a in arrays])
  w = np.array(weights or [1.0] * len(x))
  w = w / w.sum()
  norms = np.linalg.norm(x, axis=1)
  units = x / norms[:, None]
  mean = w @ units
  mean /= np.linalg.norm(mean)
  for _ in range(max_iter):
    pulls = logs(mean, units)
    tangent = w @ pulls
    size = np.linalg.norm(tangent)
    if size < tol:
      break
    mean = np.cos(size) * mean + np.sin(size) * tangent / size
    mean /= np.linalg.norm(mean)
  return ((w @ norms) * mean).reshape(arrays[0].shape)


def logs(mean, units):
  """The unit vectors seen from the mean: directions along the sphere times angles."""
  cos = np.clip(units @ mean, -1, 1)
  away = units - cos[:, None] * mean
  sine = np.linalg.norm(away, axis=1)
  return away * (np.arctan2(sine, cos) / np.maximum(sine, 1e-30))[:, None]


def merged(arrays, **more):
  w, *donors = map(jnp.asarray, arrays)
  return np.asarray(karcher.mean(w, tuple(donors), **more))


@pytest.mark.parametrize("near", [3.0, 0.3, 0.01, 1e-4])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5, 0.0)])
def test_equals_the_iteration_on_vectors(near, weights):
  arrays = draw(4, near)
  for more in ({}, {"max_iter": 1}, {"max_iter": 0}):
    wanted = iterate(arrays, weights, **more)
    np.testing.assert_allclose(
      merged(arrays, weights=weights, **more), wanted, rtol=1e-6, atol=2e-6
    )


def test_the_mean_is_pulled_equally_from_all_sides():
  arrays = draw(3, 1.0)
  mean = merged(arrays, max_iter=50, tol=1e-7).astype(np.float64).ravel()
  units = np.stack([a.ravel() / np.linalg.norm(a) for a in arrays])
  assert np.linalg.norm(logs(mean / np.linalg.norm(mean), units).mean(0)) < 1e-6


def test_two_models_meet_at_the_middle_of_the_arc():
  a, b = np.array([3.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
  np.testing.assert_allclose(merged([a, b]), [2 / np.sqrt(2)] * 2, rtol=1e-6)


def test_one_model_is_its_own_mean():
  arrays = draw(3, 1.0)
  assert (merged(arrays, weights=(0.0, 3.0, 0.0)) == arrays[1]).all()
  np.testing.assert_allclose(merged([arrays[0]] * 3), arrays[0], rtol=0, atol=1e-6)


def test_arrays_without_a_direction_do_not_pull():
  (a,) = draw(1, 0.0)
  zero = 0 * a
  assert (merged([zero, zero]) == 0).all()
  np.testing.assert_allclose(merged([zero, a]), a / 2, rtol=0, atol=1e-6)
  np.testing.assert_allclose(merged([a, -a]), a, rtol=0, atol=1e-6)
  np.testing.assert_allclose(merged([a, -3 * a]), 2 * a, rtol=0, atol=2e-6)


def test_storage_dtype():
  arrays = [jnp.asarray(a, jnp.bfloat16) for a in draw(2, 0.3)]
  assert karcher.mean(arrays[0], (arrays[1],)).dtype == jnp.bfloat16


def test_mistakes_are_named():
  base = model.Model(None, {"w": jnp.ones(2)})
  materials = collect.Materials(donors=[base])
  with pytest.raises(ValueError, match=r"weights=\(1.0, -1.0\) must not be negative"):
    drivers.run(karcher.karcher(weights=(1.0, -1.0)), base, materials)
  with pytest.raises(ValueError, match="has 3 entries for 2 models"):
    drivers.run(karcher.karcher(weights=(1.0, 1.0, 1.0)), base, materials)
  with pytest.raises(ValueError, match="valid are max_iter from 0 and tol above 0"):
    karcher.karcher(tol=0.0)
