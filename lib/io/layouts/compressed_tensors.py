# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors, as llm-compressor writes it and vLLM and transformers read it: writing.

A layer's scheme (width, grouping, what happens to its inputs) stands in config.json, in a group of
layers that share it; the tensors are, with weights (out, in):

* pack-quantized: `weight_packed` int32 (out, ceil(in * bits / 32)), our bitstream transposed;
  `weight_scale` (out, groups); `weight_shape`; asymmetric ones `weight_zero_point` int32, packed
  along the outputs. Codes and zero points are shifted by 2^(bits - 1) there and back, so that ours,
  unsigned, are theirs as stored.
* int-quantized: `weight` int8 (out, in), for layers whose inputs are quantized to 8 bits.
* float-quantized: `weight` float8_e4m3fn; mxfp8-quantized: the same with shared exponents.
* nvfp4-pack-quantized, mxfp4-pack-quantized: `weight_packed` uint8 (out, in / 2), the low half
  first; scales in 8-bit floats under `weight_global_scale` (which divides), or exponents.

`compressed_tensors_read` is the way back. The layout is that of
compressed-tensors 0.20, whose 3-bit streams are dense.

Reference: https://github.com/neuralmagic/compressed-tensors
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.io.layouts import base, modules, words

NAME = "compressed-tensors"
_FITS = (
  "compressed-tensors holds integers of 2 to 8 bits (a scale for each output, or for each group of "
  "g rows that divides them), e4m3fn (for each output, tile or matrix, or 32 rows with "
  "float8_e8m0fnu scales) and e2m1 (16 rows with e4m3fn scales, 32 rows with float8_e8m0fnu ones)"
)
_ASYMMETRIC = (
  "asymmetric packed layers: transformers 5.23 loads them only with "
  "quantization_config=CompressedTensorsConfig(dequantize=True); vLLM, transformers 5.17 as usual"
)
_SEVERAL = (
  "transformers 5.23 with dequantize=True takes the first group's scheme for every layer, and this "
  "model has several: use vLLM, or quantize all layers alike or symmetrically"
)
_EXPERTS = (
  "transformers 5.23 takes one scheme for all experts, and here they differ, so that its result "
  "would be wrong; vLLM wants those of a layer alike"
)
_FP4 = "NVFP4, MXFP4, MXFP8: transformers on a CPU needs dtype=torch.bfloat16 or dequantize=True"
# What vLLM runs as one matrix.
_SHARDS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def plan(
  found: Mapping[str, tuple[modules.Module, Any]], ignored: Sequence[str] = ()
) -> base.Layout:
  """Settle how each layer is written.

  Args:
    found: layer to its module and its leaf of shape structs.
    ignored: further linear layers that stay dense, such as a tied head.

  Returns:
    The layout.

  Raises:
    ValueError: naming the layer that does not fit and what would.
  """
  groups: dict[str, list[str]] = defaultdict(list)
  dense, tiles = list(ignored), sorted({t for _, leaf in found.values() for t in _tile(leaf)})
  for name, (module, leaf) in found.items():
    if not leaves.is_leaf(leaf):
      dense += [name] if module.linear else []
      continue
    where = " and ".join(module.entry.address)
    if not module.linear:
      raise modules.refuse(
        where, leaf, "its layer is a Conv1D, and compressed-tensors quantizes nn.Linear only; "
        "--format=gptq holds it, and --format=hf writes it dense",
      )  # fmt: skip
    groups[json.dumps(scheme(leaf, where, tiles))].append(name)
  schemes = [json.loads(s) for s in groups]
  whole = len(schemes) == 1
  config_groups = {
    f"group_{i}": {"targets": ["Linear"] if whole else _targets(names, found)} | one
    for i, (one, names) in enumerate(zip(schemes, groups.values(), strict=True))
  }
  kinds = {s["format"] for s in schemes}
  config = {
    "quant_method": NAME,
    "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": dense,
    "config_groups": config_groups,
  }
  owner = {n: s for s, names in zip(schemes, groups.values(), strict=True) for n in names}
  notes = _notes(schemes, groups.values(), dense)
  return base.Layout(NAME, config, tuple(owner), functools.partial(encode, owner), notes)


def scheme(leaf: Any, where: str, tiles: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
  """Describe a leaf as a config group does.

  Args:
    leaf: compressed leaf, of arrays or shape structs.
    where: its address, for messages.
    tiles: (rows, columns) that share a scale in other leaves. A leaf no larger than a tile has a
      scale for each output, or one, in either description; like layers should have like ones.

  Returns:
    The group but for its targets.

  Raises:
    ValueError: if the format cannot hold it.
  """
  inputs, weight = None, leaf
  if isinstance(leaf, leaves.ActivationQuantized):
    weight, inputs = leaf.weight, leaf
  if not isinstance(weight, leaves.QuantizedTensor) or weight.batch:
    raise modules.refuse(where, leaf, f"{_FITS}; --format=hf writes it dense")
  if weight.group_index is not None:
    raise modules.refuse(
      where, leaf, "compressed-tensors has no order of rows any more; use --format=gptq, or "
      "quantize with static groups",
    )  # fmt: skip
  kind, strategy = _kind(weight, inputs is not None), _strategy(weight)
  if kind is None or strategy is None or (strategy == "group" and weight.rows % weight.group_size):
    raise modules.refuse(where, leaf, _FITS)
  size, block = weight.group_size, [weight.group_cols, weight.group_size]
  if strategy == "channel" and (size, 1) in tiles:
    strategy = "group"
  for down, across in tiles:
    wide = weight.group_cols == min(across, weight.cols) > 1
    if strategy in ("tensor", "block") and size == down and wide:
      strategy, block = "block", [across, down]
  if kind == "nvfp4-pack-quantized":
    strategy = "tensor_group"
  if kind == "pack-quantized" and strategy == "tensor":
    strategy = "channel"  # the one scale is repeated, which nothing reads differently
  weights = {
    "num_bits": weight.bits,
    "type": "int" if weight.format == "int" else "float",
    "symmetric": weight.zeros is None,
    "strategy": strategy,
    "group_size": size if strategy in ("group", "tensor_group") else None,
    "block_structure": block if strategy == "block" else None,
    "dynamic": False,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
  }
  if kind.startswith("mxfp"):
    weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
  return {
    "format": kind,
    "weights": weights,
    "input_activations": None if inputs is None else _inputs(inputs, kind, where),
    "output_activations": None,
  }


def encode(schemes: Mapping[str, Mapping[str, Any]], name: str, leaf: Any) -> dict[str, np.ndarray]:
  """Turn a layer's leaf into tensors.

  Args:
    schemes: each layer's scheme.
    name: the layer.
    leaf: its leaf.

  Returns:
    Tensors by name.
  """
  parts, weight = {}, leaf
  if isinstance(leaf, leaves.ActivationQuantized):
    weight = leaf.weight
    if leaf.scale is not None:
      parts["input_scale"] = np.asarray(leaf.scale).reshape(1)
  kind, codes = schemes[name]["format"], np.asarray(weight.codes)
  if kind == "pack-quantized":
    parts["weight_packed"] = words.join(codes).T
    every = np.broadcast_to(scales(weight), (scales(weight).shape[0], weight.cols))
    parts["weight_scale"] = every.T
    parts["weight_shape"] = np.array([weight.cols, weight.rows], np.int64)
    if weight.zeros is not None:
      zeros = np.broadcast_to(np.asarray(weight.zeros), (weight.zeros.shape[0], weight.cols))
      parts["weight_zero_point"] = words.pack(zeros.T, weight.bits)
  elif kind == "int-quantized":
    parts["weight"] = (codes ^ 0x80).view(np.int8).T
    parts["weight_scale"] = scales(weight).T
  elif kind in ("float-quantized", "mxfp8-quantized"):
    parts["weight"] = codes.view(ml_dtypes.float8_e4m3fn).T
    parts["weight_scale"] = scales(weight).T
  else:
    parts["weight_packed"] = codes.T
    if kind == "mxfp4-pack-quantized":
      parts["weight_scale"] = scales(weight).T
    else:
      inner = weight.scales
      parts["weight_scale"] = np.asarray(inner.codes).view(ml_dtypes.float8_e4m3fn).T
      parts["weight_global_scale"] = 1 / np.asarray(inner.scales, np.float32).reshape(1)
  if schemes[name]["weights"]["strategy"] == "tensor":
    parts["weight_scale"] = parts["weight_scale"].reshape(1)
  return {f"{name}.{part}": x for part, x in parts.items()}


def scales(weight: leaves.QuantizedTensor) -> np.ndarray:
  """Return a leaf's scales as files hold them: floats, or the exponents of MX formats.

  Args:
    weight: the leaf.

  Returns:
    (groups of rows, groups of columns).
  """
  found = modules.dense(weight.scales)
  if found.dtype == ml_dtypes.float8_e8m0fnu:
    return found.view(np.uint8) if weight.format != "int" else found.astype(np.float32)
  return found


def _kind(weight: leaves.QuantizedTensor, inputs: bool) -> str | None:
  """Name the format of a leaf, if one holds it."""
  nested = weight.scales if leaves.is_leaf(weight.scales) else None
  shared = not nested and weight.scales.dtype == ml_dtypes.float8_e8m0fnu
  tall = weight.group_cols == 1
  if weight.format == "int" and weight.bits >= 2:
    zeros = weight.zeros
    if zeros is not None and (leaves.is_leaf(zeros) or zeros.dtype != jnp.uint8):
      return None
    if not inputs:
      return "pack-quantized"
    flat = _strategy(weight) in ("channel", "tensor")
    return "int-quantized" if weight.bits == 8 and zeros is None and flat else None
  if weight.format == "e4m3fn":
    if shared:
      return "mxfp8-quantized" if tall and weight.group_size == 32 else None
    flat = _strategy(weight) in ("channel", "tensor", "block")
    return "float-quantized" if flat and nested is None else None
  if weight.format == "e2m1" and tall and not inputs:
    if shared and weight.group_size == 32:
      return "mxfp4-pack-quantized"
    if weight.group_size == 16 and isinstance(nested, leaves.QuantizedTensor):
      one = nested.group_size >= nested.rows and nested.group_cols >= nested.cols
      return "nvfp4-pack-quantized" if one and nested.format == "e4m3fn" else None
  return None


def _strategy(weight: leaves.QuantizedTensor) -> str | None:
  tall, wide = weight.group_size >= weight.rows, weight.group_cols >= weight.cols
  if weight.group_cols == 1:
    blocks = weight.format == "e2m1" or weight.scales.dtype == ml_dtypes.float8_e8m0fnu
    return "channel" if tall and not (blocks and weight.format != "int") else "group"
  if tall and wide:
    return "tensor"
  return "block" if weight.format == "e4m3fn" and weight.rows % weight.group_size == 0 else None


def _tile(leaf: Any) -> list[tuple[int, int]]:
  """Return the rows and columns that share a scale, where there are several such tiles."""
  weight = leaf.weight if isinstance(leaf, leaves.ActivationQuantized) else leaf
  if not isinstance(weight, leaves.QuantizedTensor):
    return []
  down, across = weight.group_size, weight.group_cols
  several = down < weight.rows or 1 < across < weight.cols
  return [(down, across)] if several else []


def _inputs(leaf: leaves.ActivationQuantized, kind: str, where: str) -> dict[str, Any]:
  """Describe what happens to a layer's inputs."""
  want = {"int-quantized": "int", "float-quantized": "e4m3fn"}.get(kind)
  static = leaf.scale is not None
  if leaf.format != want or leaf.bits != 8:
    raise modules.refuse(
      where, leaf, "compressed-tensors quantizes inputs to 8 bits of the weights' own kind (int, "
      "or e4m3fn with a scale for each output, tile or matrix)",
    )  # fmt: skip
  return {
    "num_bits": 8,
    "type": "int" if want == "int" else "float",
    "symmetric": True,
    "strategy": "tensor" if static else leaf.per,
    "group_size": None,
    "block_structure": None,
    "dynamic": not static,
    "actorder": None,
    "observer": "minmax" if static else None,
    "observer_kwargs": {},
  }


def _targets(names: list[str], found: Mapping[str, Any]) -> list[str]:
  """Write regular expressions that match these layers and no others."""
  layer = re.compile(r"(?:.*?\.)?(\w+)\.(\d+)\.(.+)")
  expert = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
  kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
  out = []
  for name in names:
    match = layer.fullmatch(name)
    if match:
      kinds[match[1], match[3]].append(int(match[2]))
    else:
      out.append(f"re:{re.escape(name)}$")
  everywhere = [m for m in map(layer.fullmatch, found) if m]
  inside = [m for m in (expert.fullmatch(m[3]) for m in everywhere) if m]
  experts: dict[tuple[str, str, str], list[int]] = defaultdict(list)
  for (stack, kind), which in kinds.items():
    at = rf"{stack}\.{_numbers(which, [m[2] for m in everywhere if (m[1], m[3]) == (stack, kind)])}"
    match = expert.fullmatch(kind)
    if match:
      experts[at, match[1], match[3]].append(int(match[2]))
    else:
      out.append(rf"re:(?:.*\.)?{at}\.{re.escape(kind)}$")
  for (at, head, tail), which in experts.items():
    numbers = _numbers(which, [m[2] for m in inside if (m[1], m[3]) == (head, tail)])
    out.append(rf"re:(?:.*\.)?{at}\.{re.escape(head)}\.{numbers}\.{re.escape(tail)}$")
  return out


def _numbers(which: list[int], of: list[str]) -> str:
  return r"\d+" if len(which) == len(set(of)) else f"(?:{'|'.join(map(str, which))})"


def _notes(schemes: list[dict[str, Any]], groups: Any, dense: Sequence[str]) -> tuple[str, ...]:
  notes = []
  packed = [s for s in schemes if s["format"] == "pack-quantized"]
  if any(not s["weights"]["symmetric"] for s in packed):
    notes += [_ASYMMETRIC] + ([_SEVERAL] if len(schemes) > 1 else [])
  if any(s["format"].startswith(("mxfp", "nvfp")) for s in schemes):
    notes.append(_FP4)
  owner = {name: i for i, names in enumerate(groups) for name in names} | dict.fromkeys(dense, -1)
  if len({i for name, i in owner.items() if ".experts." in name}) > 1:
    notes.append(_EXPERTS)
  for name in owner:
    stem, _, last = name.rpartition(".")
    for shards in _SHARDS:
      kinds = {owner.get(f"{stem}.{s}") for s in shards}
      if last == shards[0] and len(kinds) > 1:
        notes.append(
          f"vLLM runs {', '.join(shards)} as one and wants them alike; those of {stem} differ"
        )
        return tuple(notes)
  return tuple(notes)
