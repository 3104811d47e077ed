# SPDX-License-Identifier: Apache-2.0
"""Learn arrays by gradient descent over batches: coefficients of a merge, weights, scales.

One compiled step, whatever the number of batches; the loop runs over them in order, as often as the
steps ask.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax


def minimize(
  loss: Callable[..., jax.Array],
  start: Any,
  batches: Iterable[Any],
  *fixed: Any,
  optimizer: optax.GradientTransformation,
  steps: int,
  spec: Any = None,
) -> tuple[Any, np.ndarray]:
  """Minimise a loss over batches.

  Args:
    loss: `loss(spec, x, batch, key, *fixed)` -> scalar; defined at the top of a module, for
      compiled steps are kept by it. `key` is a random key of the step.
    start: tree of float32 arrays to begin from.
    batches: array trees, of one shape best; iterated again when they end.
    *fixed: what else the loss reads, such as task vectors; not differentiated.
    optimizer: optax transformation; make it once, for compiled steps are kept by it too.
    steps: updates.
    spec: static, hashable first argument of the loss.

  Returns:
    (the tree after the last step, losses before each step as float32; while traced, none).

  Raises:
    ValueError: if there is no batch.

  Example:
    >>> def loss(spec, x, batch, key):
    ...   return jnp.sum((x - batch) ** 2)
    >>> x, _ = minimize(loss, jnp.zeros(1), [np.ones(1)], optimizer=optax.sgd(0.25), steps=20)
    >>> round(float(x[0]), 3)
    1.0
  """
  x, state = _begin(optimizer, start, fixed)
  losses = []
  feed = itertools.cycle(batches)
  for i in range(steps):
    batch = next(feed, None)
    if batch is None:
      raise ValueError("there is no batch to learn from")
    x, state, value = _step(loss, optimizer, spec, x, state, batch, jnp.int32(i), fixed)
    losses.append(value)
  if any(isinstance(value, jax.core.Tracer) for value in losses):
    losses = []
  return x, np.asarray(losses, np.float32)


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _begin(optimizer: optax.GradientTransformation, x: Any, fixed: Any) -> tuple[Any, Any]:
  """Put the state where `fixed` lies, as the first step would; the second shall not recompile."""
  del fixed
  return x, optimizer.init(x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
  loss: Callable[..., jax.Array],
  optimizer: optax.GradientTransformation,
  spec: Any,
  x: Any,
  state: Any,
  batch: Any,
  i: jax.Array,
  fixed: tuple[Any, ...],
) -> tuple[Any, Any, jax.Array]:
  key = jax.random.fold_in(jax.random.key(0), i)
  value, slope = jax.value_and_grad(lambda x: loss(spec, x, batch, key, *fixed))(x)
  change, state = optimizer.update(slope, state, x)
  return optax.apply_updates(x, change), state, value
