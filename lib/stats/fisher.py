# SPDX-License-Identifier: Apache-2.0
"""Diagonal empirical Fisher information: mean squared per-example gradients.

The labels are the data's own (the empirical Fisher); the loss is each example's mean next-token
loss, or of an image classifier its loss. A fold like the others: sums of squares and counts add.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="loss")
def add_squared_gradients(
  total: Any,
  params: Any,
  batch: Any,
  *fixed: Any,
  loss: Callable[..., jax.Array],
) -> Any:
  """Add every example's squared gradient to a running total.

  Args:
    total: tree like `params`, float32.
    params: tree of arrays.
    batch: examples, an array or a tree of arrays with the examples along the first axis.
    *fixed: what else the loss takes.
    loss: (params, batch of one example, *fixed) -> scalar.

  Returns:
    The new total.

  Example:
    >>> w = {"w": jnp.array(3.0)}
    >>> f = lambda p, t: p["w"] * t.sum()
    >>> add_squared_gradients({"w": jnp.array(0.0)}, w, jnp.array([[1], [2]]), loss=f)["w"].item()
    5.0
  """

  def one(carry: Any, row: Any) -> tuple[Any, None]:
    g = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], row), *fixed)
    return jax.tree.map(lambda t, x: t + jnp.square(x.astype(jnp.float32)), carry, g), None

  return jax.lax.scan(one, total, batch)[0]
