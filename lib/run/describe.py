# SPDX-License-Identifier: Apache-2.0
"""Describe a model's tree: address, shape, dtype, bits and bytes of every leaf, and differences.

Layers of one segment share a row, so a table stays readable for a deep model.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, needs, paths


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf, or the equal leaves of a run of layers.

  Attributes:
    address: with `start:stop` in place of the layer where several layers share the row.
    shape: logical shape of one leaf.
    kind: dtype of an array, or what the compressed leaf is.
    count: how many layers the row stands for.
    size: logical weights, all layers.
    nbytes: bytes held, all layers.
  """

  address: str
  shape: tuple[int, ...]
  kind: str
  count: int
  size: int
  nbytes: int

  @property
  def bits(self) -> float:
    """Bits per weight, scales and indices included."""
    return self.nbytes * 8 / max(1, self.size)


def rows(params: paths.Params) -> list[Row]:
  """List the leaves of a model.

  Args:
    params: nested parameters.

  Returns:
    One row an unlayered leaf and one a stacked leaf, in natural order.

  Example:
    >>> tree = {"layers": {"0:2": {"mlp": {"up": {"kernel": jnp.zeros((2, 4, 8))}}}}}
    >>> rows(tree)[0].address, rows(tree)[0].nbytes
    ('layers/0:2/mlp/up/kernel', 256)
  """
  outer = paths.walk({k: v for k, v in params.items() if k != "layers"})
  found = [_row(a, x, 0) for a, x in outer.items()]
  for start, stop, tree in paths.segments(params):
    found += [
      _row(f"layers/{start}:{stop}/{s}", x, stop - start) for s, x in paths.walk(tree).items()
    ]
  return sorted(found, key=lambda r: paths.natural(r.address.replace(":", "/")))


def kind(leaf: Any) -> str:
  """Name what a leaf is stored as.

  Args:
    leaf: array or compressed leaf.

  Returns:
    A dtype's name, or a short description such as "int4 g128".

  Example:
    >>> kind(jnp.zeros(2, jnp.bfloat16))
    'bfloat16'
  """
  match leaf:
    case leaves.QuantizedTensor():
      zero = "" if leaf.zeros is None else " asym"
      name = {"int": f"int{leaf.bits}", "nf": f"nf{leaf.bits}"}.get(leaf.format, leaf.format)
      double = f" / {kind(leaf.scales)}" if leaves.is_leaf(leaf.scales) else ""
      return f"{name} {_group(leaf)}{zero}{double}"
    case leaves.SparseTensor():
      return f"{leaf.n}:{leaf.m} {kind(leaf.values)}"
    case leaves.Codebook():
      tile = f"{leaf.length}" if leaf.width == 1 else f"{leaf.length}x{leaf.width}"
      return f"codebook {leaf.codebook.shape[-2]}x{tile}"
    case leaves.LowRank():
      return f"rank {leaf.rank} {leaf.dtype.name}"
    case leaves.Outliers():
      return f"{leaf.values.shape[-1]} outliers {leaf.dtype.name}"
    case leaves.ActivationQuantized():
      how = "static" if leaf.scale is not None else f"per {leaf.per}"
      name = f"int{leaf.bits}" if leaf.format == "int" else leaf.format
      return f"{kind(leaf.weight)}, inputs {name} {how}"
    case leaves.Rotated():
      return f"{kind(leaf.weight)}, inputs turned"
    case leaves.SignedLowRank():
      return f"signs x rank {leaf.rank} {leaf.a.dtype.name}"
    case leaves.ClusteredColumns():
      return f"{leaf.centroids.shape[-1]} columns {kind(leaf.centroids)}"
    case leaves.OutlierVictim():
      return f"outlier-victim pairs of {leaf.bits} bits"
    case leaves.GroupSparse():
      groups = -(-leaf.rows // leaf.group)
      return f"{leaf.kept.shape[-2] // leaf.group} of {groups} groups, {kind(leaf.kept)}"
    case leaves.SplitRows():
      return f"{leaf.first.shape[-2]} rows {kind(leaf.first)}, others {kind(leaf.rest)}"
    case leaves.Sum() if len({type(p) for p in leaf.parts}) == 1 and len(leaf.parts) > 2:
      return f"{len(leaf.parts)} x ({kind(leaf.parts[0])})"
    case leaves.Sum():
      return " + ".join(kind(p) for p in leaf.parts)
    case _:
      return jnp.dtype(leaf.dtype).name


def _group(leaf: leaves.QuantizedTensor) -> str:
  """Name what shares a scale."""
  column, row = leaf.group_size >= leaf.rows, leaf.group_cols >= leaf.cols
  if leaf.group_cols == 1:
    return "column" if column else f"g{leaf.group_size}"
  if column and row:
    return "tensor"
  if leaf.group_size == 1:
    return "row" if row else f"row g{leaf.group_cols}"
  return f"{leaf.group_size}x{leaf.group_cols}"


@dataclasses.dataclass(frozen=True)
class Difference:
  """How one leaf differs between two models.

  Attributes:
    address: the leaf.
    relative: norm of the difference over the norm of the first, 0 where equal; None where the
      leaf exists in one model alone or shapes differ.
    note: "equal", "changed", "only in the first", "only in the second", or the two shapes; with
      the two kinds where the leaf is stored as something else.
  """

  address: str
  relative: float | None
  note: str


def differences(a: needs.Source, b: needs.Source) -> Iterable[Difference]:
  """Compare two models leaf by leaf, each leaf read when its turn comes.

  Args:
    a: first model.
    b: second model.

  Yields:
    One difference an address of either model, in natural order.

  Example:
    >>> from treesurgeon.core import model as model_lib
    >>> m = model_lib.Model(None, {"w": jnp.ones(2)})
    >>> [d.note for d in differences(m, m.update({"w": jnp.zeros(2)}))]
    ['changed']
  """
  first, second = set(a.addresses()), set(b.addresses())
  for address in sorted(first | second, key=paths.natural):
    if address not in second:
      yield Difference(address, None, "only in the first")
    elif address not in first:
      yield Difference(address, None, "only in the second")
    else:
      x, y = a.leaf(address), b.leaf(address)
      if tuple(x.shape) != tuple(y.shape):
        yield Difference(address, None, f"{tuple(x.shape)} -> {tuple(y.shape)}")
        continue
      relative = float(_relative(x, y))
      note = "changed" if relative else "equal"
      if kind(x) != kind(y):
        note += f"{'' if relative else ' values'}, {kind(x)} -> {kind(y)}"
      yield Difference(address, relative, note)


def total(found: Iterable[Row]) -> tuple[int, int]:
  """Add up rows.

  Args:
    found: rows.

  Returns:
    (weights, bytes).

  Example:
    >>> total([Row("w", (2,), "float32", 1, 2, 8)])
    (2, 8)
  """
  found = list(found)
  return sum(r.size for r in found), sum(r.nbytes for r in found)


@jax.jit
def _relative(x: Any, y: Any) -> jax.Array:
  x, y = leaves.dense(x).astype(jnp.float32), leaves.dense(y).astype(jnp.float32)
  return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(x.ravel()), 1e-30)


def _row(address: str, leaf: Any, layers: int) -> Row:
  shape = tuple(np.shape(leaf)) if isinstance(leaf, np.ndarray) else tuple(leaf.shape)
  one = shape[1:] if layers else shape
  return Row(address, one, kind(leaf), max(layers, 1), math.prod(shape), leaves.nbytes(leaf))
