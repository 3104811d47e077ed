# SPDX-License-Identifier: Apache-2.0
"""Learn how to round by gradient descent, so that outputs change least: what such methods share.

A `Rounding` says what is learned beside the weights, and how it makes codes and a grid; rounding
passes gradients straight through. Two losses: of one kernel, tr(dWᵀ H dW) for the second moment H
of its inputs, which is the exact mean over all calibration tokens; of a block, the mean square of
the change in what comes out of it, over batches drawn from the calibration states.

The loss is divided by that of the start, so that step sizes and penalties mean the same whatever
the scale of the activations. It is taken over all the data before the first step and then `looks`
times, the last after the last step; the best is kept, of a kernel by itself column by column, so
that no result is worse than the start.
Parameters and losses are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import learnable
from treesurgeon.core import leaves, lifting, needs, step

LOOKS = 10  # at the loss of a block over all data, which costs as much as several steps

Distance = Callable[[jax.Array, jax.Array], jax.Array]  # outputs, targets -> one number a row
# hyper-parameters -> (how to round, optimizer, distance of outputs from targets)
Plan = Callable[..., tuple[learnable.Rounding, optax.GradientTransformation, Distance]]


def squared(out: jax.Array, target: jax.Array) -> jax.Array:
  """Compute the mean square of a difference, row by row.

  Args:
    out: outputs.
    target: what they should be.

  Returns:
    One number a row.

  Example:
    >>> squared(jnp.zeros((1, 2)), jnp.array([[1.0, 3.0]])).tolist()
    [5.0]
  """
  return jnp.square(out - target).mean(axis=tuple(range(1, out.ndim)))


def learn(
  rounding: learnable.Rounding,
  kernels: Mapping[str, jax.Array],
  forms: Mapping[str, learnable.Form],
  *,
  loss: Callable[[dict[str, jax.Array], jax.Array], jax.Array],
  whole: Callable[[dict[str, jax.Array]], jax.Array],
  optimizer: optax.GradientTransformation,
  steps: int,
  looks: int,
  key: jax.Array,
) -> dict[str, learnable.Learned]:
  """Learn how to round some kernels together.

  Args:
    rounding: what is learned.
    kernels: name to (rows, cols).
    forms: name to grids.
    loss: (name to float32 weights, key) -> scalar, of a draw of the data.
    whole: name to weights -> loss of all the data; a scalar, or one a column of every kernel where
      columns do not matter to each other.
    optimizer: of what is learned.
    steps: updates.
    looks: how often the loss of all data is taken, for the best to be kept.
    key: for the draws.

  Returns:
    Name to what was learned: the best that `whole` saw.
  """

  def made(learned: dict[str, learnable.Learned], *, hard: bool) -> dict[str, jax.Array]:
    return {
      n: learnable.weights(rounding, w, learned[n], forms[n], hard=hard) for n, w in kernels.items()
    }

  def objective(learned: dict[str, learnable.Learned], i: jax.Array, unit: jax.Array) -> jax.Array:
    extra = sum(rounding.penalty(x, i / max(1, steps)) for x in learned.values())
    return loss(made(learned, hard=False), jax.random.fold_in(key, i)) / unit + extra

  def one(i: jax.Array, state: tuple, unit: jax.Array) -> tuple:
    learned, moments = state
    change, moments = optimizer.update(jax.grad(objective)(learned, i, unit), moments, learned)
    moved: Any = optax.apply_updates(learned, change)
    return {n: rounding.project(x) for n, x in moved.items()}, moments

  def stretch(state: tuple, bounds: tuple) -> tuple[tuple, None]:
    learned, moments, best, least, unit = state
    first, last = bounds
    learned, moments = jax.lax.fori_loop(
      first, last, lambda i, state: one(i, state, unit), (learned, moments)
    )
    error = whole(made(learned, hard=True))
    begun = jnp.isinf(least).all() & (error.sum() > 0)
    best = jax.tree.map(lambda new, old: jnp.where(error < least, new, old), learned, best)
    unit = jnp.where(begun, error.sum(), unit)
    return (learned, moments, best, jnp.minimum(error, least), unit), None

  learned = {n: rounding.start(w.astype(jnp.float32), forms[n]) for n, w in kernels.items()}
  ends = jnp.concatenate([jnp.zeros(1, int), jnp.arange(looks + 1) * steps // looks])
  shape = jax.eval_shape(lambda: whole(made(learned, hard=True))).shape
  state = (learned, optimizer.init(learned), learned, jnp.full(shape, jnp.inf), 1.0)
  (_, _, best, _, _), _ = jax.lax.scan(stretch, state, (ends[:-1], ends[1:]))
  return best


def kernel(
  w: Any,
  hessian: Any,
  *,
  plan: Plan,
  steps: int,
  batch: int,
  bits: int,
  group_size: int,
  symmetric: bool,
  scale_dtype: str | None,
  **how: Any,
) -> Any:
  """Quantize one kernel by the second moment of its inputs.

  Args:
    w: (..., rows, cols), or a leaf; what is quantized in just this format stays as it is.
    hessian: the fold's state.
    plan: the method's.
    steps: updates.
    batch: unused; there is nothing to draw.
    bits, group_size, symmetric, scale_dtype: see `grid.fit`.
    **how: the plan's other arguments.

  Returns:
    A `QuantizedTensor`.
  """
  del batch
  if grids.already(w, bits=bits, group_size=group_size, symmetric=symmetric):
    return w
  dense = leaves.dense(w)
  form = learnable.form_of(dense, bits, group_size, symmetric, scale_dtype)
  rounding, optimizer, _ = plan(steps=steps, **how)
  h = hessian.moment.astype(jnp.float32)

  def whole(made: dict[str, jax.Array]) -> jax.Array:
    wrong = made["w"] - dense.astype(jnp.float32)
    return (wrong * jnp.matmul(h, wrong, precision="highest")).sum(axis=-2, keepdims=True)

  best = learn(
    rounding, {"w": dense}, {"w": form}, loss=lambda made, key: whole(made).sum(), whole=whole,
    optimizer=optimizer, steps=steps, looks=max(1, steps), key=jax.random.key(0),
  )  # fmt: skip
  return learnable.tensor(rounding, dense, best["w"], form)


def block(
  w: Mapping[str, Any],
  *,
  inputs: Float[Array, "rows *places width"],
  targets: Float[Array, "rows *places width"],
  forward: Callable[[Mapping[str, Any], jax.Array], jax.Array],
  key: jax.Array,
  plan: Plan,
  steps: int,
  batch: int,
  bits: int,
  group_size: int,
  symmetric: bool,
  scale_dtype: str | None,
  **how: Any,
) -> dict[str, Any]:
  """Quantize a block's kernels together, by what comes out of the block.

  Args:
    w: name to leaf; what is quantized in just this format stays as it is.
    inputs: what enters the block.
    targets: what should come out.
    forward: (name to leaf, some rows of inputs) -> outputs.
    key: for the draws of rows.
    plan: the method's.
    steps: updates.
    batch: rows a step.
    bits, group_size, symmetric, scale_dtype: see `grid.fit`.
    **how: the plan's other arguments.

  Returns:
    Name to leaf.
  """
  done = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
  dense = {n: leaves.dense(x) for n, x in w.items() if not grids.already(x, **done)}
  if not dense:
    return dict(w)
  forms = {
    n: learnable.form_of(x, bits, group_size, symmetric, scale_dtype) for n, x in dense.items()
  }
  rounding, optimizer, distance = plan(steps=steps, **how)
  rows = inputs.shape[0]
  batch = min(batch, rows)

  def some(made: dict[str, jax.Array], at: jax.Array) -> jax.Array:
    cast = {n: m.astype(dense[n].dtype) for n, m in made.items()}
    out, target = forward(cast, inputs[at]), targets[at]
    return distance(out.astype(jnp.float32), target.astype(jnp.float32))

  def loss(made: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return some(made, jax.random.randint(key, (batch,), 0, rows)).mean()

  def whole(made: dict[str, jax.Array]) -> jax.Array:
    at = jnp.arange(-(-rows // batch) * batch).reshape(-1, batch)
    each = jax.lax.map(lambda part: some(made, jnp.minimum(part, rows - 1)), at)
    return jnp.where(at < rows, each, 0.0).sum() / rows

  best = learn(
    rounding, dense, forms, loss=loss, whole=whole, optimizer=optimizer, steps=steps,
    looks=min(LOOKS, max(1, steps)), key=key,
  )  # fmt: skip
  return {**w, **{n: learnable.tensor(rounding, x, best[n], forms[n]) for n, x in dense.items()}}


def lift(plan: Plan, *, per: str, select: str | None, **hyper: Any) -> step.Step:
  """Lift a method of this kind to trees, and check its arguments.

  Args:
    plan: defined at the top of a module.
    per: "block" or "kernel".
    select: which addresses.
    **hyper: bits, group_size, symmetric, scale_dtype, steps, batch, and what the plan takes.

  Returns:
    The step.

  Raises:
    ValueError: for values out of range.
  """
  grids.check(**hyper)
  if per not in ("block", "kernel"):
    raise ValueError(f"per={per!r}: valid are block, kernel")
  grids.check_float(hyper["scale_dtype"])
  if hyper["steps"] < 0:
    raise ValueError(f"steps={hyper['steps']}: valid is 0, rounding to nearest, or more")
  if hyper["batch"] < 1:
    raise ValueError(f"batch={hyper['batch']}: a step needs 1 row of the calibration data or more")
  hyper = {"plan": plan, **hyper}
  if per == "block":
    return lifting.over_blocks(block, hyper=hyper, select=select, random=True, raw=True)
  wants = {"hessian": needs.Statistic("second_moment")}
  return lifting.over_leaves(
    kernel, hyper=hyper, select=select, wants=wants, raw=True, scope="block"
  )
