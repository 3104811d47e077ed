# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints as trees: which tensor holds which leaves, lazily, both ways.

`entries` lists the tensors of a checkpoint; `to_leaves` and `to_tensor` convert one at a time, so a
streaming reader never holds more than one. Linear weights are (out, in) in files and (in, out)
here; the transposes are numpy views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from treesurgeon.models import hf_names, shapes, vision_shapes, vision_spec
from treesurgeon.models import spec as specs
from treesurgeon.models.hf_config import from_config as from_config
from treesurgeon.models.hf_config import to_config as to_config
from treesurgeon.models.hf_config import unsupported as unsupported
from treesurgeon.models.hf_names import ignored as ignored


class Entry(NamedTuple):
  """Pair one tensor of a checkpoint with the leaves it holds.

  Attributes:
    name: tensor name in the file.
    address: the leaves' addresses; several where the file fuses them.
    kind: "copy"; "transpose"; "split" (columns side by side, GPT-2); "rows" (rows on
      top of each other, OpenELM); "interleave" (rows by head, NeoX); "alias" (repeats a tied leaf).
  """

  name: str
  address: tuple[str, ...]
  kind: str


def entries(spec: vision_spec.AnySpec, names: Collection[str] | None = None) -> tuple[Entry, ...]:
  """List every tensor of a checkpoint of this architecture, once.

  Args:
    spec: the architecture.
    names: tensor names of an existing file, which settle the prefix, the spelling and
      whether tied tensors are repeated; None gives what `transformers` writes.

  Returns:
    Entries in file order.

  Raises:
    ValueError: for a family without a table of names, or names of no known layout.

  Example:
    >>> from treesurgeon import models
    >>> from treesurgeon.models import hf
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> hf.entries(spec)[-1]
    Entry(name='lm_head.kernel', address=('lm_head/kernel',), kind='copy')
  """
  if names is not None:
    spec = refine(spec, names)
  if isinstance(spec, vision_spec.VisionSpec) or spec.family == "treesurgeon":
    return tuple(Entry(a.replace("/", "."), (a,), "copy") for a in _addresses(spec))
  family = _family(spec)
  prefix = family.prefixes[0] if spec.name_prefix is None else spec.name_prefix
  found = list(_rows(spec, family, prefix))
  if names is not None:
    if any(n.endswith("LayerNorm.gamma") for n in names):
      found = [e._replace(name=_legacy(e.name)) for e in found]
    have = {e.name for e in found}
    table = shapes.addresses(spec)
    for name, address in family.aliases:
      if name in names and name not in have and address in table:
        found.append(Entry(name, (address,), "alias"))
  return tuple(found)


def refine(spec: vision_spec.AnySpec, names: Collection[str]) -> vision_spec.AnySpec:
  """Settle what only the tensor names of a file tell: their prefix, and an encoder's heads.

  Args:
    spec: what the config says.
    names: tensor names of the file.

  Returns:
    The spec with `name_prefix`, and for encoders `mlm_head` and `pooler`, set.

  Raises:
    ValueError: if the token embedding is found under no known prefix.
  """
  if isinstance(spec, vision_spec.VisionSpec) or spec.family == "treesurgeon":
    return spec
  family = _family(spec)
  probes = {p: family.before[0][0].format(p=p, i="") for p in family.prefixes}
  prefix = next((p for p, name in probes.items() if name in names), None)
  if prefix is None:
    raise ValueError(
      f"no token embedding of a {spec.family} checkpoint: expected one of "
      f"{', '.join(probes.values())}; the file has {', '.join(sorted(names)[:3])}, ..."
    )
  if spec.kind == "encoder":
    spec = dataclasses.replace(
      spec,
      mlm_head="cls.predictions.transform.dense.weight" in names,
      head_bias="cls.predictions.transform.dense.weight" in names,
      pooler=f"{prefix}pooler.dense.weight" in names,
    )
  return dataclasses.replace(spec, name_prefix=prefix)


def address_shape(spec: vision_spec.AnySpec, address: str) -> tuple[int, ...]:
  """Return the shape of the leaf at an address.

  Args:
    spec: the architecture.
    address: leaf address.

  Returns:
    Its shape, kernels (in, out).

  Raises:
    ValueError: if the architecture has no such leaf.
  """
  table = _addresses(spec)
  if address not in table:
    raise ValueError(f"{address!r} is not a leaf of this {spec.family} model")
  return table[address]


def shape(spec: vision_spec.AnySpec, entry: Entry) -> tuple[int, ...]:
  """Return the shape of a tensor in the file.

  Args:
    spec: the architecture.
    entry: one of `entries(spec)`.

  Returns:
    Its shape, as stored.
  """
  parts = [address_shape(spec, a) for a in entry.address]
  if entry.kind == "split" or len(parts[0]) == 1:
    return (*parts[0][:-1], sum(p[-1] for p in parts))
  if entry.kind in ("transpose", "rows", "interleave"):
    return (sum(p[1] for p in parts), parts[0][0])
  return parts[0]


def to_leaves(
  spec: vision_spec.AnySpec, entry: Entry, hf_array: np.ndarray
) -> dict[str, np.ndarray]:
  """Convert a tensor of the file to leaves.

  Args:
    spec: the architecture.
    entry: one of `entries(spec)`.
    hf_array: the tensor, of any dtype.

  Returns:
    Leaves by address, views where possible; empty for an alias.

  Raises:
    ValueError: if the tensor's shape is not `shape(spec, entry)`.
  """
  want = shape(spec, entry)
  if tuple(hf_array.shape) != want:
    raise ValueError(
      f"tensor {entry.name} has shape {tuple(hf_array.shape)}; the config says {want}"
    )
  if entry.kind == "alias":
    return {}
  widths = [address_shape(spec, a)[-1] for a in entry.address]
  if entry.kind == "interleave":
    heads = widths[0] // spec.head_dim
    grouped = hf_array.reshape(heads, len(widths), spec.head_dim, *want[1:])
    parts = [grouped[:, j].reshape(w, *want[1:]) for j, w in enumerate(widths)]
  else:
    axis = -1 if entry.kind == "split" else 0
    parts = np.split(hf_array, np.cumsum(widths)[:-1], axis) if len(widths) > 1 else [hf_array]
  if entry.kind in ("transpose", "rows", "interleave"):
    parts = [p.T for p in parts]
  return dict(zip(entry.address, parts, strict=True))


def to_tensor(
  spec: vision_spec.AnySpec, entry: Entry, leaves: Mapping[str, np.ndarray]
) -> np.ndarray:
  """Convert leaves to the tensor of the file; the inverse of `to_leaves`, bit for bit.

  Args:
    spec: the architecture.
    entry: one of `entries(spec)`.
    leaves: at least the entry's addresses.

  Returns:
    The tensor as stored, not necessarily contiguous.

  Raises:
    ValueError: for a missing leaf or one of another shape than the spec's.
  """
  for a in entry.address:
    want = address_shape(spec, a)
    if a not in leaves:
      raise ValueError(f"tensor {entry.name} needs the leaf {a}, which is missing")
    if tuple(leaves[a].shape) != want:
      raise ValueError(f"leaf {a} has shape {tuple(leaves[a].shape)}; the spec says {want}")
  parts = [np.asarray(leaves[a]) for a in entry.address]
  if entry.kind in ("transpose", "rows", "interleave"):
    parts = [p.T for p in parts]
  if entry.kind == "interleave":
    parts = [p.reshape(-1, spec.head_dim, *p.shape[1:]) for p in parts]
    return np.stack(parts, axis=1).reshape(shape(spec, entry))
  if len(parts) == 1:
    return parts[0]
  return np.concatenate(parts, axis=-1 if entry.kind == "split" else 0)


def columns(spec: vision_spec.AnySpec, entry: Entry) -> dict[str, np.ndarray]:
  """Tell which output features of a linear layer's tensor are each leaf's columns.

  Args:
    spec: the architecture.
    entry: one of `entries(spec)` that holds kernels.

  Returns:
    Indices by address, in the order of the leaf's columns.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(family="gpt_neox", vocab_size=5, d_model=4, num_layers=1, num_heads=2,
    ...                    d_ff=8)
    >>> entry = next(e for e in entries(spec) if e.kind == "interleave")
    >>> [i.tolist() for i in columns(spec, entry).values()]
    [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
  """
  widths = [address_shape(spec, a)[-1] for a in entry.address]
  every = np.arange(sum(widths))
  if entry.kind == "interleave":
    grouped = every.reshape(-1, len(widths), spec.head_dim)
    parts = [grouped[:, j].reshape(-1) for j in range(len(widths))]
  else:
    parts = np.split(every, np.cumsum(widths)[:-1])
  return dict(zip(entry.address, parts, strict=True))


def _family(spec: specs.Spec) -> hf_names.Family:
  if spec.family not in hf_names.FAMILIES:
    raise ValueError(
      f"no table of tensor names for {spec.family!r}; "
      f"valid: {', '.join([*hf_names.FAMILIES, 'treesurgeon'])}"
    )
  return hf_names.FAMILIES[spec.family]


def _rows(spec: specs.Spec, family: hf_names.Family, prefix: str) -> Iterator[Entry]:
  table = shapes.addresses(spec)
  groups = [(family.before, None), *((family.layer, i) for i in range(spec.num_layers))]
  for rows, layer in [*groups, (family.after, None)]:
    for row in rows:
      for expert in range(spec.num_experts if "{e}" in row[0] else 1):
        for entry in _expand(row, prefix, layer, expert):
          present = [a in table for a in entry.address]
          if all(present):
            yield entry


def _addresses(spec: vision_spec.AnySpec) -> dict[str, tuple[int, ...]]:
  """Return every leaf's shape without importing the networks, as `network.addresses` would."""
  vision = isinstance(spec, vision_spec.VisionSpec)
  return vision_shapes.addresses(spec) if vision else shapes.addresses(spec)


def _expand(
  row: tuple[str, str, str], prefix: str, layer: int | None, expert: int
) -> Iterator[Entry]:
  name, where, kind = row
  name, where = name.format(p=prefix, i=layer, e=expert), where.format(e=expert)
  base = [w if layer is None else f"layers/{layer}/{w}" for w in where.split()]
  if not name.endswith("*"):
    yield Entry(name, tuple(base), kind)
    return
  first = "scale" if kind == "norm" else "kernel"
  kind = {"norm": "copy", "conv": "copy", "linear": "transpose"}.get(kind, kind)
  yield Entry(name[:-1] + "weight", tuple(f"{b}/{first}" for b in base), kind)
  kind = "copy" if kind == "transpose" else kind
  yield Entry(name[:-1] + "bias", tuple(f"{b}/bias" for b in base), kind)


def _legacy(name: str) -> str:
  """Spell layer norms as the first TensorFlow conversions did."""
  return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )
