# SPDX-License-Identifier: Apache-2.0
"""`config.json` to spec and back.

A config is written by laying what changed over the file the model came with, so that a model that
surgery left alone gets its config back word for word and keys that are not modelled survive. What
a family cannot express (a narrower feed-forward block in one layer) goes under the key
"treesurgeon", which only we read: such a model loads here but not in `transformers`, and
`unsupported` names the fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from treesurgeon.models import hf_families, hf_rope, vision_spec
from treesurgeon.models import spec as specs

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
}
_SPELLED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_OURS = "treesurgeon"
_UNWRITTEN = ("extra", "name_prefix", "family")
_FIELDS = tuple(f.name for f in dataclasses.fields(specs.Spec) if f.name not in _UNWRITTEN)
_VISION = tuple(
  f.name for f in dataclasses.fields(vision_spec.VisionSpec) if f.name not in _UNWRITTEN
)


def from_config(config: Mapping[str, Any]) -> vision_spec.AnySpec:
  """Build the spec that a `config.json` describes.

  Args:
    config: the parsed file.

  Returns:
    The spec, with the whole file kept in `extra`.

  Raises:
    ValueError: for an unknown model type, rotary type or activation, a switch that is not
      modelled, or a missing key.

  Example:
    >>> from treesurgeon.models import hf
    >>> hf.from_config({"model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_layer": 1,
    ...                 "n_head": 2}).d_ff
    16
  """
  name: Any = config.get("model_type")
  if name != _OURS and name not in hf_families.FAMILIES:
    valid = ", ".join([*hf_families.FAMILIES, _OURS])
    raise ValueError(f"model_type {name!r} is not supported; valid: {valid}")
  ours = dict(config.get(_OURS) or {})
  sees = name == _OURS and ours.pop("network", None) == "vision"
  known = _VISION if sees else _FIELDS
  unknown = sorted(set(ours) - set(known))
  if unknown:
    raise ValueError(f"config key {_OURS!r} holds the unknown field {unknown[0]!r}")
  fields: dict[str, Any] = ours
  if name == _OURS:
    wanted = ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff")
    wanted = ("kind", "image_size", "num_classes", "d_model", "num_layers") if sees else wanted
    missing = [f for f in wanted if f not in fields]
    if missing:
      raise ValueError(f"config.json of a {_OURS} model lacks {_OURS}.{missing[0]}")
  else:
    fields = _read(name, config) | ours
  extra = tuple((k, json.dumps(v)) for k, v in config.items() if k != _OURS)
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  make = vision_spec.VisionSpec if sees else specs.Spec
  return make(**fields, family=name, extra=extra)


def to_config(spec: vision_spec.AnySpec) -> dict[str, Any]:
  """Write the `config.json` of a spec.

  Args:
    spec: the architecture.

  Returns:
    The original config with what changed laid over it.

  Raises:
    ValueError: for an unknown family.

  Example:
    >>> from treesurgeon.models import hf
    >>> config = {"model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_layer": 2, "n_head": 2,
    ...           "bos_token_id": 3}
    >>> hf.to_config(hf.from_config(config).take_layers([0])) == config | {"n_layer": 1}
    True
  """
  config, left = _lay(spec)
  if left:
    config[_OURS] = {f: getattr(spec, f) for f in left}
    if isinstance(spec, vision_spec.VisionSpec):
      config[_OURS] |= {"network": "vision"}
  return json.loads(json.dumps(config))


def unsupported(spec: vision_spec.AnySpec) -> tuple[str, ...]:
  """Name the fields of a spec that its family's config cannot express.

  Args:
    spec: the architecture.

  Returns:
    Field names; empty if `transformers` can load the model.

  Example:
    >>> from treesurgeon import models
    >>> from treesurgeon.models import hf
    >>> hf.unsupported(models.Spec(family="llama", vocab_size=5, d_model=4, num_layers=2,
    ...                            num_heads=1, d_ff=(8, 4)))
    ('d_ff',)
  """
  return _lay(spec)[1]


def _lay(spec: vision_spec.AnySpec) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Return the config without our own key, and the fields that it gets wrong."""
  base = {k: json.loads(v) for k, v in spec.extra}
  if isinstance(spec, vision_spec.VisionSpec):
    return base | {"model_type": _OURS}, _VISION
  if spec.family == _OURS:
    return base | {"model_type": _OURS}, _FIELDS
  if spec.family not in hf_families.FAMILIES:
    valid = ", ".join([*hf_families.FAMILIES, _OURS])
    raise ValueError(f"Spec.family {spec.family!r} has no config; valid: {valid}")
  fresh = _write(spec, base)
  if base.get("model_type") == spec.family:
    before = _write(specs.Spec(**_read(spec.family, base), family=spec.family), base)
    fresh = {k: v for k, v in fresh.items() if k not in before or before[k] != v}
  else:
    architecture = hf_families.FAMILIES[spec.family].architecture
    fresh = {"architectures": [architecture], "model_type": spec.family, **fresh}
  config = base | fresh
  try:
    again = specs.Spec(**_read(spec.family, config), family=spec.family)
  except ValueError:  # the plain config is not even consistent, say heads that no width divides
    return config, _FIELDS
  # An encoder's heads are told by the tensors in the file, see `hf.refine`.
  skip = ("mlm_head", "head_bias", "pooler") if spec.kind == "encoder" else ()
  wrong = [f for f in _FIELDS if getattr(again, f) != getattr(spec, f)]
  return config, tuple(f for f in wrong if f not in skip)


def _read(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
  family = hf_families.FAMILIES[name]
  for key, valid in family.require.items():
    if config.get(key, valid[0]) not in valid:
      raise ValueError(
        f"config key {key}={config[key]!r} of a {name} model is not supported; "
        f"valid: {', '.join(map(repr, valid))}"
      )
  if name == "qwen3_moe" and "num_local_experts" in config:
    config = {**config, "num_experts": config["num_local_experts"]}
  fields = dict(family.fixed)
  for field, key in family.keys.items():
    if key not in config and key not in family.defaults:
      raise ValueError(f"config.json of a {name} model lacks {key!r}")
    fields[field] = config.get(key, family.defaults.get(key))
  if name == "gemma" and config.get("hidden_activation"):
    fields["activation"] = config["hidden_activation"]
  act = fields["activation"]
  if name == "gemma" and act == "gelu":
    act = "gelu_pytorch_tanh"  # what early Gemma files meant by it
  if act not in _ACTIVATIONS:
    raise ValueError(f"activation {act!r} is not supported; valid: {', '.join(_ACTIVATIONS)}")
  fields["activation"] = _ACTIVATIONS[act]
  if fields.get("d_ff") is None and name != "openelm":
    fields["d_ff"] = 4 * fields["d_model"]
  if family.layer_types:
    fields["window"] = hf_rope.read_windows(name, config, fields["num_layers"])
  elif "window" in fields:
    fields["window"] = fields["window"] or 0
  windows = fields.get("window", 0)
  windows = windows if isinstance(windows, tuple) else (windows,) * fields["num_layers"]
  fields |= hf_rope.read(name, config, windows)
  fraction = fields.pop("rope_fraction", 1.0)
  if fraction != 1.0:
    head_dim = fields.get("head_dim") or fields["d_model"] // fields["num_heads"]
    fields["rope_dim"] = int(head_dim * fraction)
  fields |= _SPECIAL[name](config, fields) if name in _SPECIAL else {}
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _write(spec: specs.Spec, base: Mapping[str, Any]) -> dict[str, Any]:
  family = hf_families.FAMILIES[spec.family]
  out: dict[str, Any] = {}
  for field, key in family.keys.items():
    value = getattr(spec, field)
    out[key] = max(value) if isinstance(value, tuple) and spec.family != "openelm" else value
  act = family.keys["activation"]
  out[act] = _SPELLED[spec.activation]
  if spec.family == "gemma" and base.get("hidden_activation"):
    out["hidden_activation"] = out.pop(act)
  if "num_local_experts" in base and "num_experts" in out:  # as `transformers` 5 writes qwen3_moe
    out["num_local_experts"] = out.pop("num_experts")
  if "window" in family.keys:
    out["sliding_window"] = out["sliding_window"] or None
  if family.layer_types:
    out |= hf_rope.write_windows(spec)
  out |= hf_rope.write(spec, base)
  if spec.family in ("gemma2", "gemma3_text"):
    scale = spec.head_dim**-0.5 if spec.attn_scale is None else spec.attn_scale
    whole = round(scale**-2)
    out["query_pre_attn_scalar"] = whole if whole and whole**-0.5 == scale else scale**-2
  elif spec.family == "opt":
    before = spec.norm_place == "pre"
    out |= {"do_layer_norm_before": before, "word_embed_proj_dim": spec.d_model}
    out["_remove_final_layer_norm"] = before and not spec.final_norm
  elif spec.family == "openelm":
    divisor = math.gcd(base.get("ffn_dim_divisor", 256), *spec.per_layer("d_ff"))
    out["num_query_heads"] = list(spec.per_layer("num_heads"))
    out["num_kv_heads"] = list(spec.per_layer("num_kv_heads"))
    out["ffn_multipliers"] = [f / spec.d_model for f in spec.per_layer("d_ff")]
    out |= {"ffn_dim_divisor": divisor, "normalize_qk_projections": spec.qk_norm == "head"}
  elif spec.family == "bert" and (spec.mlm_head or spec.pooler):
    out["architectures"] = ["BertForMaskedLM" if spec.mlm_head else "BertModel"]
  return out


def _gemma(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  scalar = config.get("query_pre_attn_scalar", 256)
  scale = {} if config["model_type"] == "gemma" else {"attn_scale": scalar**-0.5}
  return {**scale, "embed_scale": fields["d_model"] ** 0.5}


def _opt(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  width = config.get("word_embed_proj_dim") or fields["d_model"]
  if width != fields["d_model"]:
    raise ValueError(
      f"config key word_embed_proj_dim={width} of an opt model is not supported; "
      f"valid: {fields['d_model']} (hidden_size)"
    )
  before = config.get("do_layer_norm_before", True)
  final = before and not config.get("_remove_final_layer_norm", False)
  return {"norm_place": "pre" if before else "residual", "final_norm": final}


def _openelm(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  layers = fields["num_layers"]
  multipliers = config.get("ffn_multipliers")
  for key, value in (
    ("ffn_multipliers", multipliers),
    ("num_query_heads", fields["num_heads"]),
    ("num_kv_heads", fields["num_kv_heads"]),
  ):
    if not isinstance(value, list | tuple) or len(value) != layers:
      raise ValueError(
        f"config key {key} of an openelm model must list {layers} layers; got {value}"
      )
  divisor = config.get("ffn_dim_divisor", 256)
  widths = tuple(_divisible(m * fields["d_model"], divisor) for m in multipliers or ())
  return {
    "d_ff": widths,
    "qk_norm": "head" if config.get("normalize_qk_projections", True) else "none",
  }


def _divisible(value: float, divisor: int) -> int:
  """Round to a multiple of the divisor, never more than a tenth down."""
  rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * value else rounded


def _bert(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  del fields
  mlm = "BertForMaskedLM" in (config.get("architectures") or ())
  return {"mlm_head": mlm, "head_bias": mlm, "pooler": not mlm}


_SPECIAL = {
  "bert": _bert,
  "gemma": _gemma,
  "gemma2": _gemma,
  "gemma3_text": _gemma,
  "openelm": _openelm,
  "opt": _opt,
}
