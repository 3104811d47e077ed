# SPDX-License-Identifier: Apache-2.0
"""Leaves as named arrays and a JSON description, which files hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from treesurgeon.core.leaves import (
  base,
  clustered,
  codebook,
  group_sparse,
  inputs,
  low_rank,
  outlier_victim,
  outliers,
  quantized,
  rotated,
  signed,
  sparse,
  split_rows,
  summed,
)

TYPES: Mapping[str, type] = {
  c.__name__: c
  for c in (
    quantized.QuantizedTensor, sparse.SparseTensor, codebook.Codebook, low_rank.LowRank,
    outliers.Outliers, inputs.ActivationQuantized, summed.Sum, split_rows.SplitRows,
    signed.SignedLowRank, clustered.ClusteredColumns, group_sparse.GroupSparse,
    rotated.Rotated,
    outlier_victim.OutlierVictim,
  )
}  # fmt: skip


def to_parts(leaf: base.Leaf) -> tuple[dict[str, Any], dict[str, Any]]:
  """Split a compressed leaf into a JSON description and named arrays, for files.

  Args:
    leaf: compressed leaf; an array gives an empty description and the part "".

  Returns:
    (description, arrays): the description rebuilds the leaf through `from_parts`; a part that is
    a leaf in turn is described under its field's name, its arrays named "field.part".

  Raises:
    ValueError: for a leaf arranged for a device.

  Example:
    >>> import jax.numpy as jnp
    >>> meta, arrays = to_parts(low_rank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    >>> meta["type"], sorted(arrays)
    ('LowRank', ['a', 'b'])
  """
  if not isinstance(leaf, base.Compressed):
    return {}, {"": leaf}
  if isinstance(leaf, summed.Sum):
    metas, arrays = [], {}
    for i, part in enumerate(leaf.parts):
      meta, named = to_parts(part)
      metas.append(meta)
      arrays.update({f"{i}.{k}".rstrip("."): v for k, v in named.items()})
    return {"type": "Sum", "parts": metas}, arrays
  if type(leaf).__name__ not in TYPES:
    raise ValueError(
      f"{type(leaf).__name__} has no form in files, which hold {', '.join(TYPES)}; what "
      "kernels.prepare arranged for a device kernels.restore gives back"
    )
  arrays, static = {}, {}
  for field in dataclasses.fields(leaf):  # pyright: ignore[reportArgumentType]
    value = getattr(leaf, field.name)
    if isinstance(value, base.Compressed):
      static[field.name], named = to_parts(value)
      arrays.update({f"{field.name}.{k}": v for k, v in named.items()})
    elif isinstance(value, int | float | str):
      static[field.name] = value
    elif value is not None:
      arrays[field.name] = value
  return {"type": type(leaf).__name__, **static}, arrays


def from_parts(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> base.Leaf:
  """Rebuild a leaf from what `to_parts` returned.

  Args:
    meta: the description.
    arrays: the named arrays.

  Returns:
    The leaf.

  Raises:
    ValueError: for an unknown leaf type, or a missing or unexpected part.

  Example:
    >>> import jax.numpy as jnp
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
      named = _below(arrays, str(i))
      parts.append(from_parts(sub, named or {"": arrays[str(i)]}))
    return summed.Sum(tuple(parts))
  if kind not in TYPES:
    raise ValueError(f"unknown leaf type {kind!r}; known: {', '.join(sorted(TYPES))}")
  cls = TYPES[kind]
  nested = {k: from_parts(v, _below(arrays, k)) for k, v in meta.items() if isinstance(v, Mapping)}
  static = {k: v for k, v in meta.items() if k != "type" and k not in nested}
  flat = {k: v for k, v in arrays.items() if k.partition(".")[0] not in nested}
  fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
  unknown = sorted((set(static) | set(flat) | set(nested)) - set(fields))
  if unknown:
    raise ValueError(f"{kind} has no field {unknown[0]!r}; it has {', '.join(fields)}")
  optional = {"zeros", "group_index", "scale", "flint"}
  values = {**dict.fromkeys(optional & set(fields)), **static, **flat, **nested}
  for name, field in fields.items():  # an absent part is None only where no default says more
    if values.get(name) is None and field.default is not dataclasses.MISSING:
      values[name] = field.default
  absent = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
  if absent:
    raise ValueError(f"{kind} lacks the part {absent[0]!r}")
  return cls(**values)


def _below(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
  prefix = f"{name}."
  return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
