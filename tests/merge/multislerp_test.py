# SPDX-License-Identifier: Apache-2.0
"""Barycenters on a sphere against float64, with the tangent step that the library leaves out."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import multislerp
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
BASE, *TUNED = (RNG.standard_normal((6, 5)).astype(np.float32) for _ in range(4))


def barycenter(arrays, weights, *, normalize=True, eps=1e-8):
  arrays = np.stack([a.astype(np.float64).ravel() for a in arrays])
  w = np.array(weights) / (sum(weights) if normalize else 1)
  norms = np.linalg.norm(arrays, axis=1)
  units = arrays / (norms + eps)[:, None]
  mean = w @ units
  mean /= np.linalg.norm(mean)
  tangent = w @ (units - (units @ mean)[:, None] * mean)
  length = np.linalg.norm(tangent) + eps
  return (w @ norms) * (np.cos(length) * mean + np.sin(length) / length * tangent)


def merged(arrays, **more):
  w, *donors = map(jnp.asarray, arrays)
  return np.asarray(multislerp.barycenter(w, tuple(donors), **more))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.4), (1.0, -0.3, 0.5)])
@pytest.mark.parametrize("more", [{}, {"normalize_weights": False}, {"eps": 0.1}])
def test_equals_the_definition(weights, more):
  oracle = {"normalize": more.get("normalize_weights", True), "eps": more.get("eps", 1e-8)}
  wanted = barycenter(TUNED, weights, **oracle).reshape(BASE.shape)
  np.testing.assert_allclose(merged(TUNED, weights=weights, **more), wanted, rtol=0, atol=3e-6)
  wanted = BASE + barycenter([x - BASE for x in TUNED], weights, **oracle).reshape(BASE.shape)
  got = merged([BASE, *TUNED], weights=weights, deltas=True, **more)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6)


def test_all_weight_on_one_model_is_that_model():
  assert (merged(TUNED, weights=(0.0, 2.0, 0.0)) == TUNED[1]).all()
  assert (merged([BASE, TUNED[0]], deltas=True, weights=(0.3,)) == TUNED[0]).all()


def test_directions_that_cancel_are_averaged():
  a = TUNED[0]
  np.testing.assert_allclose(merged([a, -2 * a]), -0.5 * a, rtol=0, atol=1e-6)
  np.testing.assert_allclose(merged([a, -a, 0 * a]), 0 * a, rtol=0, atol=1e-6)
  assert (merged([0 * a, 0 * a]) == 0).all()


def test_mistakes_are_named():
  base, donor = (model.Model(None, {"w": jnp.full(2, x)}) for x in (1.0, 2.0))
  materials = collect.Materials(donors=[donor])
  with pytest.raises(ValueError, match=r"weights=\(1.0, -1.0\) sum to zero"):
    drivers.run(multislerp.multislerp(weights=(1.0, -1.0)), base, materials)
  with pytest.raises(ValueError, match="has 2 entries for 1 models"):
    drivers.run(multislerp.multislerp(weights=(1.0, 1.0), deltas=True), base, materials)
  with pytest.raises(ValueError, match="eps=0.0 must be positive"):
    multislerp.multislerp(eps=0.0)
