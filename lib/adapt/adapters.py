# SPDX-License-Identifier: Apache-2.0
"""Adapters as leaves: an adapted weight is `Sum((base, ..., LowRank))`, its adapter the last part.

No wrapper and no registry of adapters: whoever can walk a tree of leaves can find, take off, put
on and save them, and `train.partition.trainable(params, types=["LowRank"])` trains them alone. The
base may be an array or any compressed leaf (QLoRA). A `Sum` to which a compression method gave a
low-rank correction last (LoRC, LQ-LoRA, LoftQ) has the same form, and the correction counts as an
adapter: it is what LQ-LoRA and LoftQ train.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, model, paths
from treesurgeon.io import safetensors, writer

Adapters = Mapping[str, leaves.LowRank]


class Adapted(NamedTuple):
  """A leaf taken apart.

  Attributes:
    base: the leaf without its adapter.
    adapter: the low-rank term, or None.
  """

  base: Any
  adapter: Any


def split(leaf: Any) -> Adapted:
  """Take a leaf apart into its base and its adapter.

  Args:
    leaf: array or compressed leaf.

  Returns:
    (base, adapter); the adapter is None if the leaf has none.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> base, adapter = split(leaves.Sum((jnp.zeros((2, 3)), low)))
    >>> type(base).__name__, adapter is low
    ('ArrayImpl', True)
  """
  if not isinstance(leaf, leaves.Sum) or len(leaf.parts) < 2:
    return Adapted(leaf, None)
  *rest, last = leaf.parts
  if not isinstance(last, leaves.LowRank):
    return Adapted(leaf, None)
  return Adapted(rest[0] if len(rest) == 1 else leaves.Sum(tuple(rest)), last)


def join(base: Any, adapter: leaves.LowRank) -> leaves.Sum:
  """Put an adapter beside a base; the inverse of `split`.

  Args:
    base: array or compressed leaf, which may already have adapters.
    adapter: low-rank term of the base's shape.

  Returns:
    Their sum.

  Example:
    >>> join(jnp.zeros((2, 3)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))).shape
    (2, 3)
  """
  parts = base.parts if isinstance(base, leaves.Sum) else (base,)
  return leaves.Sum((*parts, adapter))


def extract(m: model.Model) -> dict[str, leaves.LowRank]:
  """Collect a model's adapters; where several are stacked, the last one put on.

  Args:
    m: any model.

  Returns:
    Address to adapter, in natural order; empty if there are none.

  Example:
    >>> extract(model.Model(None, {"w": {"kernel": jnp.zeros((2, 3))}}))
    {}
  """
  found = {a: split(leaf).adapter for a, leaf in paths.flatten(m.params).items()}
  return {a: adapter for a, adapter in found.items() if adapter is not None}


def attach(m: model.Model, adapters: Adapters) -> model.Model:
  """Put adapters on a model.

  Args:
    m: the model; its leaves may be compressed or already adapted.
    adapters: address to adapter.

  Returns:
    The adapted model; bases are kept bit for bit.

  Raises:
    ValueError: for an address the model lacks, or an adapter of another shape than its weight.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> m = attach(model.Model(None, {"w": {"kernel": jnp.zeros((2, 3))}}), {"w/kernel": low})
    >>> list(extract(m))
    ['w/kernel']
  """
  changes = {}
  for address, adapter in adapters.items():
    base = m.leaf(address)
    _check_shape(address, adapter, base)
    changes[address] = join(base, adapter)
  return m.update(changes)


def strip(m: model.Model) -> model.Model:
  """Take the adapters off; the inverse of `attach`, bit for bit.

  Args:
    m: any model.

  Returns:
    The model without the adapters that `extract` collects.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> m = attach(model.Model(None, {"w": {"kernel": jnp.zeros((2, 3))}}), {"w/kernel": low})
    >>> strip(m).leaf("w/kernel").tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
  """
  return m.update({a: split(m.leaf(a)).base for a in extract(m)})


def unmerge(m: model.Model, adapters: Adapters) -> model.Model:
  """Subtract merged adapters from their weights again and put them on.

  Exact up to one rounding in the storage dtype a merge and an unmerge each.

  Args:
    m: a model into which the adapters were merged.
    adapters: what `extract` returned before the merge.

  Returns:
    The adapted model.

  Raises:
    ValueError: for an address the model lacks, another shape, or a compressed weight.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> m = unmerge(model.Model(None, {"w": {"kernel": jnp.ones((2, 3))}}), {"w/kernel": low})
    >>> strip(m).leaf("w/kernel").tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
  """
  changes = {}
  for address, adapter in adapters.items():
    w = m.leaf(address)
    _check_shape(address, adapter, w)
    if leaves.is_leaf(w):
      raise ValueError(
        f"{address}: cannot subtract an adapter from a {type(w).__name__}; unmerge takes arrays, "
        "as merge leaves them"
      )
    minus = leaves.LowRank(adapter.a, adapter.b, -adapter.scale)
    changes[address] = join(leaves.dense(leaves.Sum((w, minus))), adapter)
  return m.update(changes)


def save(path: str | Path, adapters: Adapters) -> None:
  """Write adapters alone to a directory with one safetensors file, in our own addresses.

  Args:
    path: directory, which must not exist.
    adapters: address to adapter.

  Raises:
    ValueError: if there is nothing to write, or the output exists.

  Example:
    >>> import tempfile
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> with tempfile.TemporaryDirectory() as root:
    ...   save(f"{root}/out", {"w/kernel": low})
    ...   load(f"{root}/out")["w/kernel"].scale
    0.5
  """
  if not adapters:
    raise ValueError(f"{path}: there are no adapters to save; put some on with adapt.lora()")
  with writer.Writer(path) as out:
    for address in sorted(adapters, key=paths.natural):
      adapter = adapters[address]
      out.write(f"{address}/a", np.asarray(adapter.a))
      out.write(f"{address}/b", np.asarray(adapter.b))
      out.write(f"{address}/scale", np.asarray(adapter.scale, np.float64))


def load(path: str | Path) -> dict[str, leaves.LowRank]:
  """Read what `save` wrote.

  Args:
    path: the directory.

  Returns:
    Address to adapter, bit for bit.

  Raises:
    ValueError: if the file is damaged or does not hold adapters.
  """
  tensors = safetensors.open_folder(path)
  out = {}
  for address in dict.fromkeys(name.rpartition("/")[0] for name in tensors):
    names = [f"{address}/{part}" for part in ("a", "b", "scale")]
    absent = [n for n in names if n not in tensors]
    if absent:
      raise ValueError(f"{path}: tensor {absent[0]!r} is missing; an adapter has a, b and scale")
    a, b, scale = (np.array(tensors[n]) for n in names)
    out[address] = leaves.LowRank(jnp.asarray(a), jnp.asarray(b), float(scale))
  unknown = set(tensors) - {f"{a}/{part}" for a in out for part in ("a", "b", "scale")}
  if unknown:
    raise ValueError(f"{path}: tensor {min(unknown)!r} is not part of an adapter")
  return out


def _check_shape(address: str, adapter: leaves.LowRank, base: Any) -> None:
  if tuple(adapter.shape) != tuple(base.shape):
    raise ValueError(
      f"{address}: the adapter is {tuple(adapter.shape)}, the weight {tuple(base.shape)}; "
      "they must be equal"
    )
