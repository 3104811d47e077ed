# SPDX-License-Identifier: Apache-2.0
"""Tune numbers of a block by gradient descent, so that what comes out of it changes least.

What methods share that learn tables, scales or mixtures of a block's kernels together. The data is
gone through in order, as often as the epochs say. The loss is divided by that of the start, so that
step sizes mean the same whatever the scale of the activations; it is taken over all the data before
the first step and then `LOOKS` times, the last after the last step, and the best is kept: no result
is worse than the start. Parameters and losses are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import reconstruct

LOOKS = 10  # at the loss of all the data, which costs as much as an epoch's forward passes
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # outputs, rows of the data -> a number a row


def block(
  build: Callable[[Any], Mapping[str, Any]],
  start: Any,
  *,
  inputs: Float[Array, "rows *places width"],
  targets: Float[Array, "rows *places width"],
  forward: Callable[[Mapping[str, Any], jax.Array], jax.Array],
  optimizer: optax.GradientTransformation,
  epochs: int,
  batch: int,
  loss: Loss | None = None,
  penalty: Callable[[Any], jax.Array] | None = None,
  hard: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Any:
  """Minimise the change in a block's output over what its kernels are made of.

  Args:
    build: parameters -> relative address to leaf, array or compressed.
    start: tree of float32 arrays to begin from.
    inputs: what enters the block.
    targets: what should come out.
    forward: (relative address to leaf, some rows of inputs) -> outputs.
    optimizer: optax transformation.
    epochs: times that the data is gone through; 0 returns the start.
    batch: rows a step.
    loss: (outputs, which rows) -> a number a row; None is the mean square from the targets.
    penalty: parameters -> what is added to the loss, which is 1 at the start.
    hard: what the parameters become in the end, for the choice of the best; None is `build`.

  Returns:
    The best parameters seen.

  Example:
    >>> import functools
    >>> forward = lambda kernels, h: h @ kernels["up"]
    >>> h = jnp.eye(2)
    >>> found = block(lambda s: {"up": s * h}, jnp.ones(()), inputs=h, targets=3 * h,
    ...   forward=forward, optimizer=optax.adam(0.1), epochs=100, batch=2)
    >>> abs(float(found) - 3) < 0.1
    True
  """
  rows = inputs.shape[0]
  batch = min(batch, rows)
  each = -(-rows // batch)
  steps = epochs * each
  if not steps:
    return start

  def squares(out: jax.Array, at: jax.Array) -> jax.Array:
    return reconstruct.squared(out, targets[at].astype(jnp.float32))

  def of(made: Mapping[str, Any], at: jax.Array) -> jax.Array:
    return (loss or squares)(forward(made, inputs[at]).astype(jnp.float32), at)

  def whole(x: Any) -> jax.Array:
    at, made = jnp.arange(each * batch).reshape(each, batch), (hard or build)(x)
    found = jax.lax.map(lambda part: of(made, jnp.minimum(part, rows - 1)), at)
    return jnp.where(at < rows, found, 0.0).sum() / rows

  unit = whole(start)
  unit = jnp.where(unit > 0, unit, 1.0)

  def one(i: jax.Array, state: tuple) -> tuple:
    x, moments = state
    at = (i * batch + jnp.arange(batch)) % rows

    def objective(x: Any) -> jax.Array:
      return of(build(x), at).mean() / unit + (0.0 if penalty is None else penalty(x))

    change, moments = optimizer.update(jax.grad(objective)(x), moments, x)
    return optax.apply_updates(x, change), moments

  def stretch(state: tuple, bounds: tuple) -> tuple[tuple, None]:
    x, moments, best, least = state
    x, moments = jax.lax.fori_loop(bounds[0], bounds[1], one, (x, moments))
    now = whole(x) / unit
    best = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), x, best)
    return (x, moments, best, jnp.minimum(now, least)), None

  looks = min(LOOKS, steps)
  ends = jnp.arange(looks + 1) * steps // looks
  state = (start, optimizer.init(start), start, jnp.float32(1.0))
  (_, _, best, _), _ = jax.lax.scan(stretch, state, (ends[:-1], ends[1:]))
  return best


def parts(leaf: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
  """Take the numbers out of a leaf that can be learned: tables, scales, factors.

  Args:
    leaf: a compressed leaf; its integers stay as they are.

  Returns:
    (the floating-point arrays in float32, what puts others in their places: float32 they are
    rounded to how they are stored, passing gradients straight through).

  Example:
    >>> from treesurgeon.core import leaves
    >>> table = leaves.Codebook(jnp.zeros((1, 1), jnp.uint8), jnp.ones((2, 1)), 1, 1, 1, 1)
    >>> found, put = parts(table)
    >>> put([2 * x for x in found]).dense().tolist()
    [[2.0]]
  """
  arrays, structure = jax.tree.flatten(leaf)
  # 8-bit floats are codes, or exponents, which no small step changes.
  wide = [jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > 1 for a in arrays]
  learned = [i for i, yes in enumerate(wide) if yes]

  def put(values: list[jax.Array]) -> Any:
    new = list(arrays)
    for i, x in zip(learned, values, strict=True):
      new[i] = x.astype(arrays[i].dtype)
    return jax.tree.unflatten(structure, new)

  return [arrays[i].astype(jnp.float32) for i in learned], put


def kernels(
  w: Mapping[str, Any], *, only: Callable[[str], bool] = lambda name: True, **how: Any
) -> dict[str, Any]:
  """Tune everything that can be learned in the kernels of a block.

  Args:
    w: relative address to compressed leaf.
    only: which of them.
    **how: inputs, targets, forward, optimizer, epochs, batch, loss as for `block`.

  Returns:
    Relative address to leaf.
  """
  taken = {n: parts(leaf) for n, leaf in w.items() if only(n)}

  def build(x: Mapping[str, list[jax.Array]]) -> dict[str, Any]:
    return {n: leaf if n not in x else taken[n][1](x[n]) for n, leaf in w.items()}

  return build(block(build, {n: found for n, (found, _) in taken.items()}, **how))
