# SPDX-License-Identifier: Apache-2.0
"""Walk through the blocks: change one, recompute its outputs with the change, go on to the next.

Each statistic is taken on inputs that the already changed blocks gave, by the block as it was: the
model's own (GPTQ), or, for statistics of donors, that donor's block on the donor's batches
(RegMean++). Held at a time: one block's statistics, and the hidden states of all batches.
"""

from collections.abc import Mapping
from typing import Any

import jax

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, paths, step
from treesurgeon.run import collect, donors, gradients, progress, statistics


def walk(
  one: step.Step, model: model_lib.Model, materials: collect.Materials, key: jax.Array
) -> model_lib.Model:
  """Apply a step block by block.

  Args:
    one: a step of scope "leaf" or "block".
    model: the model.
    materials: what the caller brought.
    key: the step's key.

  Returns:
    The changed model.

  Raises:
    ValueError: for missing evidence, or a step that changes leaves of several blocks together.
  """
  collect.require(one, materials)
  names = model.addresses()
  units = one.units(names)
  _refuse_torn(one, units)
  chosen = {a for unit in units for a in unit}
  asked = {n: w for n, w in one.needs.items() if isinstance(w, needs.Statistic)}
  taps = {n: w for n, w in asked.items() if w.fold not in gradients.FOLDS}
  tuned = {n: w for n, w in one.needs.items() if isinstance(w, needs.Blocks)}
  rest = [n for n in one.needs if n not in taps and n not in tuned]
  given = collect.given(one, model, materials, rest)
  passes = _passes(one, taps, model, materials, names)
  # Donors that share their batches share the hidden states: blocks passed are those of the result.
  feeds = {id(p.batches): p.batches for p in passes}
  if tuned:
    feeds[id(materials.batches)] = materials.batches
  depth = paths.num_layers(model.params)
  last = max((depth if -1 in p.per_layer else max(p.per_layer) for p in passes), default=-1)
  blocks = {n: statistics.block_layers(names, w.select) for n, w in tuned.items()}
  last_tuned = max((layers[-1] for layers in blocks.values()), default=-1)
  last = max(last, last_tuned)
  aux = dict(model.aux)

  def change(
    part: Mapping[str, Any], states: list[Any], layer: int, data: needs.Block | None = None
  ) -> dict[str, Any]:
    if not part:
      return {}
    seen = [p.covered(layer, s) for p, s in zip(passes, states, strict=True)]
    old = model_lib.Part(model.spec, part, aux=aux)
    mine = {n: {f"layers/{layer}": data} if layer in blocks[n] else {} for n in tuned}
    new = one.apply(old, {**given, **_evidence(taps, passes, seen), **mine}, key)
    aux.update(merged(aux, new.aux))
    return changes(old, new)

  early = {a: model.leaf(a) for a in names if a in chosen and a.startswith("embed/")}
  # The hidden states of the model as it was, for what blocks should give.
  clean = [statistics.embed(model, b) for b in materials.batches] if tuned else []
  model = model.update(change(early, [p.at_embedding(model) for p in passes], -2))
  hidden = {i: [statistics.embed(model, b) for b in batches] for i, batches in feeds.items()}
  news: dict[str, Any] = {}
  for layer, place, tree in progress.track(_by_layer(model.params), "blocks"):
    part = {f"layers/{layer}/{s}": paths.take(x, place) for s, x in paths.walk(tree).items()}
    states = [p.through(model.spec, tree, place, hidden[id(p.batches)], layer) for p in passes]
    data = None
    if layer <= last_tuned:
      clean = [
        statistics.through_block(model.spec, tree, h, layer, (), None, index=place)[0]
        for h in clean
      ]
      if any(layer in layers for layers in blocks.values()):
        inputs = statistics.whole(hidden[id(materials.batches)])
        nested = paths.nest({a.split("/", 2)[2]: x for a, x in part.items()})
        data = statistics.block(model.spec, nested, layer, inputs, statistics.whole(clean))
    new = change({a: x for a, x in part.items() if a in chosen}, states, layer, data)
    news.update(new)
    if layer >= last:
      continue  # nobody asks what comes out
    nested = paths.nest({a.split("/", 2)[2]: new.get(a, x) for a, x in part.items()})
    for states in hidden.values():
      for n, h in enumerate(states):
        states[n], _ = statistics.through_block(model.spec, nested, h, layer, (), None)
  model = model.update(news)
  states = [p.at_head(model, hidden[id(p.batches)]) for p in passes]
  late = {
    a: model.leaf(a) for a in names if a in chosen and not a.startswith(("embed/", "layers/"))
  }
  return model.update(change(late, states, -1)).replace(aux=aux)


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


class _Pass:
  """The statistics wanted of the model itself, or of one donor, on its batches."""

  def __init__(self, want: statistics.Wanted, batches: Any, donor: needs.Source | None):
    self.want, self.batches, self.donor = want, batches, donor
    self.per_layer = statistics.by_layer(want)

  def through(self, spec: Any, tree: Any, place: int, hidden: list[Any], layer: int) -> Any:
    pairs, states = self.per_layer.get(layer, ()), None
    if not pairs:
      return None
    where: int | None = place
    if self.donor is not None:
      tree, where = donors.layer(self.donor, layer), None
    first = 0
    for h in hidden:
      _, states = statistics.through_block(
        spec, tree, h, layer, pairs, states, index=where, first=first
      )
      first += len(h)
    return states

  def at_embedding(self, model: model_lib.Model) -> Any:
    pairs, states = self.per_layer.get(-2, ()), None
    params = model.params if self.donor is None or not pairs else donors.outer(self.donor)
    first = 0
    for batch in self.batches if pairs else ():
      states = statistics.at_embedding(
        model.replace(params=params), batch, pairs, states, first=first
      )
      first += len(models.inputs(batch))
    return states

  def at_head(self, model: model_lib.Model, hidden: list[Any]) -> Any:
    pairs, states = self.per_layer.get(-1, ()), None
    if not pairs:
      return None
    params = model.params if self.donor is None else donors.outer(self.donor)
    first = 0
    for h in hidden:
      states = statistics.at_head(model.spec, params, h, pairs, states, first=first)
      first += len(h)
    return states

  def covered(self, layer: int, states: Any) -> dict[tuple[str, str], Any]:
    mine = {k: v for k, v in self.want.items() if statistics.layer_of(k[1]) == layer}
    return statistics.covered(mine, {layer: states})


def _passes(
  one: step.Step,
  taps: Mapping[str, needs.Statistic],
  model: model_lib.Model,
  materials: collect.Materials,
  names: list[str],
) -> list[_Pass]:
  own = statistics.wanted({n: w for n, w in taps.items() if w.of == "model"}, names)
  theirs = statistics.wanted({n: w for n, w in taps.items() if w.of == "donors"}, names)
  found = [_Pass(own, materials.batches, None)] if own else []
  if theirs:
    sources = collect.sources(one, model, materials)
    dealt = donors.deal(materials.batches, materials.donor_batches, len(sources))
    found += [_Pass(theirs, b, s) for b, s in zip(dealt, sources, strict=True)]
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


def _refuse_torn(one: step.Step, units: step.Units) -> None:
  """Refuse a unit that does not lie within one block, the embeddings, or what follows."""
  for unit in units:
    places = {statistics.layer_of(a) for a in unit}
    if len(places) > 1:
      raise ValueError(
        f"{one!r} changes {unit[0]} together with {unit[-1]}, which lies in another block; use "
        "the driver 'run'"
      )


def _by_layer(params: paths.Params) -> list[tuple[int, int, Any]]:
  """List (layer, its place in the segment, the segment's tree)."""
  return [
    (i, i - start, tree) for start, stop, tree in paths.segments(params) for i in range(start, stop)
  ]
