# SPDX-License-Identifier: Apache-2.0
"""Sums over runs of a matrix's rows: where they start, and each run cut out before it is read."""

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


def zeros(shape: tuple[int, ...], *like: Any) -> jax.Array:
  """Make the float32 zeros that a sum starts from.

  Within `jax.shard_map` an array's type says over which axes of the mesh it differs, and what a
  loop carries must be of one type: that of the products, which differ where their operands do.

  Args:
    shape: of the sum.
    *like: arrays, or trees of them, that the summands are made of.

  Returns:
    Zeros that differ, by their type, over the axes over which any of the arrays does.

  Example:
    >>> zeros((2,), jnp.ones(3)).tolist()
    [0.0, 0.0]
  """
  none = [(a[(0,) * a.ndim] != 0) & False for a in jax.tree.leaves(like) if a.size]
  return sum((x.astype(jnp.float32) for x in none), jnp.zeros(shape, jnp.float32))


def like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
  """Describe a kernel's output, which within `jax.shard_map` differs where its operands do.

  Args:
    shape, dtype: of the output.
    *operands: arrays, or trees of them.

  Returns:
    The shape, with a type like that of `zeros`.

  Example:
    >>> like((2,), jnp.bfloat16, jnp.ones(3)).shape
    (2,)
  """
  kind = jax.typeof(zeros(shape, *operands)).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
