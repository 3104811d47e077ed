# SPDX-License-Identifier: Apache-2.0
"""What an edit returns: the change alone, as low-rank factors by address, with its provenance.

An edit that writes into a model hides whether it took hold and spoils every comparison with the
original. A delta is a value: it can be applied, taken back, composed and shipped by itself.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib

FORMAT = "treesurgeon-delta"


@dataclasses.dataclass(frozen=True)
class Delta:
  """Hold additive low-rank changes of dense kernels.

  Attributes:
    parts: address to factors, float32.
    provenance: what made it, one JSON value an edit, oldest first.
  """

  parts: Mapping[str, leaves.LowRank]
  provenance: tuple[Mapping[str, Any], ...] = ()


def apply(model: model_lib.Model, delta: Delta) -> model_lib.Model:
  """Add a delta to a model's weights, in float32; each returns to its storage dtype.

  Args:
    model: the model; not modified.
    delta: what to add.

  Returns:
    The changed model.

  Raises:
    ValueError: for an address the model lacks, another shape, or a compressed leaf.

  Example:
    >>> m = model_lib.Model(None, {"w": {"kernel": jnp.zeros((2, 2))}})
    >>> d = Delta({"w/kernel": leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))})
    >>> apply(m, d).leaf("w/kernel").tolist()
    [[1.0, 1.0], [1.0, 1.0]]
  """
  changes = {}
  for address, part in delta.parts.items():
    w = editable(model, address)
    if tuple(w.shape) != part.shape:
      raise ValueError(f"{address} has shape {tuple(w.shape)}, the delta has {part.shape}")
    changes[address] = (w.astype(jnp.float32) + part.dense()).astype(w.dtype)
  return model.update(changes)


def invert(delta: Delta) -> Delta:
  """Return the delta that takes another one back, up to rounding in the storage dtype.

  Args:
    delta: an applied delta.

  Returns:
    Its negative.

  Example:
    >>> d = Delta({"w": leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))})
    >>> invert(d).parts["w"].dense().tolist()
    [[-1.0, -1.0], [-1.0, -1.0]]
  """
  parts = {k: leaves.LowRank(p.a, -p.b, p.scale) for k, p in delta.parts.items()}
  return Delta(parts, tuple({"inverse": dict(p)} for p in reversed(delta.provenance)))


def compose(*deltas: Delta) -> Delta:
  """Join deltas into one whose rank is the sum of theirs.

  Args:
    *deltas: deltas made one after another.

  Returns:
    One delta; deltas add, so the order matters to the provenance alone.

  Example:
    >>> d = Delta({"w": leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))})
    >>> compose(d, d).parts["w"].rank
    2
  """
  parts: dict[str, leaves.LowRank] = {}
  for delta in deltas:
    for address, p in delta.parts.items():
      old = parts.get(address)
      a, b = p.a * p.scale, p.b
      if old is not None:
        a = jnp.concatenate([old.a, a], axis=1)
        b = jnp.concatenate([old.b, b], axis=0)
      parts[address] = leaves.LowRank(a, b)
  return Delta(parts, tuple(p for d in deltas for p in d.provenance))


def save(delta: Delta, path: str | pathlib.Path) -> None:
  """Write a delta to one safetensors file, complete or not at all.

  Args:
    delta: the delta.
    path: file to write.

  Example:
    >>> import tempfile
    >>> d = Delta({"w": leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}, ({"by": "me"},))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(d, f"{folder}/d.safetensors")
    ...   load(f"{folder}/d.safetensors").provenance
    ({'by': 'me'},)
  """
  arrays = {}
  for address, p in delta.parts.items():
    arrays[f"{address}:a"] = np.asarray(p.a * p.scale, np.float32)
    arrays[f"{address}:b"] = np.ascontiguousarray(p.b, np.float32)
  metadata = {"format": FORMAT, "provenance": json.dumps(list(delta.provenance))}
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    safetensors.numpy.save_file(arrays, partial, metadata)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def load(path: str | pathlib.Path) -> Delta:
  """Read what `save` wrote.

  Args:
    path: the file.

  Returns:
    The delta.

  Raises:
    ValueError: if the file is missing, damaged or something else.

  Example:
    >>> load("missing.safetensors")
    Traceback (most recent call last):
      ...
    ValueError: missing.safetensors: no such delta
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"{path}: no such delta")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
  if metadata.get("format") != FORMAT:
    raise ValueError(f"{path}: holds tensors but no delta (format={metadata.get('format')!r})")
  addresses = sorted({name.rpartition(":")[0] for name in arrays})
  parts = {}
  for address in addresses:
    a, b = arrays.get(f"{address}:a"), arrays.get(f"{address}:b")
    if a is None or b is None or a.shape[1] != b.shape[0]:
      raise ValueError(f"{path}: the factors of {address} are incomplete")
    parts[address] = leaves.LowRank(jnp.asarray(a), jnp.asarray(b))
  return Delta(parts, tuple(json.loads(metadata["provenance"])))


def editable(model: model_lib.Model, address: str) -> Any:
  """Fetch a leaf that a delta can be added to.

  Args:
    model: the model.
    address: of a kernel.

  Returns:
    The dense leaf.

  Raises:
    ValueError: if it is compressed, or there is none.

  Example:
    >>> editable(model_lib.Model(None, {"w": jnp.zeros((2, 3))}), "w").shape
    (2, 3)
  """
  w = model.leaf(address)
  if leaves.is_leaf(w):
    raise ValueError(
      f"{address} is a {type(w).__name__}; edits need a dense leaf, so edit before compressing"
    )
  return w
