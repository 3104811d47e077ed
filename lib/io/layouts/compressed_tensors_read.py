# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors, as llm-compressor writes it: reading; `compressed_tensors` tells the layout.

Files from before 2026 are read too: 3-bit codes that were padded to whole words, and the order of
rows that `weight_g_idx` told.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from treesurgeon.core import leaves, packing
from treesurgeon.io import header
from treesurgeon.io.layouts import base, words

_E4M3, _E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
_PARTS = (
  "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape",
  "weight_global_scale", "weight_g_idx", "input_scale",
)  # fmt: skip
_INDEX = "weight_g_idx"


def read(
  config: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, int]],
  infos: Mapping[str, header.Info],
  store: str | None,
) -> dict[str, base.Held]:
  """Find the compressed layers of a directory.

  Args:
    config: value of `quantization_config`.
    shapes: (inputs, outputs) of every linear layer, by name.
    infos: tensor name to what its file says of it.
    store: dtype of the model, or None for that of the scales.

  Returns:
    Layers by name; those that are dense are left out.

  Raises:
    ValueError: for a scheme that leaves cannot hold, or tensors that do not fit it.
  """
  for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
    used = config.get(key)
    if used and used.get("format") != "dense" and used != {"config_groups": {}}:
      raise ValueError(f"quantization_config has a {key}, which is not supported")
  schemes = _schemes(config)
  found = {}
  for name, (rows, cols) in shapes.items():
    tensors = {p: f"{name}.{p}" for p in _PARTS if f"{name}.{p}" in infos}
    if "weight_scale" in tensors:
      scheme = _match(name, schemes)
      if scheme is None:
        raise ValueError(f"no config group of quantization_config has the layer {name!r}")
      parts = {p: infos[n] for p, n in tensors.items()}
      found[name] = _Layer(name, scheme, parts, rows, cols, store).held(tensors)
  return found


class _Layer:
  """One layer: what its leaf looks like, and how it comes of the tensors."""

  def __init__(
    self,
    name: str,
    scheme: Mapping[str, Any],
    parts: Mapping[str, header.Info],
    rows: int,
    cols: int,
    store: str | None,
  ):
    self.name, self.parts, self.rows, self.cols = name, parts, rows, cols
    self.weights = scheme.get("weights") or {}
    self.bits = int(self.weights.get("num_bits") or 0)
    self.inputs = scheme.get("input_activations")
    main = parts.get("weight_packed") or parts.get("weight")
    if main is None or self.weights.get("dynamic"):
      raise ValueError(f"{name}: its tensors {', '.join(parts)} are of no known format")
    real = self.weights.get("type") == "float"
    self.format = {(8, True): "e4m3fn", (4, True): "e2m1"}.get((self.bits, real), "int")
    if self.format == "int" and (real or not 1 <= self.bits <= 8):
      raise ValueError(
        f"{name}: {self.bits}-bit {self.weights.get('type')} codes are not supported"
      )
    if scheme.get("output_activations"):
      raise ValueError(f"{name}: outputs that are quantized are not supported")
    self.padded = False
    self._check(main)
    self.store = store or self._scale_dtype().name

  def held(self, tensors: Mapping[str, str]) -> base.Held:
    return base.Held(tensors, self._leaf(None), self._leaf)

  def _check(self, main: header.Info) -> None:
    """Refuse tensors whose shapes do not fit the scheme."""
    bits, rows, cols = self.bits, self.rows, self.cols
    wide = {"int8": rows, "float8_e4m3fn": rows, "uint8": -(-rows // 2)}.get(main.dtype.name)
    packed = -(-rows * bits // 32)
    if main.dtype == np.int32:
      old = -(-rows // (32 // bits))
      self.padded = main.shape == (cols, old) and old != packed
      wide = old if self.padded else packed
    strategy = self.weights.get("strategy") or ("group" if self._size() else "tensor")
    down, across = self._tile(strategy)
    groups = (-(-cols // across), -(-rows // down))
    have = self.parts["weight_scale"].shape
    fits = main.shape == (cols, wide) and math.prod(have) == math.prod(groups)
    zero = self.parts.get("weight_zero_point")
    if zero is not None and main.dtype == np.int32 and strategy != "tensor":
      fits = fits and zero.shape == (-(-cols * bits // 32), groups[1])
    if not fits:
      shown = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in self.parts.items())
      raise ValueError(
        f"{self.name}: {shown} do not fit {bits}-bit {self.format} codes with a scale for each "
        f"{strategy} of a layer of {rows} inputs and {cols} outputs"
      )
    self.down, self.across, self.groups = down, across, groups

  def _size(self) -> int:
    return max(0, self.weights.get("group_size") or 0)

  def _tile(self, strategy: str) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    if strategy in ("group", "tensor_group"):
      return self._size() or self.rows, 1
    if strategy == "block":
      structure = self.weights["block_structure"]
      across, down = map(int, structure.split("x") if isinstance(structure, str) else structure)
      return min(down, self.rows), min(across, self.cols)
    return self.rows, self.cols if strategy == "tensor" else 1

  def _scale_dtype(self) -> np.dtype:
    dtype = self.parts["weight_scale"].dtype
    return np.dtype(np.float32) if dtype in (np.uint8, _E4M3, _E8M0) else dtype

  def _leaf(self, arrays: Mapping[str, np.ndarray] | None) -> Any:
    """Build the leaf of arrays, or of shape structs without."""
    a, bits = arrays, self.bits
    down, across = self.groups[::-1]
    codes = _or(a, (packing.packed_rows(self.rows, bits), self.cols), np.uint8, self._codes)
    scales, zeros, index = self._scales(a), None, None
    if "weight_zero_point" in self.parts and self.format == "int":
      zeros = _or(a, (down, across), np.uint8, self._zeros)
    elif not self.weights.get("symmetric", True):
      raise ValueError(f"{self.name}: asymmetric, but has no weight_zero_point")
    if _INDEX in self.parts:
      index = _or(a, (1, self.rows), np.int32, lambda t: t[_INDEX][None])
    leaf = leaves.QuantizedTensor(
      codes, scales, zeros, index, rows=self.rows, cols=self.cols, bits=bits,
      group_size=self.down, store=self.store, format=self.format, group_cols=self.across,
    )  # fmt: skip
    return self._activations(leaf, self.inputs, a) if self.inputs else leaf

  def _codes(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    main = arrays.get("weight_packed", arrays.get("weight"))
    assert main is not None
    if main.dtype == np.int8:
      return main.view(np.uint8).T ^ np.uint8(0x80)
    if main.dtype != np.int32:
      return main.view(np.uint8).T
    if self.padded:
      lanes = np.arange(32 // self.bits, dtype=np.uint32) * self.bits
      codes = (main.view(np.uint32)[..., None] >> lanes).astype(np.uint8) & (2**self.bits - 1)
      codes = codes.reshape(self.cols, -1)[:, : self.rows].T
      return words.cut(words.pack(codes, self.bits), packing.packed_rows(self.rows, self.bits))
    return words.cut(main.T, packing.packed_rows(self.rows, self.bits))

  def _zeros(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    zeros = arrays["weight_zero_point"]
    if zeros.dtype == np.int32:
      return words.unpack(zeros, self.bits, self.cols).T
    wide = zeros.astype(np.int16).reshape(self.groups) + 2 ** (self.bits - 1)
    return wide.astype(np.uint8).T

  def _scales(self, arrays: Mapping[str, np.ndarray] | None) -> Any:
    dtype, shape = self.parts["weight_scale"].dtype, self.groups[::-1]
    stored = lambda t: t["weight_scale"].reshape(self.groups).T
    if dtype == np.uint8 or dtype == _E8M0:
      return _or(arrays, shape, _E8M0, lambda t: stored(t).view(_E8M0))
    if dtype != _E4M3:
      return _or(arrays, shape, dtype, stored)
    if "weight_global_scale" not in self.parts:
      raise ValueError(f"{self.name}: 8-bit scales, but has no weight_global_scale")
    rows, cols = shape
    inner = _or(arrays, shape, np.uint8, lambda t: stored(t).view(np.uint8))
    whole = lambda t: (1 / t["weight_global_scale"].astype(np.float32)).reshape(1, 1)
    return leaves.QuantizedTensor(
      inner, _or(arrays, (1, 1), np.float32, whole), None, None, rows=rows, cols=cols, bits=8,
      group_size=rows, format="e4m3fn", group_cols=cols,
    )  # fmt: skip

  def _activations(
    self, leaf: Any, inputs: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None
  ) -> Any:
    real = inputs.get("type") == "float"
    per = {"token": "token", "tensor": "tensor"}.get(inputs.get("strategy") or "tensor")
    eight = inputs.get("num_bits") == 8 and inputs.get("symmetric", True)
    if per is None or not eight or (not inputs.get("dynamic") and per != "tensor"):
      raise ValueError(
        f"{self.name}: input_activations {dict(inputs)} are not supported; 8 bits, symmetric, for "
        "each token or tensor are"
      )
    scale = None
    if not inputs.get("dynamic"):
      if "input_scale" not in self.parts:
        raise ValueError(f"{self.name}: static input_activations, but has no input_scale")
      dtype = self.parts["input_scale"].dtype
      scale = _or(arrays, (1, 1), dtype, lambda t: t["input_scale"].reshape(1, 1))
    form = "e4m3fn" if real else "int"
    return leaves.ActivationQuantized(leaf, scale, bits=8, format=form, per=per)


def _or(arrays: Any, shape: tuple[int, ...], dtype: Any, make: Any) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype) if arrays is None else make(arrays)


def _schemes(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
  groups = config.get("config_groups")
  if not isinstance(groups, Mapping) or not groups:
    raise ValueError("quantization_config has no config_groups")
  out = []
  for group in groups.values():
    if not isinstance(group, Mapping):
      raise ValueError("a config group of quantization_config names a preset, not a scheme")
    out += [(target, group) for target in group.get("targets") or ()]
  return out


def _match(name: str, schemes: list[tuple[str, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
  """Find a layer's scheme as compressed-tensors does: by name, by pattern, by class."""
  by_name = sorted(schemes, key=lambda s: ("re:" in s[0], s[0]))
  for target, scheme in by_name:
    if target.startswith("re:"):
      if re.match(target.removeprefix("re:"), name):
        return scheme
    elif target == name:
      return scheme
  return next((s for t, s in by_name if t == "Linear"), None)
