# SPDX-License-Identifier: Apache-2.0
"""Products with any packed leaf, some of its rows at a time: the matrix is never whole in memory.

A run of rows of a leaf is a leaf of the same kind with fewer rows, which says itself what it is
when dense. `matmul` scans over such runs, so that every format that can be cut needs no product of
its own, and what it computes is the reference's product in another order. The backward pass cuts
again.

How each kind is cut: streams of codes at whole bytes, groups at their ends or within one, N:M at
whole runs of M, vectors of a codebook at whole vectors. Tables, and scales that all rows share, are
not cut. Kept groups of a `GroupSparse` lie elsewhere in each column: counts of those before a run
say where, and their bytes are gathered. Single weights (`Outliers`) need no run: each multiplies
one input, and the products are added up by column.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import chunks, reference, xla
from treesurgeon.kernels.sparse_matmul import groups

TILE = 2 << 20  # bytes of a run in float32, which stay in a core's cache
MANY_TILE = 16 << 20  # for so many tokens that products take the time


def unsupported(x: jax.Array, leaf: Any) -> str:
  """Say why `matmul` cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes leaves that can be cut by rows, not LowRank'
  """
  del x
  if isinstance(leaf, leaves.GroupSparse):
    return groups.unsupported(leaf)
  if not isinstance(leaf, (leaves.Outliers, *_CUTS)):
    return f"it takes leaves that can be cut by rows, not {type(leaf).__name__}"
  if isinstance(leaf, leaves.SparseTensor) and leaves.is_leaf(leaf.values):
    if not isinstance(leaf.values, leaves.QuantizedTensor) or leaf.values.group_index is not None:
      return "it takes values that are an array or quantized in groups of consecutive rows"
  return ""


def matmul(x: Num[Array, "*batch rows"], leaf: Any) -> Float[Array, "*batch cols"]:
  """Multiply run by run of rows.

  Differentiable in `x` and the leaf's floating-point parts.

  Args:
    x: activations; integers count as float32.
    leaf: compressed leaf.

  Returns:
    The product in float32; the operands are rounded to the dtype of `x` first.

  Example:
    >>> stream = packing.pack(jnp.array([[0], [1]], jnp.uint8), bits=1)
    >>> leaf = leaves.SparseTensor(jnp.array([[2.0], [3.0]]), stream, 4, 1, 1, 2)
    >>> matmul(jnp.array([[1.0, 1.0, 1.0, 10.0]]), leaf).tolist()
    [[32.0]]
  """
  flat = x.reshape(-1, leaf.rows)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    flat = flat.astype(jnp.float32)
  if isinstance(leaf, leaves.Outliers):
    return _outliers(flat, leaf).reshape(*x.shape[:-1], leaf.cols)
  values = getattr(leaf, "values", getattr(leaf, "kept", None))
  if not leaves.is_leaf(values) and values is not None and values.dtype == jnp.bfloat16:
    y = _of_halves(flat, leaf)
  else:
    y = _multiply(flat, leaf)
  return y.reshape(*x.shape[:-1], leaf.cols)


def _multiply(flat: jax.Array, leaf: Any) -> jax.Array:
  size = rows_of_run(leaf, tokens=flat.shape[0])
  count = -(-leaf.rows // size)
  cut = groups.cut if isinstance(leaf, leaves.GroupSparse) else _cut
  parts, build = cut(leaf, size, count)

  def part(x_MxK: jax.Array, parts: Any) -> jax.Array:
    run = _floats(build(parts))
    return reference.dot(x_MxK, leaves.dense(run).astype(x_MxK.dtype))

  filled = jnp.pad(flat, [(0, 0), (0, count * size - leaf.rows)])
  x_CxMxK = jnp.moveaxis(filled.reshape(-1, count, size), 1, 0)
  return chunks.add_up(part, chunks.zeros((flat.shape[0], leaf.cols), flat, leaf), (x_CxMxK, parts))


@jax.custom_vjp
def _of_halves(flat: jax.Array, leaf: Any) -> jax.Array:
  """Multiply by bfloat16 values as bits: XLA widens bfloat16 that is cut in a loop, all of it."""
  name = "kept" if isinstance(leaf, leaves.GroupSparse) else "values"
  bits = jax.lax.bitcast_convert_type(getattr(leaf, name), jnp.uint16)
  return _multiply(flat, dataclasses.replace(leaf, **{name: bits}))


_of_halves.defvjp(
  lambda flat, leaf: (_of_halves(flat, leaf), (flat, leaf)),
  lambda kept, g: jax.vjp(_multiply, *kept)[1](g),
)


def rows_of_run(leaf: Any, *, tokens: int) -> int:
  """Choose how many rows are decoded at a time.

  Args:
    leaf: compressed leaf.
    tokens: rows of the activations.

  Returns:
    The number, one at which the leaf can be cut.

  Example:
    >>> stream = packing.pack(jnp.zeros((2048, 8192), jnp.uint8), bits=2)
    >>> leaf = leaves.SparseTensor(jnp.zeros((2048, 8192)), stream, 4096, 8192, 2, 4)
    >>> rows_of_run(leaf, tokens=1)
    64
  """
  tile = MANY_TILE if tokens >= xla.MANY else TILE
  most = max(1, tile // 4 // leaf.cols)
  multiple = 8 * leaf.group if isinstance(leaf, leaves.GroupSparse) else _multiple(leaf)
  if isinstance(leaf, leaves.QuantizedTensor) and multiple > most:  # a run within a long group
    least = _whole(leaf)
    multiple = max(
      (d for d in range(least, most + 1, least) if leaf.group_size % d == 0), default=multiple
    )
  whole = -(-leaf.rows // multiple) * multiple
  return min(max(multiple, most // multiple * multiple), whole)


def _whole(leaf: leaves.QuantizedTensor) -> int:
  """Count the rows that fill whole bytes."""
  return formats.TRITS if leaf.format == "ternary" else packing.period(leaf.bits)


def _multiple(leaf: Any) -> int:
  """Count the rows of which a run has a multiple."""
  match leaf:
    case leaves.QuantizedTensor():
      free = leaf.group_index is not None or leaf.group_size >= leaf.rows
      return math.lcm(_whole(leaf), 1 if free else leaf.group_size)
    case leaves.SparseTensor():
      kept = packing.period(_place_bits(leaf))
      if isinstance(leaf.values, leaves.QuantizedTensor):
        kept = math.lcm(kept, _multiple(leaf.values))
      return leaf.m * (kept // math.gcd(kept, leaf.n))
    case leaves.Codebook():
      return leaf.length * packing.period(leaf.bits)
    case leaves.OutlierVictim():
      return packing.period(leaf.bits) * 2 // math.gcd(packing.period(leaf.bits), 2)
    case _:
      return packing.period(1)


def _cut(leaf: Any, size: int, count: int) -> tuple[Any, Callable[[Any], Any]]:
  """Cut a leaf: the parts that differ, stacked, and what makes a leaf of one of them."""
  parts = _CUTS[type(leaf)](leaf, size, count)
  fixed = {"rows": size} if any(f.name == "rows" for f in dataclasses.fields(leaf)) else {}
  if isinstance(leaf, leaves.QuantizedTensor):
    fixed = _sizes(leaf, size)

  def build(mine: dict[str, Any]) -> Any:
    if mine.get("values") is not None:
      mine = {**mine, "values": _floats(mine["values"])}
    return dataclasses.replace(leaf, **mine, **fixed)

  return parts, build


def _sizes(leaf: leaves.QuantizedTensor, size: int) -> dict[str, int]:
  """Restate what a run's rows and groups are; one group of all rows is one of the run's."""
  return {"rows": size, "group_size": size if leaf.group_size >= leaf.rows else leaf.group_size}


def _cut_quantized(leaf: leaves.QuantizedTensor, size: int, count: int) -> dict[str, Any]:
  per_byte = leaf.format == "ternary"
  stream = size // formats.TRITS if per_byte else size * leaf.bits // 8
  parts = {"codes": _cut_up(leaf.codes, stream, count)}
  if leaf.group_index is not None:
    index = _cut_up(jnp.swapaxes(leaf.group_index, -1, -2), size, count)
    return {**parts, "group_index": jnp.swapaxes(index, -1, -2)}
  for name in ("scales", "zeros"):
    part = getattr(leaf, name)
    if part is None or leaf.group_size >= leaf.rows:
      continue
    part = base.dense(part)
    if size % leaf.group_size == 0:
      parts[name] = _cut_up(part, size // leaf.group_size, count)
    else:
      parts[name] = part[jnp.arange(count) * size // leaf.group_size][:, None]
  return parts


def _cut_sparse(leaf: leaves.SparseTensor, size: int, count: int) -> dict[str, Any]:
  kept = size // leaf.m * leaf.n
  values = leaf.values
  if isinstance(values, leaves.QuantizedTensor):
    cut = _cut_quantized(values, kept, count)
    if values.group_size >= values.rows:
      spread = lambda a: None if a is None else jnp.broadcast_to(a, (count, *a.shape))
      cut |= {n: jax.tree.map(spread, getattr(values, n)) for n in ("scales", "zeros")}
    values = dataclasses.replace(values, **cut, **_sizes(values, kept))
  else:
    values = _cut_up(values, kept, count)
  stream = kept * _place_bits(leaf) // 8
  return {"values": values, "positions": _cut_up(leaf.positions, stream, count)}


def _cut_codebook(leaf: leaves.Codebook, size: int, count: int) -> dict[str, Any]:
  return {"codes": _cut_up(leaf.codes, size // leaf.length * leaf.bits // 8, count)}


def _cut_pairs(leaf: leaves.OutlierVictim, size: int, count: int) -> dict[str, Any]:
  return {"codes": _cut_up(leaf.codes, size * leaf.bits // 8, count)}


def _cut_signed(leaf: leaves.SignedLowRank, size: int, count: int) -> dict[str, Any]:
  return {
    "signs": _cut_up(leaf.signs, size // 8, count),
    "a": _cut_up(base.dense(leaf.a), size, count),
  }


_CUTS: dict[type, Callable[[Any, int, int], dict[str, Any]]] = {
  leaves.QuantizedTensor: _cut_quantized,
  leaves.SparseTensor: _cut_sparse,
  leaves.Codebook: _cut_codebook,
  leaves.OutlierVictim: _cut_pairs,
  leaves.SignedLowRank: _cut_signed,
}


def _floats(values: Any) -> Any:
  """Read bits of bfloat16 values as such; others are what they are."""
  bits = not leaves.is_leaf(values) and values.dtype == jnp.uint16
  return jax.lax.bitcast_convert_type(values, jnp.bfloat16) if bits else values


def _outliers(x: jax.Array, leaf: leaves.Outliers) -> jax.Array:
  """Add up products of single weights by column."""
  row, col = leaf.positions[0] // leaf.cols, leaf.positions[0] % leaf.cols
  each = jnp.take(x, row, axis=1).astype(jnp.float32) * leaf.values.astype(x.dtype)
  return jnp.zeros((x.shape[0], leaf.cols), jnp.float32).at[:, col].add(each)


def _place_bits(leaf: leaves.SparseTensor) -> int:
  return max(1, (leaf.m - 1).bit_length())


def _cut_up(part: jax.Array, size: int, count: int) -> jax.Array:
  """Cut rows into runs, zeros behind the last."""
  filled = jnp.pad(part, [(0, count * size - part.shape[0]), (0, 0)])
  return filled.reshape(count, size, part.shape[1])
