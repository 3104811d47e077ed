# SPDX-License-Identifier: Apache-2.0
"""Rotary parameters and windows in `config.json`, in the spelling of either era.

Until version 4, `transformers` wrote `rope_theta` and `rope_scaling`; version 5 writes
`rope_parameters`, nested by layer type for Gemma 3. Both are read; a file is written back in
the spelling it came in, a new one in the old spelling, which every reader understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treesurgeon.models import hf_families
from treesurgeon.models import spec as specs

_LLAMA3 = {
  "rope_low_freq": "low_freq_factor",
  "rope_high_freq": "high_freq_factor",
  "rope_original": "original_max_position_embeddings",
}
_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read(name: str, config: Mapping[str, Any], windows: tuple[int, ...]) -> dict[str, Any]:
  """Read the rotary fields of a spec.

  Args:
    name: the model type.
    config: the config.
    windows: window of every layer; Gemma 3 has other frequencies where there is one.

  Returns:
    Spec fields; `rope_fraction` stands for the rotated fraction of a head.

  Raises:
    ValueError: for a scaling that is not supported.
  """
  rope = hf_families.FAMILIES[name].rope
  if rope is None:
    return {}
  given = config.get("rope_scaling") or config.get("rope_parameters") or {}
  if name != "gemma3_text":
    fields = _one(name, given, config)
    usual = hf_families.FAMILIES[name].defaults.get("rope_theta", 10000.0)
    theta = given.get("rope_theta", config.get(rope[0]) or usual)
    fraction = given.get("partial_rotary_factor", config.get(rope[1]))
    default = 0.25 if name == "gpt_neox" else 1.0
    return {
      **fields,
      "rope_theta": theta,
      "rope_fraction": default if fraction is None else fraction,
    }
  nested = _GLOBAL in given or _LOCAL in given
  outer = (given.get(_GLOBAL) or {}) if nested else given
  inner = (given.get(_LOCAL) or {}) if nested else {}
  wide, near = _one(name, outer, config), _one(name, inner, config)
  wide["rope_theta"] = outer.get("rope_theta", config.get("rope_theta") or 1e6)
  near["rope_theta"] = inner.get("rope_theta", config.get("rope_local_base_freq") or 1e4)
  kinds = {x["rope_scaling"] for x in (wide, near)} - {"none"}
  if len(kinds) > 1:
    raise ValueError(f"rope types of local and global layers differ: {', '.join(sorted(kinds))}")
  main = wide if wide["rope_scaling"] != "none" else near
  per_layer = {
    key: tuple((near if w else wide)[key] for w in windows) for key in ("rope_theta", "rope_factor")
  }
  return {**main, **per_layer}


def write(spec: specs.Spec, base: Mapping[str, Any]) -> dict[str, Any]:
  """Write the rotary fields of a spec, in the spelling of `base`.

  Args:
    spec: the architecture.
    base: the config the model came with, or an empty one.

  Returns:
    Config keys.
  """
  rope = hf_families.FAMILIES[spec.family].rope
  if rope is None:
    return {}
  windows = spec.per_layer("window")
  first = {bool(w): i for i, w in reversed(list(enumerate(windows)))}
  wide = _params(spec, first.get(False, first.get(True, 0)))
  new = not base.get("rope_scaling") and "rope_parameters" in base
  if spec.family == "gemma3_text":
    near = _params(spec, first[True]) if True in first else None
    if False not in first:
      wide = {"rope_type": "default", "rope_theta": 1e6}
    if new:
      near = near or base["rope_parameters"].get(_LOCAL)
      return {"rope_parameters": {_LOCAL: near, _GLOBAL: wide}}
    scaling = {k: v for k, v in wide.items() if k != "rope_theta"}
    out = {
      "rope_theta": wide["rope_theta"],
      "rope_scaling": None if wide["rope_type"] == "default" else scaling,
    }
    return {**out, "rope_local_base_freq": near["rope_theta"]} if near else out
  fraction = spec.rope_dim / spec.head_dim
  if new:
    out = {**wide}
    if spec.family == "gpt_neox" or fraction != 1.0:
      out["partial_rotary_factor"] = fraction
    return {"rope_parameters": out}
  scaling = {k: v for k, v in wide.items() if k != "rope_theta"}
  out = {
    rope[0]: wide["rope_theta"],
    "rope_scaling": None if wide["rope_type"] == "default" else scaling,
  }
  if spec.family == "gpt_neox" or fraction != 1.0:
    out[rope[1]] = fraction
  return out


def read_windows(name: str, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
  """Read the window of every layer of a family that lists layer types.

  Args:
    name: the model type.
    config: the config.
    num_layers: number of layers.

  Returns:
    Windows, 0 for unlimited.

  Raises:
    ValueError: for an unknown layer type.
  """
  defaults = hf_families.FAMILIES[name].defaults
  width = config.get("sliding_window", defaults["sliding_window"]) or 0
  if name in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
    width = 0
  types = config.get("layer_types")
  if types is None:
    if name in ("qwen2", "qwen3"):
      local = [i >= config.get("max_window_layers", 28) for i in range(num_layers)]
    else:
      period = 2 if name == "gemma2" else config.get("sliding_window_pattern", 6)
      local = [(i + 1) % period != 0 for i in range(num_layers)]
    types = [_LOCAL if x else _GLOBAL for x in local]
  unknown = sorted(set(types) - {_LOCAL, _GLOBAL})
  if unknown:
    raise ValueError(f"layer_types holds {unknown[0]!r}; valid: {_GLOBAL}, {_LOCAL}")
  return tuple(width if t == _LOCAL else 0 for t in types)


def write_windows(spec: specs.Spec) -> dict[str, Any]:
  """Write the windows of a family that lists layer types.

  Args:
    spec: the architecture.

  Returns:
    Config keys.
  """
  windows = spec.per_layer("window")
  out: dict[str, Any] = {"layer_types": [_LOCAL if w else _GLOBAL for w in windows]}
  if any(windows):
    out["sliding_window"] = max(windows)
  if spec.family in ("qwen2", "qwen3"):
    out["use_sliding_window"] = any(windows)
  return out


def _one(name: str, params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  kind = params.get("rope_type", params.get("type", "default"))
  if kind not in _SCALINGS:
    raise ValueError(
      f"rope type {kind!r} of a {name} model is not supported; valid: {', '.join(_SCALINGS)}"
    )
  fields: dict[str, Any] = {"rope_scaling": _SCALINGS[kind], "rope_factor": 1.0}
  if kind != "default":
    if "factor" not in params:
      raise ValueError(f"rope type {kind!r} needs a 'factor'; the config has {sorted(params)}")
    fields["rope_factor"] = params["factor"]
  if kind == "llama3":
    given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **params}
    missing = [k for k in _LLAMA3.values() if given.get(k) is None]
    if missing:
      raise ValueError(f"rope type 'llama3' needs {missing[0]!r}; the config has {sorted(params)}")
    fields |= {field: given[key] for field, key in _LLAMA3.items()}
  return fields


def _params(spec: specs.Spec, layer: int) -> dict[str, Any]:
  kind = {v: k for k, v in _SCALINGS.items()}[spec.rope_scaling]
  factor = spec.per_layer("rope_factor")[layer]
  out = {"rope_type": kind, "rope_theta": spec.per_layer("rope_theta")[layer]}
  if factor == 1.0 and isinstance(spec.rope_factor, tuple):
    return {**out, "rope_type": "default"}
  if kind != "default":
    out["factor"] = factor
  if kind == "llama3":
    out |= {key: getattr(spec, field) for field, key in _LLAMA3.items()}
  return out
