# SPDX-License-Identifier: Apache-2.0
"""Compressed leaves in safetensors: one tensor a part, and a description in config.json.

The part `codes` of the kernel that a plain file would call `model.layers.0.mlp.up_proj.weight` is
the tensor `model.layers.0.mlp.up_proj.weight::codes`; the config's key `treesurgeon_leaves` tells
what the parts make up. A leaf that its family's files fuse with others (GPT-2's q, k and v) goes
by its address instead, `layers/0/attn/q/kernel::codes`, and so do its dense companions.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from treesurgeon.core import leaves

KEY = "treesurgeon_leaves"
VERSION = 1
_SEPARATOR = "::"


def join(base: str, part: str) -> str:
  """Name the tensor of one part; the part "" is the base itself.

  Args:
    base: tensor name or address.
    part: name from `leaves.to_parts`.

  Returns:
    A tensor name.

  Example:
    >>> join("h.0.weight", "codes")
    'h.0.weight::codes'
  """
  return f"{base}{_SEPARATOR}{part}" if part else base


def parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
  """Group tensor names by base.

  Args:
    names: tensor names of a file.

  Returns:
    Base to {part: tensor name}.

  Example:
    >>> parts(["w::codes", "w::scales", "b"])
    {'w': {'codes': 'w::codes', 'scales': 'w::scales'}, 'b': {'': 'b'}}
  """
  out: dict[str, dict[str, str]] = {}
  for name in names:
    base, _, part = name.partition(_SEPARATOR)
    out.setdefault(base, {})[part] = name
  return out


def describe(metas: Mapping[str, Any]) -> dict[str, Any]:
  """Make the config's entry.

  Args:
    metas: base to the description from `leaves.to_parts`.

  Returns:
    Keys to lay over a config; none if nothing is compressed.

  Example:
    >>> describe({})
    {}
  """
  return {KEY: {"version": VERSION, "leaves": dict(sorted(metas.items()))}} if metas else {}


def descriptions(config: Mapping[str, Any], file: str) -> dict[str, dict[str, Any]]:
  """Read the config's entry back.

  Args:
    config: parsed config.json.
    file: its name, for messages.

  Returns:
    Base to description.

  Raises:
    ValueError: for another version or a malformed entry.

  Example:
    >>> descriptions({}, "config.json")
    {}
  """
  entry = config.get(KEY, {"version": VERSION, "leaves": {}})
  if not isinstance(entry, dict) or entry.get("version") != VERSION:
    raise ValueError(f"{file}: {KEY} must be an object of version {VERSION}; got {str(entry)[:80]}")
  table = entry.get("leaves")
  if not isinstance(table, dict) or not all(isinstance(m, dict) for m in table.values()):
    raise ValueError(f"{file}: {KEY}.leaves must map tensor names to descriptions")
  return table


def build(
  meta: Mapping[str, Any], arrays: Mapping[str, Any], *, shape: tuple[int, ...], where: str
) -> Any:
  """Rebuild a leaf from untrusted parts, and check that they fit together.

  Args:
    meta: the description.
    arrays: part to array or shape struct.
    shape: the logical shape it must have.
    where: file and name, for messages.

  Returns:
    The leaf.

  Raises:
    ValueError: naming the leaf and what does not fit.

  Example:
    >>> import numpy as np
    >>> build({}, {"": np.zeros(3)}, shape=(3,), where="w").shape
    (3,)
  """
  try:
    leaf = leaves.from_parts(meta, arrays)
  except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
    raise ValueError(f"{where}: the parts of the compressed leaf do not fit: {error}") from error
  return check(leaf, shape=shape, where=where)


def check(leaf: Any, *, shape: tuple[int, ...], where: str) -> Any:
  """Require that a leaf's parts fit together.

  Args:
    leaf: of arrays or shape structs.
    shape: the logical shape it must have.
    where: file and name, for messages.

  Returns:
    The leaf.

  Raises:
    ValueError: naming the leaf and what does not fit.

  Example:
    >>> import numpy as np
    >>> check(np.zeros(3), shape=(3,), where="w").shape
    (3,)
  """
  try:
    structs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), leaf
    )
    flat, structure = jax.tree.flatten(structs)
    found = _dense_shape(structure, tuple(flat))
  except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
    raise ValueError(f"{where}: the parts of the compressed leaf do not fit: {error}") from error
  if found != shape or tuple(leaf.shape) != shape:
    raise ValueError(f"{where}: the compressed leaf has shape {found}; config.json says {shape}")
  return leaf


@functools.lru_cache(maxsize=512)
def _dense_shape(structure: Any, structs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[int, ...]:
  """Let the leaf compute its dense value in the abstract; parts of wrong shapes fail."""
  return tuple(jax.eval_shape(leaves.dense, jax.tree.unflatten(structure, structs)).shape)
