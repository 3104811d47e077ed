# SPDX-License-Identifier: Apache-2.0
"""Layouts of quantized directories that other tools read and write.

`plan` settles from shapes alone how a model's compressed leaves are written, or says which one does
not fit and what would; `read` finds the compressed layers of a directory with a
`quantization_config`. Codes pass bit for bit both ways.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.io import header
from treesurgeon.io.layouts import compressed_tensors, compressed_tensors_read, gptq, mlx, modules
from treesurgeon.io.layouts.base import Held, Layout
from treesurgeon.models import hf

NAMES = (compressed_tensors.NAME, *gptq.NAMES, mlx.NAME)
KEYS = ("quantization_config", "compression_config", "quantization")

__all__ = ["KEYS", "NAMES", "Layer", "Layout", "encode", "held", "plan"]


class Layer:
  """A compressed layer of another tool's directory, and the leaves it holds.

  Args:
    spec: the architecture.
    module: where it stands.
    parts: what the tool made of it.

  Attributes:
    name: of the layer.
    tensors: part to tensor name.
  """

  def __init__(self, spec: Any, module: modules.Module, parts: Held):
    self.name, self.tensors = module.name, parts.tensors
    self._spec, self._module, self._parts = spec, module, parts

  def struct(self, address: str) -> Any:
    """Return the shapes and dtypes of one of its leaves."""
    return modules.split(self._spec, self._module, self._parts.struct)[address]

  def leaf(self, address: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """Make one of its leaves of the layer's tensors, given by part."""
    return modules.split(self._spec, self._module, self._parts.decode(arrays))[address]


def plan(name: str, spec: Any, structs: Mapping[str, Any]) -> Layout:
  """Settle how a model's compressed leaves are written for another tool.

  Args:
    name: one of `NAMES`.
    spec: the architecture.
    structs: every leaf's shapes and dtypes, by address. N:M sparse leaves count as dense.

  Returns:
    The layout.

  Raises:
    ValueError: if nothing is compressed, or a leaf does not fit.
  """
  found, inside = {}, set()
  for layer, module in modules.find(hf.entries(spec)).items():
    parts = {a: plain(structs[a]) for a in module.entry.address}
    found[layer] = module, modules.join(spec, module, parts)
    inside.update(parts)
  for address, leaf in structs.items():
    if leaves.is_leaf(plain(leaf)) and address not in inside:
      raise modules.refuse(
        address, leaf, f"{name} compresses linear layers only; --format=hf writes it dense"
      )
  if not any(leaves.is_leaf(leaf) for _, leaf in found.values()):
    raise ValueError(
      f"--format={name}: no layer of the model is quantized; apply "
      "compress.quantize.rtn(bits=4, group_size=128) or another quantizer first"
    )
  heads = [h for h in modules.tied_heads(spec) if h not in found]
  if name == compressed_tensors.NAME:
    return compressed_tensors.plan(found, heads)
  if name == mlx.NAME:
    return mlx.plan(found)
  return gptq.plan(name, found, heads)


def encode(
  layout: Layout, spec: Any, entry: hf.Entry, parts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Turn the leaves of one layer into the tensors of a layout.

  Args:
    layout: from `plan`.
    spec: the architecture.
    entry: the layer's weight in a plain file.
    parts: its leaves by address.

  Returns:
    Tensors by name.

  Raises:
    ValueError: for values that do not fit.
  """
  module = modules.find([entry])[entry.name.removesuffix(".weight")]
  host = {a: jax.tree.map(np.asarray, leaf) for a, leaf in parts.items()}
  return layout.encode(module.name, modules.join(spec, module, host))


def plain(leaf: Any) -> Any:
  """Return what stands for a leaf that no layout holds but that is dense to everybody.

  Args:
    leaf: array, shape struct or compressed leaf.

  Returns:
    A shape struct for an N:M sparse leaf, which is written with its zeros; others as they are.
  """
  return jax.eval_shape(leaves.dense, leaf) if isinstance(leaf, leaves.SparseTensor) else leaf


def held(
  config: Mapping[str, Any],
  spec: Any,
  entries: Sequence[hf.Entry],
  infos: Mapping[str, header.Info],
  peek: Callable[[str], np.ndarray],
) -> dict[str, Layer]:
  """Find the compressed layers of a directory.

  Args:
    config: the parsed config.json.
    spec: the architecture.
    entries: the tensors that a plain directory would have.
    infos: tensor name to what its file says of it.
    peek: tensor name -> its array.

  Returns:
    Layers by the name of the weight in a plain file; none without a `quantization_config`.

  Raises:
    ValueError: for a method or setting that is not supported, or tensors that do not fit it.
  """
  settings = next((config[k] for k in KEYS if config.get(k)), None)
  if settings is None:
    return {}
  if not isinstance(settings, Mapping):
    raise ValueError(f"quantization_config must be an object; got {str(settings)[:80]}")
  found = modules.find(entries)
  shapes = {}
  for name, module in found.items():
    parts = [hf.address_shape(spec, a) for a in module.entry.address]
    shapes[name] = parts[0][0], sum(p[1] for p in parts)
  store = config.get("dtype") or config.get("torch_dtype")
  store = store if store in ("float32", "bfloat16", "float16") else None
  method = str(settings.get("quant_method") or "").lower()
  if method == compressed_tensors.NAME:
    layers = compressed_tensors_read.read(settings, shapes, infos, store)
  elif method in ("gptq", "awq"):
    layers = gptq.read(settings, shapes, infos, store, peek)
  elif not method and "bits" in settings and "group_size" in settings:
    tables = modules.tables(entries)
    sizes = {n: hf.address_shape(spec, m.entry.address[0]) for n, m in tables.items()}
    layers = mlx.read(settings, shapes, infos, store, peek, sizes)
    found |= tables
  else:
    raise ValueError(
      f"quantization_config: quant_method {method!r} is not supported; compressed-tensors, gptq, "
      "awq and MLX's are. Give the unquantized model"
    )
  return {found[n].entry.name: Layer(spec, found[n], parts) for n, parts in layers.items()}
