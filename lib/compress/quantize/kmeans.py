# SPDX-License-Identifier: Apache-2.0
"""k-means: a table of vectors for many, by Lloyd's iterations in one compiled loop.

Points may be weighted, as VPTQ weights vectors of weights by the curvature they meet. The first
centroids are distinct points drawn at random; a centroid that no point is nearest to moves to the
point that is worst served, so an iteration never raises the error. Distances are computed for some
points at a time, so that memory does not grow with points times centroids. Ties go to the lower
index; the result depends on the key alone. Everything is in float32.

Lloyd, Least squares quantization in PCM, 1982, doi:10.1109/TIT.1982.1056489.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

CHUNK = 2**22  # distances held at a time


class Clusters(NamedTuple):
  """What k-means found.

  Attributes:
    centroids: the table.
    index: the nearest centroid of each point.
    error: weighted sum of squared distances to them.
  """

  centroids: Float[Array, "k dim"]
  index: Int32[Array, " n"]
  error: Float[Array, ""]


def nearest(
  x: Float[Array, "n dim"], centroids: Float[Array, "k dim"]
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
  """Find the nearest centroid of every point.

  Args:
    x: points.
    centroids: the table.

  Returns:
    (index, squared distance).

  Example:
    >>> nearest(jnp.array([[0.0], [3.0]]), jnp.array([[1.0], [4.0]]))[0].tolist()
    [0, 1]
  """
  n, dim = x.shape
  chunk = max(1, min(n, CHUNK // len(centroids)))
  x, c = x.astype(jnp.float32), centroids.astype(jnp.float32)
  half = 0.5 * jnp.square(c).sum(axis=1)

  def some(part: jax.Array) -> tuple[jax.Array, jax.Array]:
    closeness = jnp.matmul(part, c.T, precision="highest") - half[None, :]
    at = jnp.argmax(closeness, axis=1).astype(jnp.int32)
    return at, jnp.square(part - c[at]).sum(axis=1)

  parts = jnp.pad(x, [(0, -n % chunk), (0, 0)]).reshape(-1, chunk, dim)
  index, distance = jax.lax.map(some, parts)
  return index.reshape(-1)[:n], distance.reshape(-1)[:n]


def fit(
  x: Float[Array, "n dim"],
  *,
  k: int,
  key: jax.Array,
  weights: Float[Array, " n"] | None = None,
  iterations: int = 100,
  tolerance: float = 1e-5,
) -> Clusters:
  """Choose centroids of small weighted squared distance to the points.

  Args:
    x: points.
    k: how many centroids; where there are fewer points, the last centroids repeat them.
    key: draws the first centroids.
    weights: what a point counts, not negative; None is 1.
    iterations: how often to assign and average, at most.
    tolerance: stop when an iteration lowers the error by less than this part of it.

  Returns:
    The centroids, float32, and what they were fitted to.

  Example:
    >>> x = jnp.array([[0.0], [1.0], [8.0], [9.0]])
    >>> found = fit(x, k=2, key=jax.random.key(0))
    >>> sorted(found.centroids[:, 0].tolist()), found.error.item()
    ([0.5, 8.5], 1.0)
  """
  n = len(x)
  x = x.astype(jnp.float32)
  weights = jnp.ones(n, jnp.float32) if weights is None else weights.astype(jnp.float32)
  first = jax.random.permutation(key, n)[jnp.arange(k) % n]

  def assign(centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    index, distance = nearest(x, centroids)
    return index, weights * distance

  def update(centroids: jax.Array, index: jax.Array, wrong: jax.Array) -> jax.Array:
    sums = jnp.zeros_like(centroids).at[index].add(weights[:, None] * x)
    mass = jnp.zeros(k, jnp.float32).at[index].add(weights)
    means = sums / jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)[:, None]
    empty = jnp.zeros(k, bool).at[index].set(True) == 0
    worst = jnp.argsort(-wrong)[jnp.clip(jnp.cumsum(empty) - 1, 0, n - 1)]
    held = jnp.where((mass > 0)[:, None], means, centroids)  # points of no weight pull nothing
    return jnp.where(empty[:, None], x[worst], held)

  def better(state: tuple) -> jax.Array:
    *_, wrong, before, count = state
    return (count < iterations) & (wrong.sum() < (1 - tolerance) * before)

  def again(state: tuple) -> tuple:
    centroids, index, wrong, _, count = state
    centroids = update(centroids, index, wrong)
    return centroids, *assign(centroids), wrong.sum(), count + 1

  start = (x[first], *assign(x[first]), jnp.float32(jnp.inf), 0)
  centroids, index, wrong, _, _ = jax.lax.while_loop(better, again, start)
  return Clusters(centroids, index, wrong.sum())
