# SPDX-License-Identifier: Apache-2.0
"""Which part of a configuration makes which stack of layers.

`models` go for all of a model, `slices` for a model with one stack of layers, and `modules` name
the stacks: by what comes before the layers' numbers, or by mergekit's usual names.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from treesurgeon.merge.mergekit import config as config_lib
from treesurgeon.merge.mergekit import layers

_VISION = re.compile(r"vis|image")


@dataclasses.dataclass(frozen=True)
class Part:
  """A tower of the output, what else goes with it, and what it is made of."""

  tower: layers.Tower | None
  loose: tuple[str, ...]
  module: config_lib.Module


def parts(config: config_lib.Config, layout: layers.Layout) -> Iterator[Part]:
  """Match a configuration's modules with the towers of its reference model.

  Args:
    config: the merge.
    layout: of the base or, without one, the first model.

  Returns:
    The parts, which together hold all of the layout's tensors.

  Raises:
    ValueError: for slices over several towers, or modules that do not fit them.

  Example:
    >>> document = {"merge_method": "linear", "models": [{"model": "a"}]}
    >>> found = layers.layout(["wte", "h.0.w"], {"n_layer": 1})
    >>> [p.loose for p in parts(config_lib.parse(document), found)]
    [(), ('wte',)]
  """
  towers = layout.towers
  if config.form == "models":
    for tower in towers:
      yield Part(tower, (), config.modules[""])
    yield Part(None, layout.loose, config.modules[""])
  elif config.form == "slices":
    if len(towers) != 1:
      held = ", ".join(repr(t.prefix) for t in towers) or "none"
      raise ValueError(
        f"'slices' need a model with one stack of layers; found {held}; use 'modules' with one "
        "entry for each of them"
      )
    yield Part(towers[0], layout.loose, config.modules[""])
  else:
    yield from _modules(config.modules, layout)


def _modules(modules: Mapping[str, config_lib.Module], layout: layers.Layout) -> Iterator[Part]:
  towers = {name: _tower_of(name, layout.towers) for name in modules}
  used = [t for t in towers.values() if t is not None]
  missing = [t.prefix for t in layout.towers if t not in used]
  if missing or len(set(used)) < len(used):
    raise ValueError(
      f"modules: {', '.join(modules)} do not fit the model's stacks of layers, "
      f"{', '.join(repr(t.prefix) for t in layout.towers)}; name one module after each, such as "
      f"{layout.towers[0].prefix.rstrip('.')!r}"
    )
  loose: dict[str, list[str]] = {name: [] for name in modules}
  for tensor in layout.loose:
    loose[max(modules, key=lambda name: _affinity(tensor, name, towers[name]))].append(tensor)
  for name, module in modules.items():
    yield Part(towers[name], tuple(loose[name]), module)


def _tower_of(name: str, towers: Sequence[layers.Tower]) -> layers.Tower | None:
  """Find the tower that a module is named after, or one of mergekit's usual names means."""
  named = [t for t in towers if f"{t.prefix}.".startswith(f"{name}.")]
  if len(named) == 1 or (name == "default" and len(towers) == 1):
    return named[0] if named else towers[0]
  kinds = {
    "vision": [t for t in towers if _VISION.search(t.prefix)],
    "encoder": [t for t in towers if "encoder" in t.prefix and not _VISION.search(t.prefix)],
    "decoder": [t for t in towers if "encoder" not in t.prefix and not _VISION.search(t.prefix)],
  }
  words = {"vision": r"vis|image", "encoder": r"encoder", "decoder": r"text|language|decoder"}
  for kind, pattern in words.items():
    if re.search(pattern, name) and len(kinds[kind]) == 1:
      return kinds[kind][0]
  return None


def _affinity(tensor: str, name: str, tower: layers.Tower | None) -> int:
  """Score how much a tensor outside the layers belongs to a module."""
  if tower is None:
    return 99 if any(len(w) > 4 and w in tensor for w in re.split(r"[_.]", name)) else -1
  shared = 0
  for a, b in zip(tensor.split("."), tower.prefix.split("."), strict=False):
    if a != b:
      break
    shared += 1
  return 2 * shared + (not _VISION.search(tower.prefix))
