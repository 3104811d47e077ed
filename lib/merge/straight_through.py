# SPDX-License-Identifier: Apache-2.0
"""Find the permutation of one network under which its mean with another loses least.

Straight-through estimator of Ainsworth et al., "Git Re-Basin", 2022 (arXiv 2209.04836), section
3.3. A free copy θ starts at the first network A. Each step projects it onto the permutations of B
by weight matching, runs the midpoint of A and the projection on a batch, and hands the gradient
straight through the projection to θ. The permutation of the least loss seen is kept.

Where we differ: Adam instead of SGD with momentum, and the first projection is the weight matching
of A itself, so that it is never worse than that on the first batch.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from treesurgeon import models
from treesurgeon.core import paths
from treesurgeon.merge import matching, units


def match(
  spec: Any,
  groups: Sequence[units.Group],
  a: Mapping[str, Any],
  b: Mapping[str, Any],
  index: units.Index,
  batches: Iterable[Any],
  *,
  rng: np.random.Generator,
  steps: int = 100,
  rate: float = 1e-2,
  sweeps: int = 100,
) -> tuple[matching.Match, np.ndarray]:
  """Permute one network so that its mean with another has a low loss.

  Args:
    spec: architecture.
    groups: from `permutations.groups`.
    a: address to array, of the network that stays; all its leaves.
    b: the network to permute.
    index: where to start, such as `permutations.identity`.
    batches: as for `models.nll`; iterated again when they end.
    rng: of the groups' order.
    steps: updates.
    rate: Adam's learning rate.
    sweeps: of each projection, at most.

  Returns:
    (the match of the least loss at the midpoint, losses before each update in nats).

  Raises:
    ValueError: if there is no batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=3)
    >>> flat = paths.flatten(models.init(spec, jax.random.key(0)))
    >>> mlp = units.Group("mlp", 3, (units.Member("layers/0/mlp/up/kernel", 1),))
    >>> start = {"layers/0/mlp/up/kernel": {1: np.arange(3)}}
    >>> rng, text = np.random.default_rng(0), [np.array([[1, 2, 3]])]
    >>> found, losses = match(spec, [mlp], flat, flat, start, text, rng=rng, steps=1)
    >>> found.index["layers/0/mlp/up/kernel"][1].tolist(), len(losses)
    ([0, 1, 2], 1)
  """
  optimizer = _optimizer(rate)
  a = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(a))
  theta, state = a, optimizer.init(a)
  feed = itertools.cycle(batches)
  best, least, losses, gain = None, np.inf, [], 0.0
  for _ in range(steps):
    batch = next(feed, None)
    if batch is None:
      raise ValueError("the straight-through estimator needs batches and none was given")
    host = {name: np.asarray(x) for name, x in theta.items()}
    found = matching.match(groups, host, b, index, rng=rng, sweeps=sweeps)
    index, gain = found.index, gain + found.gain
    theta, state, loss = _update(spec, optimizer, theta, a, units.apply(b, index), state, batch)
    losses.append(float(loss))
    if best is None or losses[-1] < least:
      best, least = matching.Match(index, found.sweeps, gain), losses[-1]
  return best or matching.Match(index, 0, 0.0), np.asarray(losses, np.float32)


@functools.lru_cache(maxsize=8)
def _optimizer(rate: float) -> optax.GradientTransformation:
  """Make the optimizer once a rate: compiled updates are kept by it."""
  return optax.adam(rate)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
  spec: Any, optimizer: Any, theta: Any, a: Any, projected: Any, state: Any, batch: Any
) -> tuple[Any, Any, jax.Array]:
  def loss(theta: Any) -> jax.Array:
    def midpoint(x: jax.Array, y: jax.Array, free: jax.Array) -> jax.Array:
      through = y + free - jax.lax.stop_gradient(free)
      return 0.5 * (x + through)

    return models.nll(spec, paths.unflatten(jax.tree.map(midpoint, a, projected, theta)), batch)

  value, slope = jax.value_and_grad(loss)(theta)
  change, state = optimizer.update(slope, state, theta)
  return optax.apply_updates(theta, change), state, value
