# SPDX-License-Identifier: Apache-2.0
"""k-means against Lloyd's iterations in float64, and what must hold of any result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.compress.quantize import kmeans

KEY = jax.random.key(0)
fit = functools.partial(jax.jit, static_argnames=("k", "iterations"))(kmeans.fit)


def points(n=60, dim=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, dim)), rng.exponential(size=n)


def lloyd(x, weights, centroids, iterations):
  for _ in range(iterations):
    index = np.argmin(((x[:, None] - centroids) ** 2).sum(-1), axis=1)
    for c in np.unique(index):
      mine = index == c
      centroids[c] = np.average(x[mine], axis=0, weights=weights[mine])
  distance = ((x[:, None] - centroids) ** 2).sum(-1)
  return centroids, distance.argmin(1), (weights * distance.min(1)).sum()


def test_equals_lloyd_in_float64():
  x, weights = points()
  first = x[np.asarray(jax.random.permutation(KEY, len(x)))[:5]]
  for iterations in (0, 4):
    found = fit(jnp.asarray(x), k=5, key=KEY, weights=jnp.asarray(weights), iterations=iterations)
    centroids, index, error = lloyd(x, weights, first.copy(), iterations)
    np.testing.assert_allclose(found.centroids, centroids, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.error, error, rtol=1e-5)


def test_more_iterations_never_raise_the_error():
  x, weights = points(200, 2, seed=1)
  x[100:] = x[:100]  # repeated points leave some centroids empty at first
  run = functools.partial(fit, jnp.asarray(x), k=80, key=KEY, weights=jnp.asarray(weights))
  errors = [float(run(iterations=i).error) for i in (0, 1, 2, 5, 20)]
  assert (np.diff(errors) <= 1e-5).all(), errors
  assert len(np.unique(run(iterations=20).index)) == 80  # every centroid came to serve a point


def test_weights_count():
  x, weights = points(300, 2, seed=2)
  weights = weights**4
  cost = lambda c: float((weights * ((x[:, None] - np.asarray(c)) ** 2).sum(-1).min(1)).sum())
  weighted = fit(jnp.asarray(x), k=6, key=KEY, weights=jnp.asarray(weights))
  plain = fit(jnp.asarray(x), k=6, key=KEY)
  assert cost(weighted.centroids) < 0.8 * cost(plain.centroids)
  np.testing.assert_allclose(cost(weighted.centroids), weighted.error, rtol=1e-4)


def test_as_many_centroids_as_points_is_exact_and_weightless_points_pull_nothing():
  x, _ = points(20)
  assert float(fit(jnp.asarray(x), k=20, key=KEY).error) == 0
  assert float(fit(jnp.asarray(x), k=32, key=KEY).error) == 0
  weights = jnp.zeros(20).at[3].set(1.0)
  found = fit(jnp.asarray(x), k=2, key=KEY, weights=weights)
  assert np.isfinite(found.centroids).all() and float(found.error) < 1e-12


def test_distances_go_through_in_parts(monkeypatch):
  x, _ = points(50)
  whole = kmeans.nearest(jnp.asarray(x), jnp.asarray(x[:7]))
  monkeypatch.setattr(kmeans, "CHUNK", 40)
  jax.tree.map(
    np.testing.assert_array_equal, kmeans.nearest(jnp.asarray(x), jnp.asarray(x[:7])), whole
  )
