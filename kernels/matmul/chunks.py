# SPDX-License-Identifier: Apache-2.0
"""A sum over runs of a matrix's rows, each cut out before it is read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def add_up(part: Callable[..., jax.Array], y: jax.Array, xs: Any) -> jax.Array:
  """Add up a function's values over runs; a backward pass makes its insides again.

  Args:
    part: what to add of each run.
    y: to add to.
    xs: arguments of `part`, cut along their first axes.

  Returns:
    The sum.

  Example:
    >>> float(add_up(jnp.dot, jnp.zeros(()), (jnp.ones((3, 2)), jnp.ones((3, 2)))))
    6.0
  """
  remade = jax.checkpoint(part, prevent_cse=False)
  count = jax.tree.leaves(xs)[0].shape[0]
  if count == 1:
    return y + remade(*jax.tree.map(lambda a: a[0], xs))

  def step(acc: jax.Array, run: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
    # XLA fuses the cut of a run with what reads it, through barriers too, and on a CPU that takes
    # up to ten times as long. It does not fuse into the branches of a condition.
    same = lambda *chunk: acc
    return jax.lax.cond(run[1] >= 0, lambda *c: acc + remade(*c), same, *run[0]), None

  return jax.lax.scan(step, y, (xs, jnp.arange(count)))[0]
