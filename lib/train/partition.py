# SPDX-License-Identifier: Apache-2.0
"""Which arrays train: a mask over the parameters, and the two halves it cuts them into.

Frozen arrays are never part of what the optimizer sees, so they have no moments and nothing, weight
decay included, can change a bit of them. A stacked array of which some layers train is cut
along its layer axis.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, paths

PLAIN = "array"


def trainable(
  params: Mapping[str, Any], select: str = ".*", *, types: Sequence[str] | None = None
) -> Any:
  """Mark the arrays that train.

  Args:
    params: nested parameters.
    select: regular expression over addresses.
    types: kinds of leaf whose arrays may train: "array" for those that stand for themselves, and
      names from `core.leaves.TYPES`; inside a `Sum`, each part counts by its own kind. None
      means every floating-point array, so with quantized leaves also their scales.

  Returns:
    A tree like `params` with, for each array, True, False, or a boolean array over its layers.

  Raises:
    ValueError: for an unknown type, a pattern that matches no address, or if no array is left.

  Example:
    >>> params = {"layers": {"0:2": {"w": jnp.zeros((2, 3))}}, "b": jnp.zeros(3)}
    >>> trainable(params, "layers/1/w")["layers"]["0:2"]["w"].tolist()
    [False, True]
  """
  known = (PLAIN, *leaves.TYPES)
  for name in types or ():
    if name not in known or name == "Sum":
      raise ValueError(
        f"types names {name!r}; valid: {', '.join(k for k in known if k != 'Sum')} "
        "(the parts of a Sum count by themselves)"
      )
  chosen = set(paths.select(paths.addresses(params), select))
  flat = {}
  for name, leaf in paths.walk(params).items():
    segment = re.fullmatch(r"layers/(\d+):(\d+)/(.+)", name)
    if segment:
      start, stop = int(segment[1]), int(segment[2])
      hits = np.array([f"layers/{i}/{segment[3]}" in chosen for i in range(start, stop)])
      hit = True if hits.all() else hits if hits.any() else False
    else:
      hit = name in chosen
    flat[name] = _mark(leaf, hit, types)
  if not any(np.any(m) for m in jax.tree.leaves(flat)):
    raise ValueError(
      f"nothing is trainable: select={select!r} matches {len(chosen)} leaves, but none of "
      f"their arrays is floating point and of types={list(types) if types else 'any'}"
    )
  return paths.nest(flat)


def split(params: Mapping[str, Any], mask: Any) -> tuple[Any, Any]:
  """Cut parameters into what trains and what does not.

  Args:
    params: nested parameters.
    mask: from `trainable`.

  Returns:
    (train, frozen), both like `params`, with None where an array is wholly in the other half. Of
    an array some of whose layers train, `train` holds those layers and `frozen` all of them.

  Example:
    >>> train, frozen = split({"a": jnp.ones(2), "b": jnp.zeros(2)}, {"a": True, "b": False})
    >>> train["b"] is None, frozen["a"] is None
    (True, True)
  """
  train = jax.tree.map(
    lambda m, x: x[np.flatnonzero(m)] if isinstance(m, np.ndarray) else x if m else None,
    mask,
    params,
  )
  frozen = jax.tree.map(lambda m, x: None if m is True else x, mask, params)
  return train, frozen


def join(train: Any, frozen: Any, mask: Any) -> Any:
  """Undo `split`; differentiable in `train`.

  Args:
    train: what trains.
    frozen: what does not.
    mask: from `trainable`.

  Returns:
    Parameters of the structure that was split.

  Example:
    >>> join({"a": 1, "b": None}, {"a": None, "b": 2}, {"a": True, "b": False})
    {'a': 1, 'b': 2}
  """
  flags, structure = jax.tree.flatten(mask)
  parts = [structure.flatten_up_to(t) for t in (train, frozen)]
  out = []
  for m, x, y in zip(flags, *parts, strict=True):
    if isinstance(m, np.ndarray):
      x = y.at[np.flatnonzero(m)].set(x.astype(y.dtype), unique_indices=True)
    out.append(y if m is False else x)
  return jax.tree.unflatten(structure, out)


def count(train: Any) -> int:
  """Count the numbers that train.

  Args:
    train: from `split`.

  Returns:
    How many.

  Example:
    >>> count({"a": jnp.ones((2, 3)), "b": None})
    6
  """
  return sum(x.size for x in jax.tree.leaves(train))


def _mark(leaf: Any, hit: Any, types: Sequence[str] | None) -> Any:
  """Spread one leaf's decision over its arrays, keeping the leaf's structure."""
  if isinstance(leaf, leaves.Sum):
    return leaves.Sum(tuple(_mark(part, hit, types) for part in leaf.parts))
  kind = type(leaf).__name__ if leaves.is_leaf(leaf) else PLAIN

  def one(x: Any) -> Any:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return hit if floating and (types is None or kind in types) else False

  return jax.tree.map(one, leaf)
