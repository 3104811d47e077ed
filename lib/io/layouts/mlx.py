# SPDX-License-Identifier: Apache-2.0
"""Directories that MLX reads and mlx-lm writes: affine integers, weight = scale * code + bias.

Of a layer of `in` inputs and `out` outputs, in groups of g inputs: `weight` uint32 (out, in * bits
/ 32), for every output a little-endian bitstream of its codes; `scales` and `biases` (out, in / g).
Our zero point z is the bias -z * scale. Widths and group sizes may differ by layer. MLX's own
scales may be negative; reading turns their codes over: scale * (code - z) = -scale * ((n - code) -
(n - z)), n the largest code. Where a bias is no whole multiple of its scale, zero points are read
as float32. Embeddings, which mlx-lm quantizes too, are read as dense.

Reference: https://github.com/ml-explore/mlx, https://github.com/ml-explore/mlx-lm
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from treesurgeon.core import leaves, packing
from treesurgeon.io import header
from treesurgeon.io.layouts import base, modules, words

NAME = "mlx"
KEYS = ("quantization", "quantization_config")  # mlx-lm writes both
_PARTS = ("weight", "scales", "biases")
_BITS, _SIZES = (2, 3, 4, 5, 6, 8), (128, 64, 32)
_FITS = (
  "MLX holds integers of 2, 3, 4, 5, 6 or 8 bits, a scale for each output or for each group of "
  "inputs, 32, 64 or 128 of which divide it; --format=hf writes it dense"
)


def plan(found: Mapping[str, tuple[modules.Module, Any]]) -> base.Layout:
  """Settle how a model's layers are written.

  Args:
    found: layer to its module and its leaf of shape structs.

  Returns:
    The layout.

  Raises:
    ValueError: naming the layer that does not fit and what would.
  """
  chosen = {n: leaf for n, (_, leaf) in found.items() if leaves.is_leaf(leaf)}
  forms = {}
  for layer, leaf in chosen.items():
    _check(found[layer][0], leaf)
    forms[layer] = {"group_size": _size(leaf), "bits": leaf.bits}
  most = max(forms.values(), key=list(forms.values()).count)
  experts = [n for n in found if ".experts." in n]
  if any(n in chosen for n in experts):
    for n in experts:
      if ".block_sparse_moe." not in n or forms.get(n) != most:
        raise modules.refuse(
          n, found[n][1], "mlx-lm stacks experts: it reads quantized ones of Mixtral, all in the "
          "form of most layers; --format=compressed-tensors holds these",
        )  # fmt: skip
  config = {**most, "mode": "affine"} | {n: form for n, form in forms.items() if form != most}
  notes = ["transformers does not read this directory; mlx-lm does"]
  types = [_dtype(leaf) for leaf in chosen.values()]
  if np.dtype(np.float32) in types:
    notes.append("scales are stored in float32, in which MLX then computes")
  if any(t != leaf.scales.dtype for leaf, t in zip(chosen.values(), types, strict=True)):
    notes.append("bfloat16 would be too short for the biases of asymmetric scales above 4 bits")
  if any(leaf.zeros is not None and t.itemsize == 2 for leaf, t in zip(
    chosen.values(), types, strict=True
  )):  # fmt: skip
    notes.append("zero point times scale is stored rounded to 16 bits, as scales are")
  if any(_size(leaf) != leaf.group_size for leaf in chosen.values()):
    notes.append("groups wider than 128 inputs are stored as several of one scale")
  return base.Layout(NAME, config, tuple(chosen), encode, tuple(notes), KEYS)


def encode(layer: str, leaf: Any) -> dict[str, np.ndarray]:
  """Turn a layer's leaf into tensors.

  Args:
    layer: the layer.
    leaf: a leaf that `plan` accepted.

  Returns:
    Tensors by name.

  Raises:
    ValueError: for zero points that its dtype cannot hold once they are scaled.
  """
  dtype, size = _dtype(leaf), _size(leaf)

  def spread(array: np.ndarray) -> np.ndarray:
    wide = np.broadcast_to(array.astype(np.float32), (array.shape[0], leaf.cols))
    return np.repeat(wide, leaf.rows // size // len(wide), 0).T

  scales = spread(modules.dense(leaf.scales))
  zeros = 2.0 ** (leaf.bits - 1)
  if leaf.zeros is not None:
    zeros = spread(modules.dense(leaf.zeros))
  with np.errstate(over="ignore"):
    biases = (-np.float32(1) * zeros * scales).astype(dtype)
  if not np.isfinite(biases).all():
    raise modules.refuse(layer, leaf, f"its zero points times its scales are beyond {dtype}")
  packed = np.ascontiguousarray(words.join(np.asarray(leaf.codes)).T).view(np.uint32)
  parts = {"weight": packed, "scales": scales.astype(dtype), "biases": biases}
  return {f"{layer}.{part}": np.ascontiguousarray(x) for part, x in parts.items()}


def read(
  config: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, int]],
  infos: Mapping[str, header.Info],
  store: str | None,
  peek: Any,
  tables: Mapping[str, tuple[int, ...]],
) -> dict[str, base.Held]:
  """Find the compressed layers of a directory.

  Args:
    config: value of `quantization`.
    shapes: (inputs, outputs) of every layer that may be compressed, by name.
    infos: tensor name to what its file says of it.
    store: dtype of the model, or None for that of the scales.
    peek: tensor name -> its array; scales and biases are looked at to see what zero points are.
    tables: (ids, width) of the embeddings.

  Returns:
    Layers by name; those that are dense are left out.

  Raises:
    ValueError: for settings that are not supported, or tensors that do not fit them.
  """
  found = {}
  for layer in (*shapes, *tables):
    tensors = {p: f"{layer}.{p}" for p in _PARTS if f"{layer}.{p}" in infos}
    if "scales" not in tensors:
      continue
    own = config.get(layer)
    form = {**config, **own} if isinstance(own, Mapping) else config
    if form.get("mode", "affine") != "affine":
      raise ValueError(f"{layer}: MLX's mode {form['mode']!r} is not supported; affine is")
    cols, rows = shapes[layer][::-1] if layer in shapes else tables[layer]
    held = _held(layer, form, tensors, infos, rows, cols, store, peek)
    found[layer] = _dense(held) if layer in tables else held
  return found


def _held(
  layer: str,
  config: Mapping[str, Any],
  tensors: Mapping[str, str],
  infos: Mapping[str, header.Info],
  rows: int,
  cols: int,
  store: str | None,
  peek: Any,
) -> base.Held:
  bits, size = int(config.get("bits") or 0), int(config.get("group_size") or 0)
  have = {p: infos[n] for p, n in tensors.items()}
  fits = set(have) == set(_PARTS) and bits in _BITS and size in _SIZES and rows % size == 0
  if fits:
    want = {"weight": (cols, rows * bits // 32), "scales": (cols, rows // size)}
    fits = all(have[p].shape == want.get(p, want["scales"]) for p in _PARTS)
  if not fits or have["weight"].dtype != np.uint32:
    shown = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in have.items())
    raise ValueError(
      f"{layer}: {shown} do not fit {bits} bits in groups of {size} of {rows} inputs and {cols} "
      "outputs"
    )
  zeros = _zeros(layer, peek(tensors["scales"]), peek(tensors["biases"]), bits)

  def decode(arrays: Mapping[str, np.ndarray]) -> Any:
    stream = words.cut(np.ascontiguousarray(arrays["weight"].T).view(np.int32), codes.shape[0])
    scales = np.ascontiguousarray(arrays["scales"].T)
    if (negative := scales < 0).any():  # a group's codes are whole bytes of the stream
      stream = stream ^ np.repeat(negative.astype(np.uint8) * np.uint8(255), size * bits // 8, 0)
    return leaf(stream, np.abs(scales), zeros)

  def leaf(codes: Any, scales: Any, zeros: Any) -> leaves.QuantizedTensor:
    return leaves.QuantizedTensor(
      codes, scales, zeros, None, rows=rows, cols=cols, bits=bits, group_size=size,
      store=store or have["scales"].dtype.name,
    )  # fmt: skip

  codes = jax.ShapeDtypeStruct((packing.packed_rows(rows, bits), cols), np.uint8)
  scales = jax.ShapeDtypeStruct((rows // size, cols), have["scales"].dtype)
  point = None if zeros is None else jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
  return base.Held(tensors, leaf(codes, scales, point), decode)


def _dense(held: base.Held) -> base.Held:
  """Read an embedding, whose codes run along its columns, as an array."""
  form = held.struct

  def decode(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(modules.dense(held.decode(arrays)).T)

  struct = jax.ShapeDtypeStruct((form.cols, form.rows), form.dtype)
  return base.Held(held.tensors, struct, decode)


def _zeros(layer: str, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray | None:
  """Find zero points, scales made positive: none if symmetric, uint8 if whole, or float32."""
  scale, bias = scales.astype(np.float32), biases.astype(np.float32)
  none = scale == 0
  if (bias[none] != 0).any():
    raise ValueError(f"{layer}: a scale is 0 and its bias is not, which is not supported")
  zeros = np.where(none, 2.0 ** (bits - 1), -bias / np.where(none, 1, scale)).astype(np.float32)
  exact = (-np.round(zeros) * scale).astype(biases.dtype) == biases
  zeros = np.where(scale < 0, 2**bits - 1 - zeros, zeros)
  whole = np.round(zeros)
  if not (exact & (whole >= 0) & (whole < 2**bits)).all():
    return np.ascontiguousarray(zeros.T)
  if (whole == 2 ** (bits - 1)).all():
    return None
  return np.ascontiguousarray(whole.astype(np.uint8).T)


def _check(module: modules.Module, leaf: Any) -> None:
  """Refuse a leaf that the layout cannot hold."""
  where = " and ".join(module.entry.address)
  if not isinstance(leaf, leaves.QuantizedTensor) or leaf.batch or leaf.format != "int":
    raise modules.refuse(where, leaf, _FITS)
  if leaf.group_index is not None or not module.linear:
    what = "an order of inputs" if module.linear else "a Conv1D layer"
    raise modules.refuse(where, leaf, f"MLX has no place for {what}; --format=gptq has")
  wide = leaf.group_cols == 1 or (leaf.group_cols >= leaf.cols and leaf.group_size >= leaf.rows)
  if leaf.bits not in _BITS or not wide or not _size(leaf):
    raise modules.refuse(where, leaf, _FITS)


def _size(leaf: Any) -> int:
  """Find the group size that stores a leaf's groups; 0 if none does."""
  whole = min(leaf.group_size, leaf.rows)
  if leaf.rows % whole:
    return 0
  return next((size for size in _SIZES if whole % size == 0), 0)


def _dtype(leaf: Any) -> np.dtype:
  """Return what scales and biases are stored in: the dtype of the scales, where MLX has it.

  But a bias of more than 15 scales is rounded by up to half a code in bfloat16.
  """
  short = ["float16"] if leaf.zeros is not None and leaf.bits > 4 else ["float16", "bfloat16"]
  return np.dtype(leaf.scales.dtype if leaf.scales.dtype.name in short else np.float32)
