# SPDX-License-Identifier: Apache-2.0
"""Statistics of per-example gradients, and of the loss along random directions.

The empirical Fisher information, its diagonal or its diagonal blocks: the labels are the data's
own; the loss is each example's mean next-token loss, or of an image classifier its loss. Folds like
the others: sums and counts add.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slope:
  """How steep the loss is at a leaf.

  Attributes:
    value: mean magnitude of the loss's derivative along a standard normal direction.
    size: number of weights.
  """

  value: Any
  size: Any


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


@functools.partial(jax.jit, static_argnames="loss")
def add_gradients(
  total: Any,
  params: Any,
  batch: Any,
  *fixed: Any,
  loss: Callable[..., jax.Array],
) -> Any:
  """Add every example's gradient to a running total.

  Args:
    total: tree like `params`, float32.
    params: tree of arrays.
    batch: as for `add_squared_gradients`.
    *fixed: what else the loss takes.
    loss: (params, batch of one example, *fixed) -> scalar.

  Returns:
    The new total.

  Example:
    >>> w = {"w": jnp.array(3.0)}
    >>> f = lambda p, t: p["w"] * t.sum()
    >>> add_gradients({"w": jnp.array(0.0)}, w, jnp.array([[1], [2]]), loss=f)["w"].item()
    3.0
  """

  def summed(params: Any) -> jax.Array:
    rows = jax.tree.map(lambda x: x[:, None], batch)
    return jax.vmap(lambda row: loss(params, row, *fixed))(rows).sum()

  return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, jax.grad(summed)(params))


@functools.partial(jax.jit, static_argnames=("loss", "block"))
def add_gradient_blocks(
  total: Any,
  params: Any,
  batch: Any,
  *fixed: Any,
  loss: Callable[..., jax.Array],
  block: int,
) -> Any:
  """Add the outer products of every example's gradient with itself, within blocks of rows.

  Args:
    total: tree of the structure of `params`, (..., blocks, cols, block, block) float32.
    params: tree of kernels (..., rows, cols).
    batch: as for `add_squared_gradients`.
    *fixed: what else the loss takes.
    loss: (params, batch of one example, *fixed) -> scalar.
    block: rows of a column that are taken together; the last ones are padded with zeros.

  Returns:
    The new total.

  Example:
    >>> f = lambda p, t: (p.T * t).sum()
    >>> empty, w = jnp.zeros((1, 1, 2, 2)), jnp.ones((2, 1))
    >>> add_gradient_blocks(empty, w, jnp.array([[1.0, 3.0]]), loss=f, block=2)[0, 0].tolist()
    [[1.0, 3.0], [3.0, 9.0]]
  """
  rows = jax.tree.map(lambda x: x[:, None], batch)
  each = jax.vmap(lambda row: jax.grad(loss)(params, row, *fixed))(rows)

  def add(t: jax.Array, g: jax.Array) -> jax.Array:
    *lead, height, cols = g.shape
    g = jnp.pad(g.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, -height % block), (0, 0)])
    g = g.reshape(*lead, -1, block, cols)
    return t + jnp.einsum("e...ic,e...jc->...cij", g, g, precision="highest")

  return jax.tree.map(add, total, each)


@functools.partial(jax.jit, static_argnames=("loss", "names"))
def slope(
  flat: dict[str, jax.Array],
  batch: Any,
  rest: Any,
  key: jax.Array,
  which: jax.Array,
  place: jax.Array,
  noise: jax.Array,
  *,
  loss: Callable[..., jax.Array],
  names: tuple[str, ...],
) -> jax.Array:
  """Measure how steep the loss is along a random direction of one kernel, by two forward passes.

  Args:
    flat: name to kernel (..., rows, cols); those with more axes hold several along the first.
    batch: all of it goes through the network at once.
    rest: what else the loss takes.
    key: of the direction, standard normal.
    which: place of the kernel's name in `names`.
    place: which along the first axis, where there are several.
    noise: how far to go along the direction, to both sides.
    loss: (flat, batch, rest) -> scalar.
    names: the names of `flat`.

  Returns:
    The magnitude of the difference quotient.

  Example:
    >>> f = lambda p, t, rest: 3.0 * p["w"].sum()
    >>> given = jnp.int32(0), jnp.int32(0), jnp.float32(0.5)
    >>> w, key = {"w": jnp.ones((1, 1))}, jax.random.key(1)
    >>> got = slope(w, jnp.ones(1), {}, key, *given, loss=f, names=("w",))
    >>> bool(abs(got - 3 * abs(jax.random.normal(key, (1, 1))).sum()) < 1e-5)
    True
  """

  def moved(name: str) -> Callable[[jax.Array], dict[str, jax.Array]]:
    def move(by: jax.Array) -> dict[str, jax.Array]:
      w = flat[name]
      if w.ndim == 2:
        return {**flat, name: w + (by * jax.random.normal(key, w.shape)).astype(w.dtype)}
      z = by * jax.random.normal(key, w.shape[1:])
      return {**flat, name: w.at[place].add(z.astype(w.dtype))}

    return move

  def at(by: jax.Array) -> jax.Array:
    return loss(jax.lax.switch(which, [moved(n) for n in names], by), batch, rest)

  up, down = jax.lax.map(at, noise * jnp.array([1.0, -1.0]))
  return jnp.abs(up - down).astype(jnp.float32) / (2 * noise)
