# SPDX-License-Identifier: Apache-2.0
"""One optimizer step as a pure function: gradients, accumulated over microbatches, and the update.

Master weights and moments are float32 whatever the storage or compute dtype.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from treesurgeon.train import objectives, optimizers, partition


class State(NamedTuple):
  """What a step changes.

  Attributes:
    step: int32 scalar, steps done.
    train: arrays that train, from `partition.split`, in float32 at least.
    optimizer: state of the optax transformation.
  """

  step: jax.Array
  train: Any
  optimizer: Any


def init(train: Any, direction: optax.GradientTransformation) -> State:
  """Start from fresh moments, and from copies, for steps give their input's memory away.

  Args:
    train: arrays that train.
    direction: the optimizer's direction.

  Returns:
    The state before the first step.

  Example:
    >>> int(init({"w": jnp.ones(2, jnp.bfloat16)}, optax.identity()).step)
    0
  """
  masters = jax.tree.map(
    lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True), train
  )
  return place(State(jnp.zeros((), jnp.int32), masters, direction.init(masters)))


def place(state: State) -> State:
  """Put scalars and fresh moments on the mesh of the parameters, if they are on one.

  Args:
    state: any state.

  Returns:
    The same values; arrays that are on the mesh already stay as they are.

  Example:
    >>> place(State(jnp.zeros((), jnp.int32), {}, ())).train
    {}
  """
  mesh = mesh_of(state.train)
  if mesh is None:
    return state
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def one(x: jax.Array) -> jax.Array:
    on_mesh = isinstance(x.sharding, jax.sharding.NamedSharding)
    return x if on_mesh else jax.device_put(x, everywhere)

  return jax.tree.map(one, state)


def mesh_of(tree: Any) -> Any:
  """Find the mesh that a tree's arrays lie on.

  Args:
    tree: arrays.

  Returns:
    The first mesh found, or None.

  Example:
    >>> mesh_of({"w": jnp.ones(2)}) is None
    True
  """
  for x in jax.tree.leaves(tree):
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
      return sharding.mesh
  return None


def build(
  spec: Any,
  *,
  objective: objectives.Objective,
  optimizer: optimizers.Optimizer,
  mask: Any,
  accumulate: int = 1,
  seed: int = 0,
) -> Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]:
  """Make the function of one step, to be jitted with its first argument donated.

  Args:
    spec: the architecture.
    objective: what to minimise.
    optimizer: direction and schedule.
    mask: from `partition.trainable`.
    accumulate: microbatches a batch is cut into; the gradient is that of the whole batch.
    seed: of the objective's randomness; step and example are folded in.

  Returns:
    (state, frozen, batch) -> (state, metrics): loss, gradient norm, learning rate, and what the
    objective reports.

  Example:
    >>> square = lambda spec, p, batch, keys: (p["w"] ** 2, {})
    >>> sgd = optimizers.build(name="sgd", b1=0.0, lr=0.5, schedule="constant", weight_decay=0.0)
    >>> run = build(None, objective=square, optimizer=sgd, mask={"w": True})
    >>> start = init({"w": jnp.float32(0.4)}, sgd.direction)
    >>> round(float(run(start, {"w": None}, jnp.zeros((1, 1)))[0].train["w"]), 6)
    0.0
  """

  def loss(train: Any, frozen: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, Any]:
    return objective(spec, partition.join(train, frozen, mask), batch, keys)

  def step(state: State, frozen: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), rows)
    grads, metrics = gradients(loss, state.train, frozen, batch, keys, accumulate=accumulate)
    lr = optimizer.schedule(state.step)
    updates, moments = optimizer.direction.update(grads, state.optimizer, state.train)
    train = jax.tree.map(lambda p, u: p - (lr * u).astype(p.dtype), state.train, updates)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads), "lr": lr}
    return State(state.step + 1, train, moments), metrics

  return step


def gradients(
  loss: Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]],
  train: Any,
  frozen: Any,
  batch: Any,
  keys: jax.Array,
  *,
  accumulate: int = 1,
) -> tuple[Any, dict[str, jax.Array]]:
  """Differentiate a weighted-mean loss over a batch, one microbatch at a time.

  Args:
    loss: (train, frozen, batch, keys) -> (mean loss, aux); aux["weight"] is its total weight.
    train: what to differentiate by.
    frozen: passed on.
    batch: tree of arrays with the batch as leading axis.
    keys: one key an example.
    accumulate: number of microbatches; divides the batch.

  Returns:
    (gradient, metrics), up to rounding those of the whole batch at once.

  Raises:
    ValueError: if the batch does not divide.

  Example:
    >>> loss = lambda w, _, x, k: ((w * x).mean(), {"weight": jnp.float32(x.size)})
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> g, _ = gradients(loss, jnp.ones(()), None, jnp.arange(4.0), keys, accumulate=2)
    >>> float(g)
    1.5
  """
  rows = jax.tree.leaves(batch)[0].shape[0]
  if accumulate < 1 or rows % accumulate:
    valid = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
    raise ValueError(
      f"a batch of {rows} is not divisible by accumulate={accumulate}; valid: {valid}"
    )
  value = jax.value_and_grad(loss, has_aux=True)

  def one(piece: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
    (mean, aux), grads = value(train, frozen, *piece)
    aux = dict(aux)
    weight = jnp.asarray(aux.pop("weight", 1.0), jnp.float32)
    return weight, (grads, {"loss": mean, **aux})

  if accumulate == 1:
    weight, (grads, metrics) = one((batch, keys))
    return grads, {**metrics, "weight": weight}

  def cut(x: jax.Array) -> jax.Array:
    # Every accumulate-th row: a batch that is sharded over devices stays so in each microbatch.
    return x.reshape(rows // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

  def add(total: Any, piece: Any) -> tuple[Any, None]:
    weight, terms = one(piece)
    weighted = jax.tree.map(lambda x: weight * x.astype(jnp.float32), terms)
    return jax.tree.map(jnp.add, total, (weight, weighted)), None

  pieces = jax.tree.map(cut, (batch, keys))
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
  (weight, sums), _ = jax.lax.scan(add, zero, pieces)
  scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
  grads, metrics = jax.tree.map(lambda x: x * scale, sums)
  return grads, {**metrics, "weight": weight}
