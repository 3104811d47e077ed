# SPDX-License-Identifier: Apache-2.0
"""Which tensors of which models each tensor of the output is merged from.

A slice puts runs of layers of its models side by side; slices follow each other. What lies outside
the layers comes from the first slice if it comes before them and from the last one otherwise. All
models of a slice must have the same tensors of the same shapes in it; only a head that a model
leaves out because it is tied is taken from its embedding.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from treesurgeon.core import needs, paths
from treesurgeon.merge.mergekit import config as config_lib
from treesurgeon.merge.mergekit import layers, methods, modules

# Computed when a model is built; older files hold them, newer ones do not.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|position_ids)")
# What backbones saved without a head leave out of their names.
_STEMS = ("model.", "transformer.", "gpt_neox.", "bert.", "roberta.", "distilbert.", "backbone.")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of the output.

  Attributes:
    name: of the output's tensor.
    piece: the slice that it belongs to.
    module: the module that it belongs to.
    names: for each of the slice's inputs the tensor's name there.
    t: where its layer lies in the slice, 0 to 1; 0 outside the layers.
  """

  name: str
  piece: config_lib.Slice
  module: config_lib.Module
  names: tuple[str, ...]
  t: float = 0.0


class Assembly:
  """Lay out the output's tensors.

  Args:
    config: the merge.
    method: what the merge asks of its models.
    sources: every model by name.
    settings: every model's config.json by name.

  Attributes:
    entries: the output's tensors; those of one run of layers in the order of the files.
    config: the output's config.json.
    notes: what a reader should be told, a sentence each.

  Raises:
    ValueError: for slices that the models do not have, or models that do not fit together.
  """

  def __init__(
    self,
    config: config_lib.Config,
    method: methods.Method,
    sources: Mapping[str, needs.Source],
    settings: Mapping[str, Mapping[str, Any]],
  ):
    self.notes: list[str] = []
    self._sources = sources
    self._names = {m: dict.fromkeys(s.addresses()) for m, s in sources.items()}
    self._layouts = {m: layers.layout(list(n), settings[m]) for m, n in self._names.items()}
    self._reference = config.models()[0]
    self.config = dict(settings[self._reference])
    self.entries: list[Entry] = []
    for part in modules.parts(config, self._whole()):
      part = self._completed(part, config)
      for piece in part.module.slices:
        methods.check_inputs(piece, config, method)
      self._add(part)
    if method.base != "ignored" or config.form == "models":
      order = {n: i for i, n in enumerate(self._names[self._reference])}
      self.entries.sort(key=lambda e: order.get(e.name, len(order)))  # reads run through the file

  def _whole(self) -> layers.Layout:
    """Find the reference's towers, and what any model has outside of them."""
    mine = self._layouts[self._reference]
    more: dict[str, None] = {}
    for model, found in self._layouts.items():
      if len(found.towers) > len(mine.towers):
        kept = {self._tower(model, t).prefix for t in mine.towers}
        extra = next(t.prefix for t in found.towers if t.prefix not in kept)
        raise ValueError(
          f"{model} has layers named {extra!r}, {self._reference} has none; models must have "
          "the same tensors"
        )
      for name in found.loose:
        if self._counterpart(self._reference, name) is None:
          more[name] = None
    return layers.Layout(mine.towers, (*mine.loose, *more))

  def _completed(self, part: modules.Part, config: config_lib.Config) -> modules.Part:
    """Give `models` their layers, and the base its place among them."""
    module = part.module
    if all(i.layers is not None for s in module.slices for i in s.inputs):
      return part
    (piece,) = module.slices
    inputs = piece.inputs
    if config.base is not None and config.base not in [i.model for i in inputs]:
      inputs = (*inputs, config_lib.Input(config.base))
    counts = {i.model: self._count(i.model, part.tower) for i in inputs}
    if len(set(counts.values())) > 1:
      told = ", ".join(f"{m} has {n}" for m, n in counts.items())
      raise ValueError(
        f"the models differ in their number of layers: {told}; 'slices' with 'layer_range' choose "
        "which of them to merge"
      )
    inputs = tuple(dataclasses.replace(i, layers=(0, counts[i.model])) for i in inputs)
    piece = dataclasses.replace(piece, inputs=inputs)
    return dataclasses.replace(part, module=dataclasses.replace(module, slices=(piece,)))

  def _count(self, model: str, tower: layers.Tower | None) -> int:
    return 0 if tower is None else len(self._tower(model, tower).layers)

  def _tower(self, model: str, tower: layers.Tower) -> layers.Tower:
    """Find a model's counterpart of the reference's tower."""
    towers = self._layouts[model].towers
    for other in towers:
      if other.prefix == tower.prefix:
        return other
    if len(towers) == len(self._layouts[self._reference].towers) == 1:
      return towers[0]
    held = ", ".join(repr(t.prefix) for t in towers) or "none"
    raise ValueError(f"{model} has no layers named {tower.prefix!r}; it has {held}")

  def _add(self, part: modules.Part) -> None:
    pieces = part.module.slices
    for name in part.loose:
      piece = pieces[0] if layers.early(name) else pieces[-1]
      self._add_loose(name, piece, part.module)
    if part.tower is None:
      return
    chosen: list[int] = []
    for piece in pieces:
      first, last = piece.inputs[0].layers or (0, 0)
      for i in range(last - first):
        t = i / (last - first - 1) if last - first > 1 else 1.0
        self._add_layer(part, piece, i, len(chosen), t)
        chosen.append(self._kind(piece, i))
    self.config = layers.update(self.config, part.tower.prefix, len(part.tower.layers), chosen)

  def _kind(self, piece: config_lib.Slice, offset: int) -> int:
    """Tell which of the reference's layers a new layer is like."""
    mine = [i for i in piece.inputs if i.model == self._reference] or piece.inputs
    return (mine[0].layers or (0, 0))[0] + offset

  def _add_layer(
    self, part: modules.Part, piece: config_lib.Slice, offset: int, layer: int, t: float
  ) -> None:
    assert part.tower is not None
    found = []
    for one in piece.inputs:
      tower = self._tower(one.model, part.tower)
      index = (one.layers or (0, 0))[0] + offset
      if index >= len(tower.layers):
        raise ValueError(
          f"{piece.where}: layer_range {list(one.layers or ())} of {one.model} goes past its "
          f"{len(tower.layers)} layers"
        )
      found.append((tower, index))
    rests = [dict.fromkeys(tower.layers[index]) for tower, index in found]
    for rest in dict.fromkeys(r for held in rests for r in held):
      absent = [
        one.model for one, held in zip(piece.inputs, rests, strict=True) if rest not in held
      ]
      name = part.tower.name(layer, rest)
      if absent:
        where = next(
          (one.model, tower.name(index, rest))
          for one, held, (tower, index) in zip(piece.inputs, rests, found, strict=True)
          if rest in held
        )
        self._without(name, absent[0], where)
        continue
      names = tuple(tower.name(index, rest) for tower, index in found)
      self._enter(Entry(name, piece, part.module, names, t))

  def _add_loose(self, name: str, piece: config_lib.Slice, module: config_lib.Module) -> None:
    names: list[str | None] = [self._counterpart(one.model, name) for one in piece.inputs]
    held = [(i.model, n) for i, n in zip(piece.inputs, names, strict=True) if n is not None]
    for k, one in enumerate(piece.inputs):
      if names[k] is None and held and (tied := self._tied(one.model, name)):
        names[k] = tied
        self._note(
          f"{one.model} ties its head: {tied} stands in for {name}, which the output gets; "
          "config.json's tie_word_embeddings stays as in the base"
        )
    absent = [i.model for i, n in zip(piece.inputs, names, strict=True) if n is None]
    if absent:
      if held:
        self._without(name, absent[0], held[0])
      return
    self._enter(Entry(name, piece, module, tuple(n for n in names if n is not None)))

  def _counterpart(self, model: str, name: str) -> str | None:
    names = self._names[model]
    spellings = [name, *(s + name for s in _STEMS), *(name.removeprefix(s) for s in _STEMS)]
    return next((s for s in spellings if s in names), None)

  def _tied(self, model: str, name: str) -> str | None:
    return layers.embedding(list(self._names[model]), name)

  def _without(self, name: str, model: str, where: tuple[str, str]) -> None:
    """Pass over what can be computed; refuse a tensor that a model lacks."""
    holder, spelled = where
    if _BUFFERS.fullmatch(name) and len(self._sources[holder].struct(spelled).shape) != 1:
      self._note(f"{name.rpartition('.')[2]} tensors are left out: not every model holds them")
      return
    if name.endswith("inv_freq"):
      self._note("inv_freq tensors are left out: not every model holds them")
      return
    near = paths.nearest(spelled, self._names[model])
    raise ValueError(
      f"{name}: {holder} has it, {model} lacks it (nearest there: {near}); merged models must have "
      "the same tensors"
    )

  def _enter(self, entry: Entry) -> None:
    shapes = [
      tuple(self._sources[one.model].struct(name).shape)
      for one, name in zip(entry.piece.inputs, entry.names, strict=True)
    ]
    odd = [k for k, shape in enumerate(shapes) if shape != shapes[0]]
    if odd:
      a, b = entry.piece.inputs[0].model, entry.piece.inputs[odd[0]].model
      raise ValueError(
        f"{entry.name}: {b} has shape {shapes[odd[0]]}, {a} has {shapes[0]}; "
        f"{_remedy(entry.name, shapes[0], shapes[odd[0]])}"
      )
    self.entries.append(entry)

  def _note(self, text: str) -> None:
    if text not in self.notes:
      self.notes.append(text)


def _remedy(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
  if len(a) == len(b) and a[1:] == b[1:] and (layers.early(name) or name.endswith(layers.HEADS)):
    return "different vocabularies: give them one with tokenizer: {source: union}"
  return "merged models must have equal shapes"
