# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint form layers, and what its config.json says of them.

No table of architectures: layers are the tensors whose names hold a number (`model.layers.3.`,
`transformer.h.3.`, `visual.blocks.3.`), and a prefix of such names is a tower if the numbers run
from 0 without a gap and config.json counts as many layers.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Keys of a config.json that count layers.
COUNTS = (
  "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers",
  "encoder_layers", "depth", "n_block", "num_transformer_layers",
)  # fmt: skip
# Those whose lists have one entry a layer, and those whose lists name layers by number.
PER_LAYER = (
  "layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "no_rope_layers",
  "num_query_heads", "num_kv_heads", "ffn_multipliers", "block_configs", "hybrid_override_pattern",
)  # fmt: skip
NUMBERED = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices")
_LAYER = re.compile(r"((?:[^.]*[^.\d][^.]*\.)*)(\d+)\.(.+)")
_EARLY = re.compile(r"embed(?!_out)|wte|wpe|\bshared\b|patch|_pre\b|^conv\d")
HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclasses.dataclass(frozen=True)
class Tower:
  """One stack of layers.

  Attributes:
    prefix: what comes before the layer's number in a name, "model.layers.".
    layers: for each layer the names that follow the number, in the order of the files.
  """

  prefix: str
  layers: tuple[tuple[str, ...], ...]

  def name(self, layer: int, rest: str) -> str:
    """Name a layer's tensor."""
    return f"{self.prefix}{layer}.{rest}"


@dataclasses.dataclass(frozen=True)
class Layout:
  """A checkpoint's towers, and the tensors that belong to none."""

  towers: tuple[Tower, ...]
  loose: tuple[str, ...]


def layout(names: Sequence[str], config: Mapping[str, Any]) -> Layout:
  """Find a checkpoint's layers.

  Args:
    names: of all its tensors.
    config: content of config.json.

  Returns:
    Its towers, the largest first.

  Example:
    >>> found = layout(["wte.weight", "h.0.w", "h.1.w", "proj.0.w"], {"n_layer": 2})
    >>> found.towers, found.loose
    ((Tower(prefix='h.', layers=(('w',), ('w',))),), ('wte.weight', 'proj.0.w'))
  """
  runs: dict[str, dict[int, list[str]]] = {}
  for name in names:
    match = _LAYER.fullmatch(name)
    if match:
      runs.setdefault(match[1], {}).setdefault(int(match[2]), []).append(match[3])
  counts = {value for section in _sections(config) for k in COUNTS if (value := section.get(k))}
  whole = {p: r for p, r in runs.items() if sorted(r) == list(range(len(r)))}
  counted = {p: r for p, r in whole.items() if len(r) in counts}
  if not counted and whole:  # nothing is known: take the one of most tensors
    most = max(whole, key=lambda p: sum(map(len, whole[p].values())))
    counted = {most: whole[most]}
  towers = [Tower(p, tuple(tuple(r[i]) for i in range(len(r)))) for p, r in counted.items()]
  towers.sort(key=lambda t: -sum(map(len, t.layers)))
  inside = {t.name(i, rest) for t in towers for i, held in enumerate(t.layers) for rest in held}
  return Layout(tuple(towers), tuple(n for n in names if n not in inside))


def early(name: str) -> bool:
  """Tell whether a tensor outside the layers comes before them: embeddings do, norm and head not.

  Args:
    name: the tensor.

  Returns:
    Whether it belongs to the first slice rather than to the last one.

  Example:
    >>> early("model.embed_tokens.weight"), early("model.norm.weight"), early("embed_out.weight")
    (True, False, False)
  """
  return bool(_EARLY.search(name))


def embedding(names: Sequence[str], head: str) -> str | None:
  """Find the embedding that stands in for a head which a checkpoint leaves out.

  Args:
    names: the checkpoint's tensors.
    head: the name that is missing.

  Returns:
    The embedding's name, or None if `head` is no head or there is none.

  Example:
    >>> embedding(["model.embed_tokens.weight"], "lm_head.weight")
    'model.embed_tokens.weight'
  """
  if not head.endswith(HEADS):
    return None
  return next((n for n in names if n.endswith(_EMBEDDINGS)), None)


def update(
  config: Mapping[str, Any], prefix: str, count: int, chosen: Sequence[int]
) -> dict[str, Any]:
  """Make a config say what its new layers are.

  Args:
    config: content of the config.json that the output's is made from.
    prefix: of the tower whose layers are chosen.
    count: how many layers the tower had.
    chosen: for each new layer the old one whose kind it is of.

  Returns:
    The new content.

  Raises:
    ValueError: if no key counts the tower's layers, and their number changes.

  Example:
    >>> update({"n_layer": 2, "layer_types": ["a", "b"]}, "h.", 2, [0, 1, 1])
    {'n_layer': 3, 'layer_types': ['a', 'b', 'b']}
  """
  if list(chosen) == list(range(count)):
    return dict(config)
  out = copy.deepcopy(dict(config))
  section, key = _counter(out, prefix, count)
  section[key] = len(chosen)
  for name in PER_LAYER:
    value = section.get(name)
    if isinstance(value, list | str) and len(value) == count:
      if max(chosen) >= count:
        raise ValueError(
          f"config.json: {name} has no entry for layer {max(chosen)} of a deeper model; "
          "let that one be the base_model"
        )
      new = [value[i] for i in chosen]
      section[name] = "".join(new) if isinstance(value, str) else new
  for name in NUMBERED:
    if isinstance(section.get(name), list):
      section[name] = [new for new, old in enumerate(chosen) if old in section[name]]
  return out


def _sections(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """List a config and the objects in it."""
  yield config  # pyright: ignore[reportReturnType]
  for value in config.values():
    if isinstance(value, dict):
      yield from _sections(value)


def _counter(config: dict[str, Any], prefix: str, count: int) -> tuple[dict[str, Any], str]:
  """Find the key that counts a tower's layers."""
  found = [
    (section, key) for section in _sections(config) for key in COUNTS if section.get(key) == count
  ]
  word = "encoder" if "encoder" in prefix else "decoder" if "decoder" in prefix else ""
  seen = bool(re.search(r"vis|image", prefix))
  kinds = [(s, k) for s, k in found if (s is config.get("vision_config")) == seen]
  exact = [(s, k) for s, k in kinds if word and word in k]
  plain = [(s, k) for s, k in kinds if k == COUNTS[0]]
  for options in (exact, plain, kinds, found):
    if options:
      return options[0]
  raise ValueError(
    f"config.json has no key that counts the {count} layers of {prefix!r}, so their number cannot "
    f"change; looked for {', '.join(COUNTS)}"
  )
