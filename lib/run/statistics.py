# SPDX-License-Identifier: Apache-2.0
"""Collect calibration statistics, block by block, through the taps that feed the kernels.

One compiled program a layer structure, in which only what is asked for is computed and kept. The
drivers call the parts; `collect.evidence` calls the whole.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models, stats
from treesurgeon.core import meshes, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.models import taps
from treesurgeon.run import activations

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
  model: model_lib.Model,
  want: Wanted,
  batches: Iterable[Any],
  room: activations.Room = activations.HERE,
) -> dict[tuple[str, str], Any]:
  """Collect statistics of kernels' inputs in one pass over the batches.

  Args:
    model: the model.
    want: from `wanted`.
    batches: token batches, or mappings (`models.losses`).
    room: devices.

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
    at: Any = {"first": first, "mask": room.deal(activations.mask_of(batch))}
    if -2 in per_layer:
      states[-2] = at_embedding(model, batch, per_layer[-2], states.get(-2), **at)
    h = room.deal(embed(model, batch))
    for start, stop, tree in paths.segments(model.params):
      for i in range(start, min(stop, last + 1)):
        h, states[i] = through_block(
          model.spec, tree, h, i, per_layer.get(i, ()), states.get(i), index=i - start, **at
        )
    if -1 in per_layer:
      states[-1] = at_head(model.spec, model.params, h, per_layer[-1], states.get(-1), **at)
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
  model: model_lib.Model,
  batches: Iterable[Any],
  *,
  select: str | None = None,
  room: activations.Room = activations.HERE,
) -> dict[str, needs.Block]:
  """Collect what goes into blocks and comes out of them, in the model as it is.

  Args:
    model: the model.
    batches: of one length.
    select: regular expression over addresses; blocks that hold a match are wanted.
    room: devices; all blocks' states are held in memory at once.

  Returns:
    Block's name to its data. A block's targets are the next one's inputs.

  Raises:
    ValueError: if nothing is selected, there is no batch, or batches differ in length.
  """
  want = block_layers(model.addresses(), select)
  room = dataclasses.replace(room, nbytes=None)
  hidden = activations.Hidden(lambda batch: embed(model, batch), batches, room)
  inputs, out = hidden.whole(), {}
  for start, stop, tree in paths.segments(model.params):
    for i in range(start, min(stop, want[-1] + 1)):
      hidden.advance(forwarded(model.spec, tree, i, index=i - start))
      targets = hidden.whole()
      if i in want:
        nested = paths.nest({k: paths.take(x, i - start) for k, x in paths.walk(tree).items()})
        out[f"layers/{i}"] = block(model.spec, nested, i, inputs, targets)
      inputs = targets
  return out


def forwarded(
  spec: Any, params: Any, layer: int, *, index: int | None = None
) -> Callable[[jax.Array, Any], jax.Array]:
  """Return a block as `activations.Hidden.advance` takes it.

  Args:
    spec: architecture.
    params: as for `through_block`.
    layer: which layer.
    index: as for `through_block`.

  Returns:
    (hidden states, mask) -> hidden states.
  """
  return lambda h, mask: through_block(spec, params, h, layer, (), None, index=index, mask=mask)[0]


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
  made = needs.Block(inputs, targets, meshes.to_auto(params), jnp.int32(layer), Network(spec))
  if getattr(spec, "num_experts", 0):
    fired = np.asarray(_fired(spec, made.params, inputs, made.layer))
    tell_idle([f"layers/{layer}/mlp/experts/{i}" for i in np.flatnonzero(~fired)])
  return made


@functools.partial(jax.jit, static_argnames="spec")
def _fired(spec: Any, params: Any, inputs: jax.Array, layer: jax.Array) -> jax.Array:
  """Tell which experts any token goes to, row by row of the inputs."""

  def row(x: jax.Array) -> jax.Array:
    def gates(name: str, x: jax.Array) -> jax.Array | None:
      return x if name == taps.GATES else None

    _, seen = models.block(spec, params, x[None], layer=layer, observe=gates)
    return (seen[taps.GATES] > 0).any(axis=(0, 1))

  return jax.lax.map(row, inputs).any(axis=0)


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


def expert_of(address: str) -> str | None:
  """Return the address of the expert that a leaf belongs to.

  Args:
    address: a leaf's address.

  Returns:
    The address, or None.

  Example:
    >>> expert_of("layers/3/mlp/experts/5/up/kernel")
    'layers/3/mlp/experts/5'
  """
  parts = address.split("/")
  inside = parts[0] == "layers" and taps.expert_of("/".join(parts[2:])) is not None
  return "/".join(parts[:5]) if inside else None


def covered(want: Wanted, states: Mapping[int, Any]) -> dict[tuple[str, str], Any]:
  """Look every wanted statistic up and refuse one that saw no token, but for an expert's.

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
    idle = expert_of(address) is not None  # it may be that no token goes there; see `remarks`
    if state is None or not (idle or float(state.count) > 0):
      raise ValueError(
        f"{address}: the tap {models.tap_of(address)!r} collected nothing; the calibration "
        "text is empty or the layer never ran"
      )
    out[(fold, address)] = state
  return out


def remarks(
  wants: Mapping[str, needs.Statistic], evidence: Mapping[str, Any], told: set[str]
) -> dict[str, dict[str, int]]:
  """Say what is odd about statistics, for the lineage; warn where tokens are too few or none.

  Args:
    wants: needs by name, of the model's own statistics.
    evidence: name to {address: state}.
    told: taps whose want of tokens a warning has told already; added to.

  Returns:
    "dead_inputs": by address, how many input features were never active; "rank_deficit": of how
    much of its rank a second moment is short, because there were fewer tokens than features;
    "idle_experts": experts to which no token went, each with 0. What is not there is left out.
  """
  idle: dict[str, int] = {}
  dead: dict[str, int] = {}
  short: dict[str, int] = {}
  known: dict[int, tuple[int, int, int]] = {}
  for name in wants:
    for address, state in evidence[name].items():
      if id(state) not in known:  # one for all kernels that a tap feeds
        known[id(state)] = _looked_at(state)
      silent, tokens, features = known[id(state)]
      expert = expert_of(address)
      if expert is not None and not tokens:
        idle[expert] = 0
        continue
      if silent:
        dead[address] = silent
      if tokens < features:
        short[address] = features - tokens
        tap = address if layer_of(address) < 0 else models.tap_of(address)
        tap = re.sub(r"experts/\d+", "experts", tap)  # one warning for all, the notes name each
        if tap not in told:
          told.add(tap)
          warnings.warn(
            f"{address}: {tokens} calibration tokens for {features} input features, so the second "
            f"moment lacks at least {features - tokens} of its rank; more text would help",
            stacklevel=2,
          )
  tell_idle(list(idle))
  found = {"idle_experts": idle, "dead_inputs": dead, "rank_deficit": short}
  return {k: v for k, v in found.items() if v}


def tell_idle(experts: Sequence[str]) -> None:
  """Warn of experts to which no token went.

  Args:
    experts: their addresses.
  """
  if experts:
    warnings.warn(
      f"{', '.join(experts)} never fired on the calibration set, so nothing is known of what "
      "enters them and their weights are changed without it; more, or more varied, text would help",
      stacklevel=2,
    )


def _looked_at(state: Any) -> tuple[int, int, int]:
  """Return (inputs never active, tokens, features whose moment needs as many tokens, or 0)."""
  tokens = int(state.count)
  if isinstance(state, stats.SecondMoment):
    return int(_zeros(jnp.diagonal(state.moment))), tokens, len(state.moment)
  if isinstance(state, stats.PerFeature):
    return int(_zeros(state.value)), tokens, 0
  if isinstance(state, stats.Range):
    return int(_zeros(jnp.maximum(state.high, -state.low))), tokens, 0
  return 0, tokens, 0


@jax.jit
def _zeros(x: jax.Array) -> jax.Array:
  return (x == 0).sum()


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


@functools.partial(jax.jit, static_argnames=("spec", "pairs", "out"))
def _through(
  spec: Any,
  params: Any,
  index: Any,
  h: jax.Array,
  layer: jax.Array,
  first: jax.Array,
  mask: Any,
  pairs: tuple,
  states: Any,
  out: bool,
) -> tuple[Any, Any]:
  if index is not None:
    params = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params)
  more = {} if mask is None else {"mask": mask}
  after, seen = models.block(
    spec, params, h, layer=layer, observe=_observer(pairs, first, mask), **more
  )
  return after if out else None, _merge(pairs, states, seen)


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
  mask: Any = None,
  out: bool = True,
) -> tuple[Any, Any]:
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
    mask: (batch, length), nonzero at real tokens: the others are not attended to, nor counted.
    out: whether the block's output is wanted; without it less is computed.

  Returns:
    (the block's output or None, statistics).
  """
  flat = None if states is None else tuple(states[p] for p in pairs)
  where = None if index is None else jnp.int32(index)
  h, flat = _through(
    spec, meshes.to_auto(params), where, h, jnp.int32(layer), jnp.int32(first), mask, tuple(pairs),
    flat, out,
  )  # fmt: skip
  return h, dict(zip(pairs, flat, strict=True))


def at_embedding(
  model: model_lib.Model,
  batch: Any,
  pairs: Sequence[tuple[str, str]],
  states: Any,
  *,
  first: int = 0,
  mask: Any = None,
) -> Any:
  """Add what the embedding's taps see to the running statistics.

  Args:
    model: the model.
    batch: a batch for a network that has such taps, an image classifier.
    pairs: (fold, tap) to observe.
    states: running statistics, or None.
    first: how many examples came before.
    mask: as for `through_block`.

  Returns:
    Statistics.
  """
  outer = meshes.to_auto({k: v for k, v in model.params.items() if k == "embed"})
  flat = None if states is None else tuple(states[p] for p in pairs)
  flat = _entrance(
    model.spec, outer, models.inputs(batch), jnp.int32(first), mask, tuple(pairs), flat
  )
  return dict(zip(pairs, flat, strict=True))


def at_head(
  spec: Any,
  params: Any,
  h: jax.Array,
  pairs: Sequence[tuple[str, str]],
  states: Any,
  *,
  first: int = 0,
  mask: Any = None,
) -> Any:
  """Add what the head's taps see to the running statistics.

  Args:
    spec: architecture.
    params: all parameters; the layers are not read.
    h: the last block's output.
    pairs: (fold, tap) to observe.
    states: running statistics, or None.
    first: how many examples came before.
    mask: as for `through_block`.

  Returns:
    Statistics.
  """
  outer = meshes.to_auto({k: v for k, v in params.items() if k != "layers"})
  flat = None if states is None else tuple(states[p] for p in pairs)
  flat = _head(spec, outer, h, jnp.int32(first), mask, tuple(pairs), flat)
  return dict(zip(pairs, flat, strict=True))


@functools.partial(jax.jit, static_argnames="spec")
def _embed(spec: Any, params: Any, inputs: jax.Array) -> jax.Array:
  return models.embed(spec, params, inputs)


@functools.partial(jax.jit, static_argnames=("spec", "pairs"))
def _entrance(
  spec: Any, params: Any, inputs: jax.Array, first: jax.Array, mask: Any, pairs: tuple, states: Any
) -> Any:
  seen: dict[str, Any] = {}
  models.embed(spec, params, inputs, observe=_noting(pairs, first, mask, seen))
  return _merge(pairs, states, seen)


@functools.partial(jax.jit, static_argnames=("spec", "pairs"))
def _head(
  spec: Any, params: Any, h: jax.Array, first: jax.Array, mask: Any, pairs: tuple, states: Any
) -> Any:
  seen: dict[str, Any] = {}
  models.head(spec, params, h, observe=_noting(pairs, first, mask, seen))
  return _merge(pairs, states, seen)


def _noting(
  pairs: tuple[tuple[str, str], ...], first: jax.Array, mask: Any, seen: dict[str, Any]
) -> Callable[[str, jax.Array], None]:
  observer = _observer(pairs, first, mask)

  def observe(name: str, x: jax.Array) -> None:
    seen[name] = observer(name, x)

  return observe


def _observer(
  pairs: tuple[tuple[str, str], ...], first: jax.Array, mask: Any
) -> Callable[[str, jax.Array], Any]:
  gates: list[jax.Array] = []

  def observe(name: str, x: jax.Array) -> Any:
    if name == taps.GATES:
      gates.append(x)
    folds = [f for f, tap in pairs if tap == name]
    if not folds:
      return None
    flat = x.reshape(-1, x.shape[-1])
    numbers = first * (len(flat) // len(x)) + jnp.arange(len(flat), dtype=jnp.int32)
    if mask is not None:
      numbers = jnp.where(mask.reshape(-1) != 0, numbers, -1)
    expert = taps.expert_of(name)
    if expert is not None:  # only tokens that go there count
      numbers = jnp.where(gates[-1][..., expert].reshape(-1) > 0, numbers, -1)
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
