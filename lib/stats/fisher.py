# SPDX-License-Identifier: Apache-2.0
"""Diagonal empirical Fisher information: mean squared per-example gradients.

The labels are the data's own (the empirical Fisher), the loss is each example's mean next-token
loss. A fold like the others: a sum of squares and a count, which add.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@functools.partial(jax.jit, static_argnames="loss")
def add_squared_gradients(
  total: Any,
  params: Any,
  tokens: Int[Array, "batch length"],
  *fixed: Any,
  loss: Callable[..., jax.Array],
) -> Any:
  """Add every example's squared gradient to a running total.

  Args:
    total: tree like `params`, float32.
    params: tree of arrays.
    tokens: examples.
    *fixed: what else the loss takes.
    loss: (params, tokens (1, length), *fixed) -> scalar.

  Returns:
    The new total.

  Example:
    >>> w = {"w": jnp.array(3.0)}
    >>> f = lambda p, t: p["w"] * t.sum()
    >>> add_squared_gradients({"w": jnp.array(0.0)}, w, jnp.array([[1], [2]]), loss=f)["w"].item()
    5.0
  """

  def one(carry: Any, row: jax.Array) -> tuple[Any, None]:
    g = jax.grad(loss)(params, row[None, :], *fixed)
    return jax.tree.map(lambda t, x: t + jnp.square(x.astype(jnp.float32)), carry, g), None

  return jax.lax.scan(one, total, tokens)[0]
