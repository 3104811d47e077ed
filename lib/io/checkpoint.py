# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a model: read leaf by leaf."""

import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon.core import lineage, paths
from treesurgeon.io import blocks, digests, layouts, packed, safetensors
from treesurgeon.models import hf

CONFIG, LINEAGE = "config.json", "lineage.json"


class Checkpoint:
  """Read a directory lazily; a `core.needs.Source`.

  Opening reads config.json and the headers, and checks that every tensor the config calls for is
  there in its shape and that there is no other. Leaves are host arrays, views into the file where
  its layout allows. Layers that compressed-tensors, GPTQ, AWQ or MLX quantized are compressed
  leaves.

  Args:
    directory: config.json and safetensors.

  Attributes:
    spec: the architecture.
    tensors: name to tensor.

  Raises:
    ValueError: naming the file, the tensor, the value and what would be valid.
  """

  def __init__(self, directory: str | Path):
    self.directory = safetensors.check_folder(directory)
    config = read_json(self.directory / CONFIG)
    self.tensors = safetensors.open_folder(self.directory)
    self._metas = packed.descriptions(config, str(self.directory / CONFIG))
    self._parts = packed.parts(self.tensors)
    plain = {k: v for k, v in config.items() if k not in (packed.KEY, *layouts.KEYS)}
    try:
      self.spec = hf.refine(hf.from_config(plain), self._parts)
      entries = hf.entries(self.spec, self._parts)
      self._foreign = layouts.held(
        config, self.spec, entries, {n: self.tensors.info(n) for n in self.tensors}, self._peek
      )
    except ValueError as error:
      raise ValueError(f"{self.directory}: {error}") from error
    self._places: dict[str, hf.Entry | str | layouts.Layer] = {}
    self._aliases = {e.address[0]: e for e in entries if e.kind == "alias"}
    self._check_names(entries)
    for entry in entries:
      if "" in self._parts.get(entry.name, ()) and entry.name not in self._foreign:
        have, want = self.tensors.info(entry.name).shape, tuple(hf.shape(self.spec, entry))
        if have != want:
          raise ValueError(
            f"{self.tensors.file(entry.name)}: tensor {entry.name!r} has shape {have}; config.json "
            f"says {want}"
          )
    for address in self._places:
      self.struct(address)

  def addresses(self) -> list[str]:
    """List the addresses of every leaf, in natural order."""
    return sorted(self._places, key=paths.natural)

  def struct(self, address: str) -> Any:
    """Return the shapes and dtypes of a leaf without touching its data."""
    place = self._place(address)
    if isinstance(place, layouts.Layer):
      return self._fits(address, place, place.struct(address))
    if isinstance(place, str):
      infos = {k: self.tensors.info(n) for k, n in self._parts[place].items()}
      arrays = {k: jax.ShapeDtypeStruct(i.shape, i.dtype) for k, i in infos.items()}
      return self._build(address, place, arrays)
    dtype = self.tensors.info(place.name).dtype
    return jax.ShapeDtypeStruct(hf.address_shape(self.spec, address), dtype)

  def leaf(self, address: str) -> Any:
    """Read one leaf; refuses NaN and Inf.

    Args:
      address: one of `addresses()`.

    Returns:
      A numpy array, or a compressed leaf of numpy arrays.

    Raises:
      ValueError: for an unknown address, weights that are not finite, or a repeated tied
        tensor that differs from its original.
    """
    place = self._place(address)
    if isinstance(place, layouts.Layer):
      arrays = {k: self._read(n) for k, n in place.tensors.items()}
      return self._fits(address, place, place.leaf(address, arrays))
    if isinstance(place, str):
      arrays = {k: self._read(n) for k, n in self._parts[place].items()}
      return self._build(address, place, arrays)
    array = self._read(place.name)
    if address in self._aliases:
      copy = self._aliases[address].name
      if not np.array_equal(_raw(self.tensors[copy]), _raw(array)):
        raise ValueError(
          f"{self.tensors.file(copy)}: tensor {copy!r} differs from {place.name!r}, though "
          "config.json ties them; set tie_word_embeddings to false to keep both"
        )
    return hf.to_leaves(self.spec, place, array)[address]

  @functools.cached_property
  def lineage(self) -> tuple[lineage.Record, ...]:
    """Read what was done to the model before, if the directory tells."""
    return read_lineage(self.directory)

  @functools.cached_property
  def digests(self) -> dict[str, str]:
    """Hash the files that make up the model: name to sha256."""
    return hash_files([self.directory / CONFIG, *self.tensors.files])

  def digest(self) -> str:
    """Hash the model: one sha256 over its files' names and hashes."""
    return digest(self.digests)

  def prefetch(self, address: str) -> None:
    """Ask the operating system to read a leaf ahead of its use."""
    place = self._place(address)
    if isinstance(place, layouts.Layer):
      names = place.tensors.values()
    else:
      names = self._parts[place].values() if isinstance(place, str) else (place.name,)
    for name in names:
      self.tensors.prefetch(name)

  def _place(self, address: str) -> Any:
    if address not in self._places:
      paths.select(list(self._places), address)  # raises, and names the nearest
    return self._places[address]

  def _peek(self, name: str) -> np.ndarray:
    return self.tensors[name]

  def _read(self, name: str) -> np.ndarray:
    array = self.tensors[name]
    blocks.check_finite(name, array, self.tensors.file(name))
    return array

  def _fits(self, address: str, layer: layouts.Layer, leaf: Any) -> Any:
    shape = tuple(hf.address_shape(self.spec, address))
    return packed.check(leaf, shape=shape, where=f"{self.directory}: {layer.name!r}")

  def _build(self, address: str, base: str, arrays: Mapping[str, Any]) -> Any:
    shape = tuple(hf.address_shape(self.spec, address))
    where = f"{self.directory}: {base!r}"
    return packed.build(self._metas[base], arrays, shape=shape, where=where)

  def _check_names(self, entries: tuple[hf.Entry, ...]) -> None:
    """Find every leaf's tensor; complain of tensors that are missing or that nothing reads."""
    missing, used = [], set()
    for entry in entries:
      bases = [entry.name]
      layer = self._foreign.get(entry.name)
      if layer is not None:
        self._places.update(dict.fromkeys(entry.address, layer))
        used.update(layer.tensors.values())
        continue
      if entry.kind == "alias":
        pass
      elif entry.name in self._metas and len(entry.address) == 1:
        self._places[entry.address[0]] = entry.name
      elif "" in self._parts.get(entry.name, ()):
        self._places.update(dict.fromkeys(entry.address, entry))
      elif all(a in self._metas for a in entry.address):
        bases = list(entry.address)
        self._places.update({a: a for a in entry.address})
      else:
        missing.append(entry.name)
        continue
      missing += [b for b in bases if b not in self._parts]
      used.update(name for b in bases for name in self._parts.get(b, {}).values())
    extra = sorted(n for n in self.tensors if n not in used and not hf.ignored(n))
    if missing or extra:
      kinds = (("missing", missing), ("unexpected", extra))
      told = [f"{len(x)} {word}: {', '.join(x[:5])}" for word, x in kinds if x]
      raise ValueError(f"{self.directory}: the tensors do not fit config.json; {'; '.join(told)}")


def read_json(path: Path) -> Any:
  """Read a JSON object from a file.

  Args:
    path: the file.

  Returns:
    The parsed object.

  Raises:
    ValueError: if it is absent (what the directory holds is named) or not a JSON object.
  """
  if not path.is_file():
    raise ValueError(f"{path.parent}: no {path.name}; it holds {safetensors.listing(path.parent)}")
  try:
    value = json.loads(path.read_bytes().decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: expected a JSON object; got {type(value).__name__}")
  return value


def read_lineage(directory: Path) -> tuple[lineage.Record, ...]:
  """Read what was done to a model, if its directory tells.

  Args:
    directory: of the model.

  Returns:
    The records, oldest first; none without a lineage.json.

  Raises:
    ValueError: if it is no lineage file.

  Example:
    >>> read_lineage(Path("no such directory"))
    ()
  """
  path = directory / LINEAGE
  if not path.is_file():
    return ()
  try:
    return lineage.from_json(read_json(path)["records"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: not a lineage file: {error}") from error


def digest(digests: Mapping[str, str]) -> str:
  """Hash several files as one.

  Args:
    digests: file name to sha256.

  Returns:
    Hexadecimal sha256 over names and hashes, in the order of the names.

  Example:
    >>> digest({})[:8]
    'e3b0c442'
  """
  lines = "".join(f"{d}  {n}\n" for n, d in sorted(digests.items()))
  return hashlib.sha256(lines.encode()).hexdigest()


def hash_files(files: list[Path]) -> dict[str, str]:
  """Hash several files at once.

  Args:
    files: paths with distinct names.

  Returns:
    File name to sha256.

  Example:
    >>> hash_files([])
    {}
  """
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return {f.name: d for f, d in zip(files, pool.map(digests.digest, files), strict=True)}


def _raw(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)
