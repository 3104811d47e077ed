# SPDX-License-Identifier: Apache-2.0
"""Compressed leaves: containers that stand where an array stood in a model's parameters.

Each is a pytree node whose arrays may carry leading (layer or expert) axes, so a compressed leaf
survives jit, scan, sharding, checkpointing and depth growth like an array does. The logical value
is always a matrix of shape `(..., rows, cols)`, input dimension first; `dense` computes it.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing

# A field that holds an array. Not annotated as one: jax rebuilds containers around whatever a tree
# map returned (shapes, shardings, names), and tests check annotations at run time.
Part = Any
T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def _container(data: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
  """Register a frozen dataclass as a pytree whose `data` fields are children, the rest static."""

  def register(cls: type[T]) -> type[T]:
    cls = dataclasses.dataclass(frozen=True)(cls)
    meta = tuple(f.name for f in dataclasses.fields(cls) if f.name not in data)  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

  return register


class Compressed:
  """What every compressed leaf answers: its logical shape and dtype, and its dense value."""

  rows: int
  cols: int

  def dense(self) -> jax.Array:
    """Compute the matrix that this leaf stands for, in its storage dtype."""
    raise TypeError(f"{type(self).__name__} does not say how to become dense")

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    first = jax.tree.leaves(self)[0]
    return tuple(first.shape[:-2])

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, `(..., rows, cols)`."""
    return (*self.batch, self.rows, self.cols)

  @property
  def ndim(self) -> int:
    """Number of logical axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of logical weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes actually held, all parts counted."""
    return sum(nbytes(x) for x in jax.tree.leaves(self))


@_container(("codes", "scales", "zeros", "group_index"))
class QuantizedTensor(Compressed):
  """Hold integer codes with one scale (and zero point) a group of input rows.

  `weight = (code - zero) * scale`, codes unsigned; `zeros=None` means symmetric, zero point
  `2**(bits - 1)`. Groups are runs of `group_size` rows unless `group_index` names each row's group
  (activation ordering without static groups). One scale a column is `group_size == rows`.

  Attributes:
    codes: bytes, (..., packed_rows(rows, bits), cols), see `core.packing`.
    scales: (..., groups, cols), floating point.
    zeros: (..., groups, cols) uint8, or None.
    group_index: (..., 1, rows) int32, or None.
    rows, cols: the matrix shape, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; the last group may be shorter.
    store: name of the dtype of the dense value.
  """

  codes: Part
  scales: Part
  zeros: Part
  group_index: Part
  rows: int
  cols: int
  bits: int
  group_size: int
  store: str = "float32"

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  def integers(self) -> jax.Array:
    """Unpack the codes to uint8, (..., rows, cols)."""
    return packing.unpack(self.codes, bits=self.bits, rows=self.rows)

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    codes = self.integers().astype(jnp.float32)
    scales = self.spread(self.scales).astype(jnp.float32)
    if self.zeros is None:
      shifted = codes - 2.0 ** (self.bits - 1)
    else:
      shifted = codes - self.spread(self.zeros).astype(jnp.float32)
    return (shifted * scales).astype(self.dtype)

  def spread(self, per_group: jax.Array) -> jax.Array:
    """Repeat a (..., groups, cols) array to one row an input row."""
    if self.group_index is not None:
      index = jnp.swapaxes(self.group_index, -1, -2)
      return jnp.take_along_axis(per_group, index, axis=-2)
    if self.rows == self.group_size:
      return per_group
    wide = jnp.repeat(per_group, self.group_size, axis=-2)
    return jax.lax.slice_in_dim(wide, 0, self.rows, axis=wide.ndim - 2)


@_container(("values", "positions"))
class SparseTensor(Compressed):
  """Hold N of every M consecutive input rows of each column (N:M sparsity).

  Attributes:
    values: (..., rows // m * n, cols), the kept weights in row order.
    positions: their place within the run of m, packed as `ceil(log2 m)`-bit codes.
    rows, cols: the matrix shape; rows is a multiple of m.
    n, m: how many are kept of how many.
  """

  values: Part
  positions: Part
  rows: int
  cols: int
  n: int
  m: int

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.values.dtype

  def dense(self) -> jax.Array:
    """Scatter the kept values back to their rows."""
    kept, runs = self.rows // self.m * self.n, self.rows // self.m
    bits = max(1, (self.m - 1).bit_length())
    place = packing.unpack(self.positions, bits=bits, rows=kept)
    shape = (*self.batch, runs, self.n, 1, self.cols)
    lane = jnp.arange(self.m, dtype=jnp.uint8).reshape((1,) * (len(shape) - 2) + (self.m, 1))
    hit = place.reshape(shape) == lane
    full = jnp.where(hit, self.values.reshape(shape), jnp.zeros((), self.dtype)).sum(axis=-3)
    return full.reshape(self.shape).astype(self.dtype)


@_container(("codes", "codebook"))
class Codebook(Compressed):
  """Hold indices into a table of short vectors along the input axis (vector quantization).

  Attributes:
    codes: packed indices, (..., bytes, cols): one a run of `length` rows.
    codebook: (..., entries, length).
    rows, cols: the matrix shape; rows is a multiple of `length`.
    bits: width of an index, 1 to 8.
    length: rows one entry covers.
  """

  codes: Part
  codebook: Part
  rows: int
  cols: int
  bits: int
  length: int

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.codebook.dtype

  def dense(self) -> jax.Array:
    """Look every index up."""
    runs = self.rows // self.length
    index = packing.unpack(self.codes, bits=self.bits, rows=runs).astype(jnp.int32)

    def look(book: jax.Array, idx: jax.Array) -> jax.Array:
      return jnp.swapaxes(book[idx], -1, -2).reshape(self.rows, self.cols)

    for _ in self.batch:
      look = jax.vmap(look)
    return look(self.codebook, index)


@_container(("a", "b"))
class LowRank(Compressed):
  """Hold a product of thin factors, `scale * a @ b`.

  Attributes:
    a: (..., rows, rank).
    b: (..., rank, cols).
    scale: multiplier of the product (LoRA's alpha / rank).
  """

  a: Part
  b: Part
  scale: float = 1.0

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.a.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.b.shape[-1]

  @property
  def rank(self) -> int:
    """Inner dimension."""
    return self.a.shape[-1]

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.a.dtype

  def dense(self) -> jax.Array:
    """Multiply the factors in float32."""
    a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
    return (self.scale * jnp.matmul(a, b, precision="highest")).astype(self.dtype)


@_container(("parts",))
class Sum(Compressed):
  """Hold a sum of leaves: a quantized base plus low-rank, outlier or adapter terms.

  Attributes:
    parts: arrays or compressed leaves of one logical shape; the first is the base and
      gives the dtype.
  """

  parts: tuple[Any, ...]

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.parts[0].shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.parts[0].shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.parts[0].shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value: the base's."""
    return self.parts[0].dtype

  def dense(self) -> jax.Array:
    """Add the parts in float32."""
    total = sum(dense(p).astype(jnp.float32) for p in self.parts)
    return jnp.asarray(total).astype(self.dtype)


Leaf = Any  # jax.Array | np.ndarray | Compressed; jax accepts the three alike
TYPES: Mapping[str, type] = {
  c.__name__: c for c in (QuantizedTensor, SparseTensor, Codebook, LowRank, Sum)
}


def is_leaf(node: object) -> bool:
  """Tell whether a node is a compressed leaf; the `is_leaf` of every tree walk here.

  Args:
    node: anything.

  Returns:
    True for a compressed container.

  Example:
    >>> is_leaf(jnp.zeros(2))
    False
  """
  return isinstance(node, Compressed)


def dense(leaf: Leaf) -> Any:
  """Return the array a leaf stands for; arrays pass through.

  Args:
    leaf: array or compressed leaf.

  Returns:
    An array of the leaf's logical shape and dtype.

  Example:
    >>> dense(LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), scale=2.0)).tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
  """
  return leaf.dense() if isinstance(leaf, Compressed) else leaf


def nbytes(leaf: Leaf) -> int:
  """Count the bytes a leaf holds; int4 and int2 count as packed.

  Args:
    leaf: array, shape struct, or compressed leaf.

  Returns:
    Bytes in memory and, within a header's breadth, on disk.

  Example:
    >>> nbytes(jnp.zeros((2, 3), jnp.bfloat16))
    12
  """
  if isinstance(leaf, Compressed):
    return leaf.nbytes
  dtype = jnp.dtype(leaf.dtype)
  width = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8
  return -(-math.prod(leaf.shape) * width // 8)


def bits_per_weight(leaf: Leaf) -> float:
  """Compute the mean bits one logical weight costs, scales and indices included.

  Args:
    leaf: array or compressed leaf.

  Returns:
    Bits per weight.

  Example:
    >>> bits_per_weight(jnp.zeros((4, 4), jnp.bfloat16))
    16.0
  """
  return nbytes(leaf) * 8 / max(1, math.prod(leaf.shape))


def to_parts(leaf: Leaf) -> tuple[dict[str, Any], dict[str, Any]]:
  """Split a compressed leaf into a JSON description and named arrays, for files.

  Args:
    leaf: compressed leaf; an array gives an empty description and the part "".

  Returns:
    (description, arrays): the description rebuilds the leaf through `from_parts`.

  Example:
    >>> meta, arrays = to_parts(LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    >>> meta["type"], sorted(arrays)
    ('LowRank', ['a', 'b'])
  """
  if not isinstance(leaf, Compressed):
    return {}, {"": leaf}
  if isinstance(leaf, Sum):
    metas, arrays = [], {}
    for i, part in enumerate(leaf.parts):
      meta, named = to_parts(part)
      metas.append(meta)
      arrays.update({f"{i}.{k}".rstrip("."): v for k, v in named.items()})
    return {"type": "Sum", "parts": metas}, arrays
  arrays, static = {}, {}
  for field in dataclasses.fields(leaf):  # pyright: ignore[reportArgumentType]
    value = getattr(leaf, field.name)
    if isinstance(value, int | float | str):
      static[field.name] = value
    elif value is not None:
      arrays[field.name] = value
  return {"type": type(leaf).__name__, **static}, arrays


def from_parts(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> Leaf:
  """Rebuild a leaf from what `to_parts` returned.

  Args:
    meta: the description.
    arrays: the named arrays.

  Returns:
    The leaf.

  Raises:
    ValueError: for an unknown leaf type, or a missing or unexpected part.

  Example:
    >>> factors = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}
    >>> from_parts({"type": "LowRank", "scale": 1.0}, factors).shape
    (2, 3)
  """
  if not meta:
    return arrays[""]
  kind = meta.get("type", "")
  if kind == "Sum":
    parts = []
    for i, sub in enumerate(meta["parts"]):
      prefix = f"{i}."
      named = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
      parts.append(from_parts(sub, named or {"": arrays[str(i)]}))
    return Sum(tuple(parts))
  if kind not in TYPES:
    raise ValueError(f"unknown leaf type {kind!r}; known: {', '.join(sorted(TYPES))}")
  cls = TYPES[kind]
  static = {k: v for k, v in meta.items() if k != "type"}
  fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
  unknown = sorted((set(static) | set(arrays)) - set(fields))
  if unknown:
    raise ValueError(f"{kind} has no field {unknown[0]!r}; it has {', '.join(fields)}")
  optional = {"zeros", "group_index"}
  values = {**dict.fromkeys(optional & set(fields)), **static, **arrays}
  absent = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
  if absent:
    raise ValueError(f"{kind} lacks the part {absent[0]!r}")
  return cls(**values)


def signature(leaf: Leaf) -> tuple:
  """Describe what must agree for two layers' leaves to be stacked into one segment.

  Args:
    leaf: array, tracer, shape struct, or compressed leaf.

  Returns:
    A hashable value: the tree structure and each array's shape and dtype.

  Example:
    >>> signature(jnp.zeros(3)) == signature(jnp.ones(3))
    True
  """
  arrays, structure = jax.tree.flatten(leaf)
  return structure, tuple((tuple(a.shape), jnp.dtype(a.dtype).name) for a in arrays)


map_leaves = functools.partial(jax.tree.map, is_leaf=is_leaf)
