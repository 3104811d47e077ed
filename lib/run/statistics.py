# SPDX-License-Identifier: Apache-2.0
"""Collect calibration statistics, block by block, through the taps that feed the kernels.

One compiled program a layer structure, in which only what is asked for is computed and kept. The
drivers call the parts; `collect.evidence` calls the whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models, stats
from treesurgeon.core import meshes, needs, paths, step
from treesurgeon.core import model as model_lib

Wanted = dict[tuple[str, str], list[str]]  # (need's fold, address) -> names of the needs


class TreeView(Mapping[str, Any]):
  """A nested tree read by address; layers are cut out when asked for."""

  def __init__(self, tree: Mapping[str, Any], wrap: Callable[[Any], Any] = lambda x: x):
    self._tree, self._wrap = tree, wrap

  def __getitem__(self, address: str) -> Any:
    return self._wrap(paths.get(self._tree, address))

  def __iter__(self) -> Iterator[str]:
    return iter(paths.addresses(self._tree))

  def __len__(self) -> int:
    return len(paths.addresses(self._tree))


def wanted(statistics: Mapping[str, needs.Statistic], names: Sequence[str]) -> Wanted:
  """List which fold is wanted at which address.

  Args:
    statistics: needs by name.
    names: all addresses of the model.

  Returns:
    (fold, address) to the names of the needs that want it.

  Raises:
    ValueError: for an unknown fold or a selection that matches nothing.
  """
  out: Wanted = {}
  for name, need in statistics.items():
    if need.fold not in stats.FOLDS:
      raise ValueError(
        f"unknown statistic {need.fold!r}; known: {', '.join(stats.FOLDS)}, fisher, gradient, slope"
      )
    for address in paths.select(names, need.select or step.BLOCK_KERNELS):
      out.setdefault((need.fold, address), []).append(name)
  return out


def tap_statistics(
  model: model_lib.Model, want: Wanted, batches: Iterable[Any]
) -> dict[tuple[str, str], Any]:
  """Collect statistics of kernels' inputs in one pass over the batches.

  Args:
    model: the model.
    want: from `wanted`.
    batches: token batches, or mappings (`models.losses`).

  Returns:
    (fold, address) to its state.

  Raises:
    ValueError: if a tap collected nothing.
  """
  per_layer = by_layer(want)
  last = max((k for k in per_layer if k >= 0), default=-1)
  if -1 in per_layer:
    last = paths.num_layers(model.params) - 1
  states: dict[int, Any] = {}
  first = 0
  for batch in batches:
    if -2 in per_layer:
      states[-2] = at_embedding(model, batch, per_layer[-2], states.get(-2), first=first)
    h = embed(model, batch)
    for start, stop, tree in paths.segments(model.params):
      for i in range(start, min(stop, last + 1)):
        h, states[i] = through_block(
          model.spec, tree, h, i, per_layer.get(i, ()), states.get(i), index=i - start, first=first
        )
    if -1 in per_layer:
      states[-1] = at_head(model.spec, model.params, h, per_layer[-1], states.get(-1), first=first)
    first += len(h)
  return covered(want, states)


@dataclasses.dataclass(frozen=True)
class Network:
  """A network's blocks as one function, see `needs.Block`.

  Attributes:
    spec: the architecture.
  """

  spec: Any

  def __call__(self, params: Any, h: jax.Array, layer: Any) -> jax.Array:
    """Run one block."""
    return models.block(self.spec, params, h, layer=layer)[0]


def blocks(
  model: model_lib.Model, batches: Iterable[Any], *, select: str | None = None
) -> dict[str, needs.Block]:
  """Collect what goes into blocks and comes out of them, in the model as it is.

  Args:
    model: the model.
    batches: of one length.
    select: regular expression over addresses; blocks that hold a match are wanted.

  Returns:
    Block's name to its data. A block's targets are the next one's inputs.

  Raises:
    ValueError: if nothing is selected, there is no batch, or batches differ in length.
  """
  want = block_layers(model.addresses(), select)
  hidden = [embed(model, batch) for batch in batches]
  inputs, out = whole(hidden), {}
  for start, stop, tree in paths.segments(model.params):
    for i in range(start, min(stop, want[-1] + 1)):
      hidden = [through_block(model.spec, tree, h, i, (), None, index=i - start)[0] for h in hidden]
      targets = whole(hidden)
      if i in want:
        nested = paths.nest({k: paths.take(x, i - start) for k, x in paths.walk(tree).items()})
        out[f"layers/{i}"] = block(model.spec, nested, i, inputs, targets)
      inputs = targets
  return out


def block(spec: Any, params: Any, layer: int, inputs: jax.Array, targets: jax.Array) -> needs.Block:
  """Make the evidence of one block.

  Args:
    spec: architecture.
    params: the layer's leaves, nested.
    layer: which layer.
    inputs: see `needs.Block`.
    targets: see `needs.Block`.

  Returns:
    The evidence.
  """
  return needs.Block(inputs, targets, meshes.to_auto(params), jnp.int32(layer), Network(spec))


def whole(batches: Sequence[jax.Array]) -> jax.Array:
  """Join the hidden states of all batches.

  Args:
    batches: hidden states.

  Returns:
    One array, examples first.

  Raises:
    ValueError: if there are none, or they differ in length.

  Example:
    >>> whole([jnp.ones((2, 3, 4)), jnp.ones((1, 3, 4))]).shape
    (3, 3, 4)
  """
  shapes = {h.shape[1:] for h in batches}
  if len(shapes) != 1:
    raise ValueError(
      "to tune blocks, all calibration batches must have one length; there are "
      + (" and ".join(str(s[0]) for s in sorted(shapes)) or "none")
    )
  return jnp.concatenate(batches) if len(batches) > 1 else batches[0]


def block_layers(names: Sequence[str], select: str | None) -> list[int]:
  """List the layers that hold a selected address.

  Args:
    names: all addresses.
    select: regular expression; None means every kernel inside the layers.

  Returns:
    Layer indices, ascending.

  Raises:
    ValueError: if there is none.

  Example:
    >>> block_layers(["layers/0/up/kernel", "layers/1/up/kernel"], "layers/1/.*")
    [1]
  """
  return sorted({layer_of(a) for a in paths.select(names, select or step.BLOCK_KERNELS)} - {-1, -2})


def by_layer(want: Wanted) -> dict[int, tuple[tuple[str, str], ...]]:
  """Sort wanted statistics by layer, as (fold, tap) pairs; -1 is the head, -2 the embedding.

  Args:
    want: from `wanted`.

  Returns:
    Layer to its distinct (fold, tap) pairs.

  Example:
    >>> q, k = "layers/0/attn/q/kernel", "layers/0/attn/k/kernel"
    >>> by_layer({("absmax", q): [], ("absmax", k): []})
    {0: (('absmax', 'attn/in'),)}
  """
  out: dict[int, dict[tuple[str, str], None]] = {}
  for fold, address in want:
    out.setdefault(layer_of(address), {})[(fold, models.tap_of(address))] = None
  return {i: tuple(sorted(pairs)) for i, pairs in out.items()}


def layer_of(address: str) -> int:
  """Return the layer an address lies in, -2 for the embedding, -1 for what follows the layers.

  Args:
    address: a leaf's address.

  Returns:
    The layer index, -2 or -1.

  Example:
    >>> layer_of("layers/7/mlp/up/kernel"), layer_of("lm_head/kernel")
    (7, -1)
  """
  parts = address.split("/")
  return int(parts[1]) if parts[0] == "layers" else -2 if parts[0] == "embed" else -1


def covered(want: Wanted, states: Mapping[int, Any]) -> dict[tuple[str, str], Any]:
  """Look every wanted statistic up and refuse one that saw no token.

  Args:
    want: from `wanted`.
    states: layer to {(fold, tap): state}.

  Returns:
    (fold, address) to its state.

  Raises:
    ValueError: naming the address whose tap collected nothing.
  """
  out = {}
  for fold, address in want:
    state = (states.get(layer_of(address)) or {}).get((fold, models.tap_of(address)))
    if state is None or not float(state.count) > 0:
      raise ValueError(
        f"{address}: the tap {models.tap_of(address)!r} collected nothing; the calibration "
        "text is empty or the layer never ran"
      )
    out[(fold, address)] = state
  return out


def embed(model: model_lib.Model, batch: Any) -> jax.Array:
  """Embed a batch.

  Args:
    model: the model.
    batch: tokens (batch, length), or a mapping (`models.losses`).

  Returns:
    The input of the first block.
  """
  outer = {k: v for k, v in model.params.items() if k == "embed"}
  return _embed(model.spec, meshes.to_auto(outer), models.inputs(batch))


@functools.partial(jax.jit, static_argnames=("spec", "pairs"))
def _through(
  spec: Any,
  params: Any,
  index: Any,
  h: jax.Array,
  layer: jax.Array,
  first: jax.Array,
  pairs: tuple,
  states: Any,
) -> tuple[jax.Array, Any]:
  if index is not None:
    params = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params)
  out, seen = models.block(spec, params, h, layer=layer, observe=_observer(pairs, first))
  return out, _merge(pairs, states, seen)


def through_block(
  spec: Any,
  params: Any,
  h: jax.Array,
  layer: int,
  pairs: Sequence[tuple[str, str]],
  states: Any,
  *,
  index: int | None = None,
  first: int = 0,
) -> tuple[jax.Array, Any]:
  """Run one block and add what its taps saw to the running statistics.

  Args:
    spec: architecture.
    params: the layer's leaves, or a segment's stacked ones with `index`.
    h: the block's input.
    layer: which layer.
    pairs: (fold, tap) to observe.
    states: running statistics, or None.
    index: the layer's place in the segment.
    first: how many examples came before, which numbers the tokens.

  Returns:
    (the block's output, statistics).
  """
  flat = None if states is None else tuple(states[p] for p in pairs)
  where = None if index is None else jnp.int32(index)
  params = meshes.to_auto(params)
  h, flat = _through(spec, params, where, h, jnp.int32(layer), jnp.int32(first), tuple(pairs), flat)
  return h, dict(zip(pairs, flat, strict=True))


def at_embedding(
  model: model_lib.Model,
  batch: Any,
  pairs: Sequence[tuple[str, str]],
  states: Any,
  *,
  first: int = 0,
) -> Any:
  """Add what the embedding's taps see to the running statistics.

  Args:
    model: the model.
    batch: a batch for a network that has such taps, an image classifier.
    pairs: (fold, tap) to observe.
    states: running statistics, or None.
    first: how many examples came before.

  Returns:
    Statistics.
  """
  outer = meshes.to_auto({k: v for k, v in model.params.items() if k == "embed"})
  flat = None if states is None else tuple(states[p] for p in pairs)
  flat = _entrance(model.spec, outer, models.inputs(batch), jnp.int32(first), tuple(pairs), flat)
  return dict(zip(pairs, flat, strict=True))


def at_head(
  spec: Any,
  params: Any,
  h: jax.Array,
  pairs: Sequence[tuple[str, str]],
  states: Any,
  *,
  first: int = 0,
) -> Any:
  """Add what the head's taps see to the running statistics.

  Args:
    spec: architecture.
    params: all parameters; the layers are not read.
    h: the last block's output.
    pairs: (fold, tap) to observe.
    states: running statistics, or None.
    first: how many examples came before.

  Returns:
    Statistics.
  """
  outer = meshes.to_auto({k: v for k, v in params.items() if k != "layers"})
  flat = None if states is None else tuple(states[p] for p in pairs)
  flat = _head(spec, outer, h, jnp.int32(first), tuple(pairs), flat)
  return dict(zip(pairs, flat, strict=True))


@functools.partial(jax.jit, static_argnames="spec")
def _embed(spec: Any, params: Any, inputs: jax.Array) -> jax.Array:
  return models.embed(spec, params, inputs)


@functools.partial(jax.jit, static_argnames=("spec", "pairs"))
def _entrance(
  spec: Any, params: Any, inputs: jax.Array, first: jax.Array, pairs: tuple, states: Any
) -> Any:
  seen: dict[str, Any] = {}
  models.embed(spec, params, inputs, observe=_noting(pairs, first, seen))
  return _merge(pairs, states, seen)


@functools.partial(jax.jit, static_argnames=("spec", "pairs"))
def _head(spec: Any, params: Any, h: jax.Array, first: jax.Array, pairs: tuple, states: Any) -> Any:
  seen: dict[str, Any] = {}
  models.head(spec, params, h, observe=_noting(pairs, first, seen))
  return _merge(pairs, states, seen)


def _noting(
  pairs: tuple[tuple[str, str], ...], first: jax.Array, seen: dict[str, Any]
) -> Callable[[str, jax.Array], None]:
  observer = _observer(pairs, first)

  def observe(name: str, x: jax.Array) -> None:
    seen[name] = observer(name, x)

  return observe


def _observer(
  pairs: tuple[tuple[str, str], ...], first: jax.Array
) -> Callable[[str, jax.Array], Any]:
  def observe(name: str, x: jax.Array) -> Any:
    folds = [f for f, tap in pairs if tap == name]
    if not folds:
      return None
    flat = x.reshape(-1, x.shape[-1])
    numbers = first * (len(flat) // len(x)) + jnp.arange(len(flat), dtype=jnp.int32)
    empty = {f: stats.FOLDS[f].init(x.shape[-1]) for f in folds}
    return {f: stats.FOLDS[f].update(empty[f], flat, numbers) for f in folds}

  return observe


def _merge(pairs: tuple[tuple[str, str], ...], states: Any, seen: Mapping[str, Any]) -> tuple:
  absent = sorted({tap for _, tap in pairs} - set(seen))
  if absent:
    raise ValueError(
      f"the forward pass has no tap {absent[0]!r}, so no statistic can be taken there"
    )
  new = tuple(seen[tap][fold] for fold, tap in pairs)
  if states is None:
    return new
  return tuple(stats.FOLDS[f].merge(s, n) for (f, _), s, n in zip(pairs, states, new, strict=True))
