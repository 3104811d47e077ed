# SPDX-License-Identifier: Apache-2.0
"""Modules of a Hugging Face network and the leaves they hold, for adapters.

One adapter of a fused module (q, k and v in one matrix) is one A and the rows of B in the order of
the fused output: side by side in GPT-2 and OpenELM, head by head in NeoX. It splits into
adapters of the parts that share A, exactly; the way back is exact too, if need be in block form.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from treesurgeon.core import leaves
from treesurgeon.models import hf

# Modules whose tensors keep the name that the module had in earlier versions of transformers.
_RENAMED = {"embed_out": "lm_head"}


class Module(NamedTuple):
  """A module with a weight that an adapter can stand beside.

  Attributes:
    addresses: the leaves it holds.
    kind: how, see `hf.Entry`.
    rows: input width, or vocabulary of an embedding.
    widths: output width of each leaf.
    head_dim: width of a head, for interleaved rows.
  """

  addresses: tuple[str, ...]
  kind: str
  rows: int
  widths: tuple[int, ...]
  head_dim: int

  @property
  def is_embedding(self) -> bool:
    """Whether peft stores the factors of an embedding."""
    return self.addresses[0].endswith("/embedding")

  @property
  def is_conv(self) -> bool:
    """Whether the file holds the weight as (in, out), as GPT-2's Conv1D does."""
    return self.kind == "split" or (self.kind == "copy" and not self.is_embedding)

  def check(self, where: str, a: np.ndarray, b: np.ndarray, ranks: Sequence[int]) -> None:
    """Compare the factors' shapes with the module and the config."""
    wants = [((r, self.rows), (sum(self.widths), r)) for r in ranks]
    if (a.shape, b.shape) not in wants:
      raise ValueError(
        f"{where}: lora_A is {a.shape} and lora_B {b.shape}; the model and the config's rank "
        f"{ranks[0]} ask for {wants[0][0]} and {wants[0][1]}"
      )

  def split(self, b: np.ndarray) -> dict[str, np.ndarray]:
    """Cut fused output rows into the leaves'."""
    if self.kind == "interleave":
      grouped = b.reshape(-1, len(self.widths), self.head_dim, *b.shape[1:])
      parts = [grouped[:, j].reshape(-1, *b.shape[1:]) for j in range(len(self.widths))]
    else:
      parts = np.split(b, np.cumsum(self.widths)[:-1])
    return dict(zip(self.addresses, parts, strict=True))

  def fuse(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join the leaves' output rows; the inverse of `split`."""
    rows = [parts[a] for a in self.addresses]
    if self.kind == "interleave":
      heads = [r.reshape(-1, self.head_dim, *r.shape[1:]) for r in rows]
      return np.stack(heads, axis=1).reshape(-1, *rows[0].shape[1:])
    return np.concatenate(rows)


class Fused(NamedTuple):
  """An adapter as peft stores it: A [r, in], B [out, r]."""

  module: Module
  a: np.ndarray
  b: np.ndarray
  scale: float


def table(spec: Any, *, bare: bool = True) -> dict[str, Module]:
  """List a network's modules by path.

  Args:
    spec: the architecture.
    bare: also list the paths of a backbone without a head, and of earlier versions.

  Returns:
    Module path to module, kernels and untied embeddings.

  Raises:
    ValueError: for a family without a table of Hugging Face names.
  """
  if spec.family == "treesurgeon":
    raise ValueError(
      "peft names modules as Hugging Face does, and family 'treesurgeon' has none of its names; "
      "adapters.save keeps adapters of such a model"
    )
  found = {}
  for prefix in ("", None) if bare else (None,):  # the usual spelling comes last and wins
    one = dataclasses.replace(spec, name_prefix=prefix)
    for entry in hf.entries(one):
      kinds = {a.rpartition("/")[2] for a in entry.address}
      if kinds != {"kernel"} and not (kinds == {"embedding"} and not spec.tied):
        continue
      shapes = [hf.address_shape(spec, a) for a in entry.address]
      module = Module(
        entry.address, entry.kind, shapes[0][0], tuple(s[1] for s in shapes), spec.head_dim
      )
      path = entry.name.removesuffix(".weight")
      if bare:
        found[path] = module
      found[_RENAMED.get(path, path)] = module
  return found


def gather(spec: Any, adapters: Mapping[str, leaves.LowRank]) -> dict[str, Fused]:
  """Arrange adapters by the modules that hold their weights.

  Args:
    spec: the architecture.
    adapters: address to adapter.

  Returns:
    Module path to adapter.

  Raises:
    ValueError: for an address without a module, a shape that is not its weight's, or parts
      of one module with different scales.
  """
  owner = {a: (path, m) for path, m in table(spec, bare=False).items() for a in m.addresses}
  groups: dict[str, dict[str, leaves.LowRank]] = {}
  for address, adapter in adapters.items():
    if address not in owner:
      tied = " (tied to the head in this model)" if address.endswith("/embedding") else ""
      near = ", ".join(list(owner)[:3])
      raise ValueError(f"{address}{tied} cannot carry a peft adapter; kernels can, like {near}")
    path, module = owner[address]
    want = (module.rows, module.widths[module.addresses.index(address)])
    if tuple(adapter.shape) != want:
      raise ValueError(f"{address}: the adapter is {tuple(adapter.shape)}, the weight {want}")
    groups.setdefault(path, {})[address] = adapter
  return {path: _fuse(path, owner[next(iter(g))][1], g) for path, g in groups.items()}


def _fuse(path: str, module: Module, group: Mapping[str, leaves.LowRank]) -> Fused:
  present = [a for a in module.addresses if a in group]
  scales = {float(group[a].scale) for a in present}
  if len(scales) > 1:
    raise ValueError(
      f"{path} fuses {', '.join(present)}, whose adapters have the scales {sorted(scales)}; peft "
      "has one scale a module"
    )
  factors_a = [np.asarray(group[a].a).T for a in present]
  factors_b = {a: np.asarray(group[a].b).T for a in present}
  first = factors_a[0]
  shared = len(present) == len(module.addresses) and all(
    a.shape == first.shape and a.tobytes() == first.tobytes() for a in factors_a
  )
  if shared:
    return Fused(module, first, module.fuse(factors_b), scales.pop())
  # Block form: every part has ranks of its own, and zeros in the others'.
  ranks = [a.shape[0] for a in factors_a]
  starts = np.cumsum([0, *ranks])
  blocks = {}
  for address, width in zip(module.addresses, module.widths, strict=True):
    wide = np.zeros((width, starts[-1]), first.dtype)
    if address in factors_b:
      i = present.index(address)
      wide[:, starts[i] : starts[i + 1]] = factors_b[address]
    blocks[address] = wide
  return Fused(module, np.concatenate(factors_a), module.fuse(blocks), scales.pop())
