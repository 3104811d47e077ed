# SPDX-License-Identifier: Apache-2.0
"""Statistics of the loss at leaves: Fisher information, mean gradients, slopes.

Unlike statistics of inputs they take the whole network, so drivers collect them once, on the model
before the step changes any of it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models, stats
from treesurgeon.core import leaves, meshes, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import statistics

NOISE = 1e-3  # size of the steps by which slopes are measured, ECoFLaP's


def take(
  need: needs.Statistic, model: model_lib.Model, batches: Iterable[Any]
) -> Mapping[str, Any]:
  """Collect what a need asks for.

  Args:
    need: of a fold in `FOLDS`.
    model: the model; the leaves selected must not be compressed.
    batches: token batches, or mappings (`models.losses`).

  Returns:
    Address to value.

  Raises:
    ValueError: if a leaf is compressed, nothing is selected, or there was no example.
  """
  if need.fold == "fisher":
    found = fisher(model, batches, select=need.select, block=need.block)
  else:
    found = FOLDS[need.fold](model, batches, select=need.select)
  moved: dict[str, bool] = {}  # no kernel of an expert that never fires has a gradient
  for address in found if getattr(model.spec, "num_experts", 0) else ():
    expert = statistics.expert_of(address)
    if expert is not None and not moved.get(expert):
      moved[expert] = bool(jnp.any(jax.tree.leaves(found[address])[0] != 0))
  statistics.tell_idle([expert for expert, some in moved.items() if not some])
  return found


def shape(need: needs.Statistic, leaf: Any) -> Any:
  """Describe what `take` finds at a leaf.

  Args:
    need: of a fold in `FOLDS`.
    leaf: an array, or its shape.

  Returns:
    Shapes and dtypes.

  Example:
    >>> shape(needs.Statistic("fisher", block=4), jnp.ones((6, 3))).shape
    (2, 3, 4, 4)
  """
  if need.fold == "slope":
    return stats.Slope(*(jax.ShapeDtypeStruct((), jnp.float32) for _ in range(2)))
  if need.block is None:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
  *batch, rows, cols = leaf.shape
  blocks = -(-rows // need.block)
  return jax.ShapeDtypeStruct((*batch, blocks, cols, need.block, need.block), jnp.float32)


def fisher(
  model: model_lib.Model,
  batches: Iterable[Any],
  *,
  select: str | None = None,
  block: int | None = None,
) -> Mapping[str, Any]:
  """Collect the empirical Fisher information of leaves, its diagonal or diagonal blocks.

  Args:
    model: the model; the leaves selected must not be compressed.
    batches: token batches, or mappings (`models.losses`).
    select: regular expression over addresses; None means every leaf. Layers stacked with one that
      is selected come along.
    block: how many consecutive rows of a column of a kernel are taken together; None is the
      diagonal. With blocks, all gradients of a batch's examples are in memory.

  Returns:
    Address to the mean squared per-example gradient, float32; with blocks, to the mean of the
    gradients' outer products (..., blocks, cols, block, block), padded with zeros.

  Raises:
    ValueError: if a leaf is compressed, nothing is selected, or there was no example.
  """
  flat, rest = _parts(model, select)
  need = needs.Statistic("fisher", block=block)
  total = {name: jnp.zeros(shape(need, x).shape, jnp.float32) for name, x in flat.items()}
  add = stats.add_squared_gradients
  if block is not None:
    add = functools.partial(stats.add_gradient_blocks, block=block)
  return _mean(add, total, model, batches, flat, rest)


def gradient(
  model: model_lib.Model, batches: Iterable[Any], *, select: str | None = None
) -> Mapping[str, Any]:
  """Collect the mean gradient over examples of each example's mean loss.

  Args:
    model: the model; the leaves selected must not be compressed.
    batches: token batches, or mappings (`models.losses`).
    select: as for `fisher`.

  Returns:
    Address to the gradient, float32.

  Raises:
    ValueError: as `fisher`.
  """
  flat, rest = _parts(model, select)
  total = {name: jnp.zeros(x.shape, jnp.float32) for name, x in flat.items()}
  return _mean(stats.add_gradients, total, model, batches, flat, rest)


def slope(
  model: model_lib.Model, batches: Iterable[Any], *, select: str | None = None
) -> Mapping[str, stats.Slope]:
  """Collect how steep the loss is at each leaf along random directions, without gradients.

  One direction a batch, that depends on the address and the batch's number alone.

  Args:
    model: the model; the leaves selected must not be compressed.
    batches: token batches, or mappings (`models.losses`).
    select: regular expression over addresses; None means every kernel inside the layers.

  Returns:
    Address to the mean of |L(w + εz) - L(w - εz)| / 2ε over the batches, z standard normal.

  Raises:
    ValueError: as `fisher`.
  """
  wanted = set(paths.select(model.addresses(), select or step.BLOCK_KERNELS))
  flat, rest = _parts(model, select or step.BLOCK_KERNELS)
  loss, names = _loss(model.spec), tuple(flat)
  found: dict[str, Any] = {}
  count = 0
  for count, batch in enumerate(batches, 1):
    rows = jax.tree.map(jnp.asarray, batch)
    for which, name in enumerate(names):
      for place, address in enumerate(paths.addresses(paths.nest({name: flat[name]}))):
        if address not in wanted:
          continue
        key = jax.random.fold_in(step.leaf_key(jax.random.key(0), address), count)
        steep = stats.slope(
          flat, rows, rest, key, jnp.int32(which), jnp.int32(place), jnp.float32(NOISE),
          loss=loss, names=names,
        )  # fmt: skip
        found[address] = found.get(address, 0.0) + steep
  if not count:
    raise ValueError("slopes of the loss need at least one batch and there was none")
  sizes = {a: jnp.float32(model.struct(a).size) for a in found}
  return {a: stats.Slope(x / count, sizes[a]) for a, x in found.items()}


FOLDS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
  "fisher": fisher, "gradient": gradient, "slope": slope
}  # fmt: skip


def _parts(model: model_lib.Model, select: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
  """Split the stored leaves into those that hold a selected one, and the rest."""
  chosen = set(paths.select(model.addresses(), select or ".*"))
  params = paths.walk(meshes.to_auto(model.params))
  stacks = {name: set(paths.addresses(paths.nest({name: x}))) for name, x in params.items()}
  flat = {name: x for name, x in params.items() if stacks[name] & chosen}
  packed = [
    sorted(stacks[n] & chosen, key=paths.natural)[0] for n, x in flat.items() if leaves.is_leaf(x)
  ]
  if packed:
    raise ValueError(
      f"{packed[0]}: a compressed leaf has no gradient; take Fisher before compressing"
    )
  return flat, {name: x for name, x in params.items() if name not in flat}


def _mean(
  add: Callable[..., Any],
  total: Any,
  model: model_lib.Model,
  batches: Iterable[Any],
  flat: Mapping[str, Any],
  rest: Mapping[str, Any],
) -> Mapping[str, Any]:
  count = 0
  for batch in batches:
    rows = jax.tree.map(jnp.asarray, batch)
    total = add(total, flat, rows, rest, loss=_loss(model.spec))
    count += len(models.inputs(rows))
  if not count:
    raise ValueError("Fisher information needs at least one example and there was none")
  return statistics.TreeView(paths.nest(total), lambda x: x / count)


@functools.lru_cache(maxsize=32)
def _loss(spec: Any) -> Callable[..., jax.Array]:
  def loss(flat: Any, batch: Any, rest: Any) -> jax.Array:
    return models.nll(spec, paths.nest({**rest, **flat}), batch)

  return loss
