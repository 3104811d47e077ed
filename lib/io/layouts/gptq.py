# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ directories, as GPTQModel, AutoGPTQ and AutoAWQ write them.

Of a layer of `in` inputs and `out` outputs, in groups of g inputs:

* GPTQ: `qweight` int32 (in * bits / 32, out), our bitstream as it is; `qzeros` int32 (groups, out *
  bits / 32), packed along the outputs; `scales` float16 (groups, out); `g_idx` int32 (in,), the
  group of each input. The first version stores zero points less one, `gptq_v2` as they are.
* AWQ (gemm): 4 bits; `qweight` int32 (in, out / 8) and `qzeros` (groups, out / 8), eight outputs a
  word in the order 0 2 4 6 1 3 5 7; `scales`; no order of inputs.

One width, one group size and one set of layers hold for the whole model. In version 1 a zero point
of 0 is stored as the largest code, to which readers add one: some get 0 of it, others 2^bits, and
some carry into the next zero point. Reading takes it for 0; writing refuses it.

Reference: https://github.com/ModelCloud/GPTQModel, https://github.com/casper-hansen/AutoAWQ
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, packing
from treesurgeon.io import header
from treesurgeon.io.layouts import base, modules, words

NAMES = ("gptq", "gptq_v2", "awq")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_NIBBLES = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which of eight outputs each nibble of a word holds
_FITS = {
  "gptq": "GPTQ holds integers of 2, 3, 4 or 8 bits, inputs and outputs multiples of 32, a scale "
  "for each output or for each group of g inputs that divides them",
  "awq": "AWQ holds integers of 4 bits, outputs multiples of 8, a scale for each output or for "
  "each group of g inputs that divides them",
}
_ELSE = "--format=compressed-tensors holds more, --format=hf writes it dense"


def plan(
  name: str,
  found: Mapping[str, tuple[modules.Module, Any]],
  ignored: Sequence[str] = (),
) -> base.Layout:
  """Settle how a model's layers are written.

  Args:
    name: one of `NAMES`.
    found: layer to its module and its leaf of shape structs.
    ignored: further linear layers that stay dense, such as a tied head.

  Returns:
    The layout.

  Raises:
    ValueError: naming the layer that does not fit and what would.
  """
  chosen = {n: leaf for n, (_, leaf) in found.items() if leaves.is_leaf(leaf)}
  for layer in chosen:
    _check(name, *found[layer])
  first = next(iter(chosen))
  bits, size = chosen[first].bits, _group_size(chosen)
  for layer, leaf in chosen.items():
    if leaf.bits != bits:
      raise modules.refuse(
        layer, leaf, f"{first} has {bits} bits, and a {name} directory has one width; {_ELSE}"
      )
    if not (_groups(leaf) == 1 if size == -1 else leaf.group_size == size):
      raise modules.refuse(
        layer, leaf, f"a {name} directory has one group size, here {size}; {_ELSE}"
      )
  notes = ["scales are stored in float16"]
  if any(".experts." in layer for layer in chosen):
    notes.append(
      f"transformers 5.23 does not read experts of a {name} directory; those of "
      "--format=compressed-tensors it does"
    )
  if name == "awq":
    out = {n: leaf for n, (m, leaf) in found.items() if m.linear and n not in chosen}
    config = {
      "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm",
      "modules_to_not_convert": [*out, *ignored],
    }  # fmt: skip
    return base.Layout(name, config, tuple(chosen), functools.partial(encode, name), tuple(notes))
  symmetric = all(leaf.zeros is None for leaf in chosen.values())
  config = {
    "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric,
    "desc_act": any(leaf.group_index is not None for leaf in chosen.values()),
    "checkpoint_format": name, "lm_head": False, "pack_dtype": "int32", "true_sequential": True,
    "damp_percent": 0.01,
  }  # fmt: skip
  some = _some(found, chosen)
  if some is not None:
    config["modules_in_block_to_quantize"] = some
  if name == "gptq_v2":
    notes.append(
      "vLLM and GPTQModel tell gptq_v2 from gptq; older readers take it for gptq, wrongly"
    )
  return base.Layout(name, config, tuple(chosen), functools.partial(encode, name), tuple(notes))


def encode(name: str, layer: str, leaf: Any) -> dict[str, np.ndarray]:
  """Turn a layer's leaf into tensors.

  Args:
    name: one of `NAMES`.
    layer: the layer.
    leaf: a leaf that `plan` accepted.

  Returns:
    Tensors by name.

  Raises:
    ValueError: for scales beyond float16, or zero points that version 1 cannot store.
  """
  bits, groups = leaf.bits, _groups(leaf)
  scales = np.broadcast_to(modules.dense(leaf.scales), (groups, leaf.cols))
  with np.errstate(over="ignore"):
    half = scales.astype(np.float32).astype(np.float16)
  if not np.isfinite(half).all() or ((half == 0) & (scales != 0)).any():
    raise modules.refuse(layer, leaf, f"its scales are beyond float16, which {name} stores")
  zeros = np.full((groups, leaf.cols), 2 ** (bits - 1), np.uint8)
  if leaf.zeros is not None:
    zeros = np.broadcast_to(np.asarray(leaf.zeros), zeros.shape)
  if name == "awq":
    parts = {
      "qweight": _nibbles(_integers(leaf)), "qzeros": _nibbles(zeros), "scales": half,
    }  # fmt: skip
    return {f"{layer}.{part}": x for part, x in parts.items()}
  if name == "gptq":
    if not zeros.all():
      raise modules.refuse(
        layer, leaf, "it has zero points of 0, which version 1 of GPTQ cannot store; use "
        "--format=gptq_v2",
      )  # fmt: skip
    zeros = zeros - np.uint8(1)
  index = np.arange(leaf.rows) // leaf.group_size
  if leaf.group_index is not None:
    index = np.asarray(leaf.group_index).reshape(-1)
  parts = {
    "qweight": words.join(np.asarray(leaf.codes)),
    "qzeros": words.pack(zeros.T, bits).T,
    "scales": half,
    "g_idx": index.astype(np.int32),
  }
  return {f"{layer}.{part}": x for part, x in parts.items()}


def read(
  config: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, int]],
  infos: Mapping[str, header.Info],
  store: str | None,
  peek: Any,
) -> dict[str, base.Held]:
  """Find the compressed layers of a directory.

  Args:
    config: value of `quantization_config`.
    shapes: (inputs, outputs) of every layer that may be compressed, by name.
    infos: tensor name to what its file says of it.
    store: dtype of the model, or None for that of the scales.
    peek: tensor name -> its array; the order of a layer's inputs is looked at to see whether it
      is one.

  Returns:
    Layers by name; those that are dense are left out.

  Raises:
    ValueError: for settings that are not supported, or tensors that do not fit them.
  """
  awq = config.get("quant_method") == "awq"
  version = str(config.get("version" if awq else "checkpoint_format") or config.get("format") or "")
  version = version.lower() or ("gemm" if awq else "gptq")
  if version not in (("gemm",) if awq else ("gptq", "gptq_v2")):
    raise ValueError(
      f"quantization_config: version {version!r} is not supported; gptq, gptq_v2 and AWQ's gemm are"
    )
  found = {}
  for layer, (rows, cols) in shapes.items():
    tensors = {p: f"{layer}.{p}" for p in _PARTS if f"{layer}.{p}" in infos}
    if "qweight" in tensors:
      one = {**config, **_override(config, layer)}
      found[layer] = _held(layer, one, version, tensors, infos, rows, cols, store, peek)
  return found


def _held(
  layer: str,
  config: Mapping[str, Any],
  version: str,
  tensors: Mapping[str, str],
  infos: Mapping[str, header.Info],
  rows: int,
  cols: int,
  store: str | None,
  peek: Any,
) -> base.Held:
  awq, bits = version == "gemm", int(config.get("bits") or config.get("w_bit") or 0)
  size = int(config.get("group_size") or config.get("q_group_size") or -1)
  size = rows if size == -1 else min(size, rows)
  groups = -(-rows // size)
  have = {p: infos[n] for p, n in tensors.items()}
  across = -(-cols * bits // 32)
  want = {
    "qweight": (rows, across) if awq else (-(-rows * bits // 32), cols),
    "qzeros": (groups, across),
    "scales": (groups, cols),
  } | ({} if awq else {"g_idx": (rows,)})
  lacking = set(want) - {"g_idx"} - set(have)
  widths = (4,) if awq else (2, 3, 4, 8)
  if bits not in widths or lacking or any(have[p].shape != want[p] for p in want if p in have):
    shown = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in have.items())
    raise ValueError(
      f"{layer}: {shown} do not fit {bits} bits in groups of {size} of {rows} inputs and {cols} "
      "outputs"
    )
  ordered = "g_idx" in tensors and not np.array_equal(
    peek(tensors["g_idx"]), np.arange(rows) // size
  )
  symmetric = bool(config.get("sym")) and not awq

  def decode(arrays: Mapping[str, np.ndarray] | None) -> Any:
    struct = jax.ShapeDtypeStruct
    codes = struct((packing.packed_rows(rows, bits), cols), np.uint8)
    scales, zeros = struct((groups, cols), have["scales"].dtype), struct((groups, cols), np.uint8)
    index = struct((1, rows), np.int32)
    if arrays is not None:
      scales, index = arrays["scales"], arrays["g_idx"][None] if ordered else None
      zeros = _zeros(arrays["qzeros"], version, bits, cols)
      if awq:
        codes = np.asarray(packing.pack(jnp.asarray(_outputs(arrays["qweight"])), bits=bits))
      else:
        codes = words.cut(arrays["qweight"], packing.packed_rows(rows, bits))
      if symmetric and (zeros != 2 ** (bits - 1)).any():
        raise ValueError(f"{layer}: sym is true, but its zero points are not all {2 ** (bits - 1)}")
    return leaves.QuantizedTensor(
      codes, scales, None if symmetric else zeros, index if ordered else None, rows=rows, cols=cols,
      bits=bits, group_size=size, store=store or have["scales"].dtype.name,
    )  # fmt: skip

  return base.Held(tensors, decode(None), decode)


def _check(name: str, module: modules.Module, leaf: Any) -> None:
  """Refuse a leaf that the layout cannot hold by itself."""
  kind = "awq" if name == "awq" else "gptq"
  fits, where = f"{_FITS[kind]}; {_ELSE}", " and ".join(module.entry.address)
  if not isinstance(leaf, leaves.QuantizedTensor) or leaf.batch or leaf.format != "int":
    raise modules.refuse(where, leaf, fits)
  if where == "lm_head/kernel":
    raise modules.refuse(
      where, leaf, "transformers' GPTQ and AWQ loaders leave the head dense; use "
      "--format=compressed-tensors, or a select that leaves it out",
    )  # fmt: skip
  if leaf.zeros is not None and (leaves.is_leaf(leaf.zeros) or leaf.zeros.dtype != jnp.uint8):
    raise modules.refuse(where, leaf, f"zero points must be whole numbers; {_ELSE}")
  grouped = leaf.rows % leaf.group_size == 0 or _groups(leaf) == 1
  grouped = grouped and (
    leaf.group_cols == 1 or (_groups(leaf) == 1 and leaf.group_cols >= leaf.cols)
  )
  if kind == "awq":
    if leaf.group_index is not None or not module.linear:
      what = "an order of inputs" if module.linear else "a Conv1D layer"
      raise modules.refuse(where, leaf, f"AWQ has no place for {what}; --format=gptq has")
    fine = leaf.bits == 4 and leaf.cols % 8 == 0
  else:
    fine = leaf.bits in (2, 3, 4, 8) and leaf.rows % 32 == 0 and leaf.cols % 32 == 0
  if not fine or not grouped:
    raise modules.refuse(where, leaf, fits)


def _groups(leaf: leaves.QuantizedTensor) -> int:
  return leaf.scales.shape[-2]


def _group_size(chosen: Mapping[str, Any]) -> int:
  """Find the one group size, -1 if every layer has a scale for each output."""
  several = [leaf.group_size for leaf in chosen.values() if _groups(leaf) > 1]
  return several[0] if several else -1


def _some(found: Mapping[str, tuple[modules.Module, Any]], chosen: Mapping[str, Any]) -> Any:
  """List the kinds of layers that are compressed; None if all layers of the blocks are."""
  kinds: dict[str, set[bool]] = {}
  for name in found:
    match = re.fullmatch(r".*?\.\d+\.(.+)", name)
    if match:
      kinds.setdefault(match[1], set()).add(name in chosen)
  mixed = [k for k, held in kinds.items() if len(held) > 1]
  if mixed:
    raise ValueError(
      f"{mixed[0]} is compressed in some layers and dense in others: GPTQ's readers leave out a "
      f"kind of layer or none; {_ELSE}"
    )
  inside = [k for k, held in kinds.items() if held == {True}]
  return None if len(inside) == len(kinds) else [inside]


def _override(config: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
  """Return what GPTQModel's `dynamic` sets for a layer."""
  for pattern, settings in (config.get("dynamic") or {}).items():
    if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), layer):
      return settings or {}
  return {}


def _integers(leaf: leaves.QuantizedTensor) -> np.ndarray:
  return np.asarray(packing.unpack(jnp.asarray(leaf.codes), bits=leaf.bits, rows=leaf.rows))


def _zeros(packed: np.ndarray, version: str, bits: int, cols: int) -> np.ndarray:
  """Unpack zero points, uint8 (groups, outputs)."""
  if version == "gemm":
    return _outputs(packed)
  zeros = words.unpack(packed.T, bits, cols).T
  return (zeros + np.uint8(1)) & np.uint8(2**bits - 1) if version == "gptq" else zeros


def _nibbles(codes: np.ndarray) -> np.ndarray:
  """Pack eight outputs a word, in AWQ's order."""
  rows, cols = codes.shape
  lanes = codes.reshape(rows, cols // 8, 8)[..., _NIBBLES].astype(np.uint32)
  shifts = np.arange(8, dtype=np.uint32) * 4
  return np.bitwise_or.reduce(lanes << shifts, axis=-1).view(np.int32)


def _outputs(packed: np.ndarray) -> np.ndarray:
  """Unpack AWQ's words; the inverse of `_nibbles`."""
  lanes = (packed.view(np.uint32)[..., None] >> (np.arange(8, dtype=np.uint32) * 4)) & 15
  return lanes.astype(np.uint8)[..., np.argsort(_NIBBLES)].reshape(packed.shape[0], -1)
