# SPDX-License-Identifier: Apache-2.0
"""Which layer of the other library holds which leaves, and one leaf for each layer.

Other tools quantize layers, `model.layers.0.mlp.up_proj`; we quantize leaves. Mostly they are one
to one. Where a family's files fuse several leaves in one layer (GPT-NeoX's q, k and v), the columns
of the leaves are put together, and cut apart when read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.models import hf, hf_names

_WEIGHT = ".weight"


class Module(NamedTuple):
  """A layer that holds kernels.

  Attributes:
    name: what `named_modules` calls it.
    entry: its weight's place in a plain file.
    linear: whether it is an `nn.Linear`; GPT-2's are `Conv1D`.
  """

  name: str
  entry: hf.Entry
  linear: bool


def find(entries: Sequence[hf.Entry]) -> dict[str, Module]:
  """List the layers that hold kernels, in file order.

  Args:
    entries: from `hf.entries`.

  Returns:
    Modules by name.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(family="llama", vocab_size=5, d_model=4, num_layers=1, num_heads=1,
    ...                    d_ff=8, tied=False)
    >>> list(find(hf.entries(spec)))[-2:]
    ['model.layers.0.mlp.down_proj', 'lm_head']
  """
  found = {}
  for entry in entries:
    kernel = all(a.endswith("/kernel") for a in entry.address)
    if kernel and entry.name.endswith(_WEIGHT) and entry.kind != "alias":
      name = entry.name.removesuffix(_WEIGHT)
      found[name] = Module(name, entry, entry.kind in ("transpose", "rows", "interleave"))
  return found


def tables(entries: Sequence[hf.Entry]) -> dict[str, Module]:
  """List the layers that hold embeddings, in file order.

  Args:
    entries: from `hf.entries`.

  Returns:
    Modules by name.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(family="llama", vocab_size=5, d_model=4, num_layers=1, num_heads=1,
    ...                    d_ff=8)
    >>> list(tables(hf.entries(spec)))
    ['model.embed_tokens']
  """
  held = [e for e in entries if e.kind == "copy" and e.address[0].startswith("embed/")]
  names = [e.name.removesuffix(_WEIGHT) for e in held]
  return {n: Module(n, e, False) for n, e in zip(names, held, strict=True) if n != e.name}


def tied_heads(spec: Any) -> list[str]:
  """Name the linear layers whose weight is the embedding's.

  Args:
    spec: the architecture.

  Returns:
    Names; they have no tensor of their own.

  Example:
    >>> from treesurgeon import models
    >>> tied_heads(models.Spec(family="llama", vocab_size=5, d_model=4, num_layers=1, num_heads=1,
    ...                        d_ff=8, tied=True))
    ['lm_head']
  """
  family = hf_names.FAMILIES.get(spec.family)
  if family is None or not getattr(spec, "tied", False):
    return []
  return [n.removesuffix(_WEIGHT) for n, a in family.aliases if a.startswith("embed/")]


def join(spec: Any, module: Module, parts: Mapping[str, Any]) -> Any:
  """Make one leaf of those that a layer holds.

  Args:
    spec: the architecture.
    module: the layer.
    parts: leaves by address, of arrays or of shape structs.

  Returns:
    The leaf of the whole layer.

  Raises:
    ValueError: if they are not of one form, or a scale spans several columns.
  """
  entry = module.entry
  if len(entry.address) == 1:
    return parts[entry.address[0]]
  first = entry.address[0]
  for address in entry.address:
    if form(parts[address]) != form(parts[first]):
      raise ValueError(
        f"{address} is {describe(parts[address])} and {first} is {describe(parts[first])}, but "
        f"both are part of the layer {module.name}; compress them alike"
      )
  places = hf.columns(spec, entry)
  total = sum(map(len, places.values()))

  def fuse(*arrays: Any) -> Any:
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((*arrays[0].shape[:-1], total), arrays[0].dtype)
    out = np.empty((*arrays[0].shape[:-1], total), arrays[0].dtype)
    for place, array in zip(places.values(), arrays, strict=True):
      out[..., place] = np.asarray(array)
    return out

  order = _order(parts[first])
  for address in entry.address:
    other = _order(parts[address])
    if isinstance(order, np.ndarray) and not np.array_equal(order, other):
      raise ValueError(f"{address} and {first} order their rows in different ways; their layer "
                       f"{module.name} has one order")  # fmt: skip
  alike = [_wide(parts[a], total, a) for a in entry.address]
  return _reorder(jax.tree.map(fuse, *alike), order)


def split(spec: Any, module: Module, leaf: Any) -> dict[str, Any]:
  """Cut a layer's leaf into those of its addresses; the inverse of `join`.

  Args:
    spec: the architecture.
    module: the layer.
    leaf: of the whole layer, of arrays or of shape structs.

  Returns:
    Leaves by address.

  Raises:
    ValueError: if a scale spans several columns.
  """
  entry = module.entry
  if len(entry.address) == 1:
    return {entry.address[0]: leaf}
  out = {}
  for address, place in hf.columns(spec, entry).items():

    def cut(array: Any, place: np.ndarray = place) -> Any:
      if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*array.shape[:-1], len(place)), array.dtype)
      return np.asarray(array)[..., place]

    whole = _wide(leaf, len(place), module.name)
    out[address] = _reorder(jax.tree.map(cut, whole), _order(leaf))
  return out


def form(leaf: Any) -> Any:
  """Return what leaves must agree in to share a layer: everything but the number of columns.

  Args:
    leaf: array, shape struct or compressed leaf.

  Returns:
    A comparable value.
  """
  if not isinstance(leaf, leaves.Compressed):
    return leaf.dtype
  fields = {
    f.name: form(v) if isinstance(v, leaves.Compressed) or hasattr(v, "dtype") else v
    for f in dataclasses.fields(leaf)  # pyright: ignore[reportArgumentType]
    if f.name != "cols"
    for v in [getattr(leaf, f.name)]
  }
  return type(leaf).__name__, fields


def dense(leaf: Any) -> np.ndarray:
  """Compute the host array that a leaf of host arrays stands for.

  Args:
    leaf: array or compressed leaf.

  Returns:
    Its dense value.

  Example:
    >>> dense(np.ones(2)).tolist()
    [1.0, 1.0]
  """
  return np.asarray(leaves.dense(jax.tree.map(jax.numpy.asarray, leaf)))


def describe(leaf: Any) -> str:
  """Say what a leaf is, for messages.

  Args:
    leaf: array, shape struct or compressed leaf.

  Returns:
    A phrase.

  Example:
    >>> describe(np.zeros((2, 3), np.float32))
    'a dense float32 array'
  """
  if isinstance(leaf, leaves.ActivationQuantized):
    how = f"{'dynamic' if leaf.scale is None else 'static'} per {leaf.per}"
    return f"{describe(leaf.weight)} with {leaf.bits}-bit {leaf.format} inputs, {how}"
  if isinstance(leaf, leaves.Sum):
    return f"a sum of {' plus '.join(describe(p) for p in leaf.parts)}"
  if not isinstance(leaf, leaves.QuantizedTensor):
    return f"a {type(leaf).__name__}" if leaves.is_leaf(leaf) else f"a dense {leaf.dtype} array"
  kind = f"{leaf.bits}-bit {leaf.format} codes"
  if leaf.format == "int":
    kind += ", symmetric" if leaf.zeros is None else ", asymmetric"
  tile = f"{min(leaf.group_size, leaf.rows)} x {min(leaf.group_cols, leaf.cols)}"
  order = ", rows in any order" if leaf.group_index is not None else ""
  scales = "quantized " if leaves.is_leaf(leaf.scales) else ""
  return f"{kind}, a {scales}scale for each {tile} of {leaf.rows} x {leaf.cols} weights{order}"


def refuse(where: str, leaf: Any, why: str) -> ValueError:
  """Make the error for a leaf that a layout cannot hold.

  Args:
    where: address or layer.
    leaf: what is there.
    why: what stands in the way, and what would fit.

  Returns:
    The error, to be raised.
  """
  return ValueError(f"{where} is {describe(leaf)}: {why}")


def _wide(leaf: Any, cols: int, where: str) -> Any:
  """Return the leaf with another number of columns written in it, and without its row order."""
  if isinstance(leaf, leaves.ActivationQuantized) and leaf.scale is None:
    return dataclasses.replace(leaf, weight=_wide(leaf.weight, cols, where))
  if isinstance(leaf, leaves.QuantizedTensor) and leaf.group_cols == 1:
    if not leaves.is_leaf(leaf.scales) and not leaves.is_leaf(leaf.zeros):
      return dataclasses.replace(leaf, cols=cols, group_index=None)
  if not leaves.is_leaf(leaf):
    return leaf
  raise refuse(
    where, leaf, "its layer is fused with others, which takes a scale for each column or for each "
    "group of rows in it",
  )  # fmt: skip


def _order(leaf: Any) -> Any:
  index = getattr(leaf, "group_index", None)
  return index if index is None or isinstance(index, jax.ShapeDtypeStruct) else np.asarray(index)


def _reorder(leaf: Any, order: Any) -> Any:
  return leaf if order is None else dataclasses.replace(leaf, group_index=order)
