# SPDX-License-Identifier: Apache-2.0
"""Walk through the blocks: change one, recompute its outputs with the change, go on to the next.

Each statistic is taken on inputs that the already changed blocks gave, by the block as it was: the
model's own (GPTQ), or, for statistics of donors, that donor's block on the donor's batches
(RegMean++). Blocks that are tuned as a whole also see what the model as it was gives
(`needs.Block`), so its hidden states go along.

Several steps may walk at once, each block through all of them before the next is read. The outcome
is that of one walk after another: level j of the hidden states are those of the model as steps 1 to
j make it, so step j sees at every block what it would see in a walk of its own. Held at a time: one
block, its statistics, and the hidden states of every level that a step asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from treesurgeon import models
from treesurgeon.core import leaves, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import activations, collect, donors, gradients, progress, statistics

Part = dict[str, Any]  # address to leaf
_EMBED, _REST = -2, -1  # places beside the layers, as `statistics.layer_of` has them


def walk(
  one: step.Step,
  model: model_lib.Model,
  materials: collect.Materials,
  key: jax.Array,
  *,
  check: Callable[[Part], None] = lambda part: None,
) -> model_lib.Model:
  """Apply a step block by block to a model in memory.

  Args:
    one: a step of scope "leaf" or "block".
    model: the model.
    materials: what the caller brought.
    key: the step's key.
    check: looks at what the step puts in, part by part.

  Returns:
    The changed model.

  Raises:
    ValueError: for missing evidence, or a step that changes leaves of several blocks together.
  """
  collect.require(one, materials)
  rest = [n for n in one.needs if not by_block(one.needs[n])]
  given = collect.given(one, model, materials, rest)
  mine = Walk(one, model, materials, key, given, check=check, aux=model.aux)
  news: Part = {}

  def put(part: Part) -> None:
    news.update({a: x for a, x in part.items() if a in mine.chosen})

  go([mine], model, materials, put)
  return model.update(news).replace(aux=mine.aux)


def by_block(need: needs.Need) -> bool:
  """Tell whether a walk gathers a need as it goes, one block at a time.

  Args:
    need: any need.

  Returns:
    True for statistics of inputs and for blocks.

  Example:
    >>> by_block(needs.Statistic("absmax")), by_block(needs.Statistic("fisher"))
    (True, False)
  """
  if isinstance(need, needs.Statistic):
    return need.fold not in gradients.FOLDS
  return isinstance(need, needs.Blocks)


class Walk:
  """One step on its way through the blocks.

  Args:
    one: a step of scope "leaf" or "block".
    source: the model that is walked through.
    materials: what the caller brought.
    key: the step's key.
    given: its evidence that is not gathered by block.
    check: looks at what the step puts in, part by part.
    aux: by-products of earlier steps.

  Attributes:
    chosen: the addresses it changes.
    reach: how many blocks the hidden states of each collection of batches must pass, by its id.
    clean_reach: the same for those of the model as it was.
    aux: by-products.

  Raises:
    ValueError: if it changes leaves of several blocks together.
  """

  def __init__(
    self,
    one: step.Step,
    source: needs.Source,
    materials: collect.Materials,
    key: jax.Array,
    given: Mapping[str, Any],
    *,
    check: Callable[[Part], None] = lambda part: None,
    aux: Mapping[str, Any] | None = None,
  ):
    names = list(source.addresses())
    units = one.units(names)
    refuse_torn(one, units)
    self.chosen = {a for unit in units for a in unit}
    self.aux = dict(aux or {})
    self._one, self._spec, self._key, self._given, self._check = one, source.spec, key, given, check
    asked = {n: w for n, w in one.needs.items() if by_block(w)}
    self._taps = {n: w for n, w in asked.items() if isinstance(w, needs.Statistic)}
    self._blocks = {
      n: statistics.block_layers(names, w.select)
      for n, w in asked.items()
      if isinstance(w, needs.Blocks)
    }
    self._passes = _passes(one, self._taps, source, materials, names)
    self._told: set[str] = set()
    depth = depth_of(names)
    # Donors that share their batches share the hidden states: blocks passed are the result's.
    self.batches = {id(p.batches): p.batches for p in self._passes}
    self.reach: dict[int, int] = {}
    for p in self._passes:
      last = depth if _REST in p.per_layer else max(p.per_layer)
      self.reach[id(p.batches)] = max(self.reach.get(id(p.batches), 0), last)
    self.clean_reach = 0
    if self._blocks:
      self._main = id(materials.batches)
      last = max(layers[-1] for layers in self._blocks.values())
      self.batches[self._main] = materials.batches
      self.reach[self._main] = max(self.reach.get(self._main, 0), last)
      self.clean_reach = last + 1

  def at_embedding(self, part: Part) -> Part:
    """Change what of a part is chosen: the embeddings."""
    params = paths.nest(part)
    return self._change(part, _EMBED, [p.at_embedding(self._spec, params) for p in self._passes])

  def at_block(
    self,
    layer: int,
    part: Part,
    hidden: Mapping[int, activations.Hidden],
    clean: activations.Hidden | None,
  ) -> Part:
    """Change what of a block is chosen.

    Args:
      layer: which.
      part: its leaves.
      hidden: what enters it in the changed model, by the id of the batches.
      clean: what the block as it was gives in the model as it was.

    Returns:
      The block's leaves.
    """
    nested, data = within(part), None
    states = [p.through(self._spec, nested, hidden, layer) for p in self._passes]
    if clean is not None and any(layer in layers for layers in self._blocks.values()):
      inputs = hidden[self._main].whole()
      data = statistics.block(self._spec, nested, layer, inputs, clean.whole())
    return self._change(part, layer, states, data)

  def at_head(self, part: Part, params: Any, hidden: Mapping[int, activations.Hidden]) -> Part:
    """Change what of a part is chosen: all that follows the blocks."""
    states = [p.at_head(self._spec, params, hidden) for p in self._passes]
    return self._change(part, _REST, states)

  @property
  def asks_of_head(self) -> bool:
    """Whether it takes statistics behind the blocks."""
    return any(_REST in p.per_layer for p in self._passes)

  def _change(
    self, part: Part, layer: int, states: list[Any], data: needs.Block | None = None
  ) -> Part:
    mine = {a: x for a, x in part.items() if a in self.chosen}
    if not mine:
      return part
    seen = [p.covered(layer, s) for p, s in zip(self._passes, states, strict=True)]
    evidence = _evidence(self._taps, self._passes, seen)
    own = {n: w for n, w in self._taps.items() if w.of == "model"}
    odd = statistics.remarks(own, evidence, self._told)
    tuned = {
      n: {f"layers/{layer}": data} if layer in layers else {} for n, layers in self._blocks.items()
    }
    old = model_lib.Part(self._spec, mine, aux=self.aux)
    new = self._one.apply(old, {**self._given, **evidence, **tuned}, self._key)
    self.aux.update(merged(self.aux, new.aux))
    for name, found in odd.items():
      self.aux = noted(self.aux, name, found)
    put = changes(old, new)
    self._check(put)
    if data is not None:
      jax.block_until_ready(put)  # its hidden states are about to be overwritten
    return {**part, **put}


def go(
  walks: Sequence[Walk],
  source: needs.Source,
  materials: collect.Materials,
  put: Callable[[Part], None],
  *,
  passed: Callable[[list[str]], Part | None] = lambda names: None,
) -> None:
  """Take steps through a model, part by part: embeddings, each block, what follows.

  Args:
    walks: the steps, first applied first.
    source: the model.
    materials: what the caller brought.
    put: takes every part when all steps have changed it.
    passed: names of a block -> its leaves, if an earlier run has put them already.
  """
  spec, room = source.spec, materials.room
  places: dict[int, list[str]] = {}
  for name in source.addresses():
    places.setdefault(statistics.layer_of(name), []).append(name)

  def read(place: int) -> Part:
    return room.everywhere({a: source.leaf(a) for a in places.get(place, ())})

  batches: dict[int, Any] = {id(materials.batches): materials.batches}
  reach: dict[tuple[int, int], int] = {}  # level and batches -> blocks to pass
  for j, one in enumerate(walks, 1):
    batches |= one.batches
    if one.clean_reach:
      clean = (j - 1, id(materials.batches))
      reach[clean] = max(reach.get(clean, 0), one.clean_reach)
    for feed, count in one.reach.items():
      reach[(j, feed)] = max(reach.get((j, feed), 0), count)
  last = len(walks)
  # A block that was put before is passed as it lies there, unless a step between is asked for.
  skips = all(level in (0, last) for level, _ in reach)

  levels = [read(_EMBED)]
  for one in walks:
    levels.append(one.at_embedding(levels[-1]))
  share = room.share(len(reach))
  hidden: dict[int, dict[int, activations.Hidden]] = {j: {} for j in range(last + 1)}
  for level, feed in reach:
    model = model_lib.Model(spec, paths.nest(levels[level]))
    hidden[level][feed] = activations.Hidden(
      lambda batch, model=model: statistics.embed(model, batch), batches[feed], share
    )
  put(levels[-1])
  tables = levels if any(one.asks_of_head for one in walks) else []
  del levels

  def advance(level: int, layer: int, part: Part) -> None:
    nested: Any = None
    for feed, states in hidden[level].items():
      if layer < reach[(level, feed)]:
        nested = within(_opened(part)) if nested is None else nested
        states.advance(statistics.forwarded(spec, nested, layer))

  for layer in progress.track(range(depth_of(list(source.addresses()))), "blocks"):
    done = passed(places[layer]) if skips else None
    if done is not None:
      if hidden[0]:
        advance(0, layer, read(layer))
      advance(last, layer, room.everywhere(done))
      continue
    part = read(layer)
    for j, one in enumerate(walks, 1):
      advance(j - 1, layer, part)
      clean = hidden[j - 1].get(id(materials.batches)) if layer < one.clean_reach else None
      part = one.at_block(layer, part, hidden[j], clean)
    advance(last, layer, part)
    put(part)
  part = read(_REST)
  for j, one in enumerate(walks, 1):
    params = paths.nest({**(tables[j] if tables else {}), **part})
    part = one.at_head(part, params, hidden[j])
  put(part)


def _opened(part: Part) -> Part:
  """Make compressed leaves dense once for all batches, but for those that quantize inputs too."""

  def inputs(x: Any) -> bool:
    return isinstance(x, leaves.ActivationQuantized)

  def opened(x: Any) -> Any:
    if not leaves.is_leaf(x) or any(map(inputs, jax.tree.leaves(x, is_leaf=inputs))):
      return x
    return _dense(x)

  return {a: opened(x) for a, x in part.items()}


_dense = jax.jit(leaves.dense)


def within(part: Part) -> dict[str, Any]:
  """Nest one layer's leaves by their addresses within it.

  Args:
    part: address to leaf.

  Returns:
    What `models.block` takes.

  Example:
    >>> within({"layers/3/mlp/up/kernel": 1})
    {'mlp': {'up': {'kernel': 1}}}
  """
  return paths.nest({a.split("/", 2)[2]: x for a, x in part.items()})


def depth_of(names: Sequence[str]) -> int:
  """Count the layers that addresses speak of.

  Args:
    names: all addresses of a model.

  Returns:
    One more than the largest layer index.

  Example:
    >>> depth_of(["embed/w", "layers/0/w", "layers/1/w"])
    2
  """
  return 1 + max([-1, *map(statistics.layer_of, names)])


def changes(old: model_lib.Model, new: model_lib.Model) -> dict[str, Any]:
  """List the leaves, as stored, that a step put in.

  Args:
    old: a model.
    new: what a step made of it.

  Returns:
    Name to leaf; a stacked one goes by its segment, "layers/0:12/...".

  Example:
    >>> m = model_lib.Model(None, {"a": jax.numpy.ones(1), "b": jax.numpy.ones(1)})
    >>> list(changes(m, m.update({"a": jax.numpy.zeros(1)})))
    ['a']
  """
  held = {id(x) for x in paths.walk(old.params).values()}
  return {a: x for a, x in paths.walk(new.params).items() if id(x) not in held}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Put together what several parts of a model told; mappings are united.

  Args:
    old: what the earlier parts told.
    new: what one more tells.

  Returns:
    Both.

  Example:
    >>> merged({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "b": 2})
    {'a': {'x': 1, 'y': 2}, 'b': 2}
  """
  out = dict(old)
  for name, value in new.items():
    both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
    out[name] = {**out[name], **value} if both else value
  return out


def noted(aux: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
  """Add to the notes among a model's by-products; mappings are united.

  Args:
    aux: by-products.
    name: of the note.
    value: JSON.

  Returns:
    By-products with the note.

  Example:
    >>> noted({"notes": {"a": {"x": 1}}}, "a", {"y": 2})
    {'notes': {'a': {'x': 1, 'y': 2}}}
  """
  return {**aux, "notes": merged(aux.get("notes", {}), {name: value})}


class _Pass:
  """The statistics wanted of the model itself, or of one donor, on its batches."""

  def __init__(
    self, want: statistics.Wanted, batches: Any, donor: needs.Source | None, room: activations.Room
  ):
    self.want, self.batches, self.donor, self._room = want, batches, donor, room
    self.per_layer = statistics.by_layer(want)

  def through(
    self, spec: Any, nested: Any, hidden: Mapping[int, activations.Hidden], layer: int
  ) -> Any:
    pairs, states = self.per_layer.get(layer, ()), None
    if not pairs:
      return None
    params = nested if self.donor is None else donors.layer(self.donor, layer)
    for h, first, mask in hidden[id(self.batches)]:
      _, states = statistics.through_block(
        spec, params, h, layer, pairs, states, first=first, mask=mask, out=False
      )
    return self._room.everywhere(states)

  def at_embedding(self, spec: Any, params: Any) -> Any:
    pairs, states = self.per_layer.get(_EMBED, ()), None
    if self.donor is not None and pairs:
      params = donors.outer(self.donor)
    model, first = model_lib.Model(spec, params), 0
    for batch in self.batches if pairs else ():
      states = statistics.at_embedding(model, batch, pairs, states, first=first)
      first += len(models.inputs(batch))
    return states

  def at_head(self, spec: Any, params: Any, hidden: Mapping[int, activations.Hidden]) -> Any:
    pairs, states = self.per_layer.get(_REST, ()), None
    if not pairs:
      return None
    if self.donor is not None:
      params = donors.outer(self.donor)
    for h, first, mask in hidden[id(self.batches)]:
      states = statistics.at_head(spec, params, h, pairs, states, first=first, mask=mask)
    return self._room.everywhere(states)

  def covered(self, layer: int, states: Any) -> dict[tuple[str, str], Any]:
    mine = {k: v for k, v in self.want.items() if statistics.layer_of(k[1]) == layer}
    return statistics.covered(mine, {layer: states})


def _passes(
  one: step.Step,
  taps: Mapping[str, needs.Statistic],
  source: needs.Source,
  materials: collect.Materials,
  names: list[str],
) -> list[_Pass]:
  own = statistics.wanted({n: w for n, w in taps.items() if w.of == "model"}, names)
  theirs = statistics.wanted({n: w for n, w in taps.items() if w.of == "donors"}, names)
  room = materials.room
  found = [_Pass(own, materials.batches, None, room)] if own else []
  if theirs:
    sources = collect.sources(one, source, materials)
    dealt = donors.deal(materials.batches, materials.donor_batches, len(sources))
    found += [_Pass(theirs, b, s, room) for b, s in zip(dealt, sources, strict=True)]
  return found


def _evidence(
  taps: Mapping[str, needs.Statistic], passes: list[_Pass], seen: list[dict[tuple[str, str], Any]]
) -> dict[str, Any]:
  out: dict[str, Any] = {}
  own = [s for p, s in zip(passes, seen, strict=True) if p.donor is None]
  theirs = [s for p, s in zip(passes, seen, strict=True) if p.donor is not None]
  for name, need in taps.items():
    views = [
      {a: x for (fold, a), x in s.items() if fold == need.fold}
      for s in (own if need.of == "model" else theirs)
    ]
    out[name] = views[0] if need.of == "model" else donors.Together(views)
  return out


def refuse_torn(one: step.Step, units: step.Units) -> None:
  """Refuse a unit that does not lie within one block, the embeddings, or what follows.

  Args:
    one: the step, for the message.
    units: its units.

  Raises:
    ValueError: naming two addresses that change together.
  """
  for unit in units:
    places = {statistics.layer_of(a) for a in unit}
    if len(places) > 1:
      raise ValueError(
        f"{one!r} changes {unit[0]} together with {unit[-1]}, which lies in another block; use "
        "the driver 'run'"
      )
