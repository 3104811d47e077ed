# SPDX-License-Identifier: Apache-2.0
"""Addresses: one name a leaf, whatever the storage.

Parameters are nested dicts. Layers are stored stacked: `params["layers"]["0:12"]` holds layers 0
to 11 with a leading layer axis in every array, and a model of unequal layers has several such
segments. An address hides this: `layers/3/mlp/down/kernel` is one layer's leaf. `flatten` and
`unflatten` convert between the two; `get` and `update` work on single leaves.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves

Params = Mapping[str, Any]
_SEGMENT = re.compile(r"(\d+):(\d+)")
_LAYER = re.compile(r"layers/(\d+)/(.+)")
Segment = tuple[int, int, Params, bool]  # start, stop, stacked leaves, whether their kind is new


class NoMatch(ValueError):
  """An address or a selection that a model does not have."""


def segments(params: Params) -> list[tuple[int, int, Params]]:
  """List the stacked segments of a model in layer order.

  Args:
    params: nested parameters.

  Returns:
    (start, stop, subtree) for each segment.

  Raises:
    ValueError: if a key under "layers" is not "start:stop".

  Example:
    >>> [s[:2] for s in segments({"layers": {"2:3": {}, "0:2": {}}})]
    [(0, 2), (2, 3)]
  """
  found = []
  for key, tree in params.get("layers", {}).items():
    match = _SEGMENT.fullmatch(key)
    if not match:
      raise ValueError(f"layers/{key}: a segment is named 'start:stop', like '0:12'")
    found.append((int(match[1]), int(match[2]), tree))
  return sorted(found, key=lambda s: s[0])


def num_layers(params: Params) -> int:
  """Count the layers a model's parameters hold.

  Args:
    params: nested parameters.

  Returns:
    The number of layers over all segments.

  Example:
    >>> num_layers({"layers": {"0:2": {}, "2:3": {}}})
    3
  """
  return sum(stop - start for start, stop, _ in segments(params))


def addresses(params: Params) -> list[str]:
  """List every leaf's address, layers expanded, in natural order.

  Args:
    params: nested parameters.

  Returns:
    Addresses, layer 2 before layer 10.

  Example:
    >>> addresses({"layers": {"0:2": {"mlp": {"up": {"kernel": jnp.zeros((2, 4, 4))}}}}})
    ['layers/0/mlp/up/kernel', 'layers/1/mlp/up/kernel']
  """
  out = list(walk({k: v for k, v in params.items() if k != "layers"}))
  for start, stop, tree in segments(params):
    suffixes = list(walk(tree))
    out += [f"layers/{i}/{s}" for i in range(start, stop) for s in suffixes]
  return sorted(out, key=natural)


def walk(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flatten nested dicts to '/'-joined keys, without expanding layers.

  Args:
    tree: nested dicts.
    prefix: put before every key.

  Returns:
    Key to leaf.

  Example:
    >>> walk({"a": {"b": 1}})
    {'a/b': 1}
  """
  out = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping):
      out.update(walk(value, f"{name}/"))
    else:
      out[name] = value
  return out


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Undo `walk`.

  Args:
    flat: '/'-joined keys to values.

  Returns:
    Nested dicts.

  Example:
    >>> nest({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
  """
  out: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split("/")
    node = out
    for p in parents:
      node = node.setdefault(p, {})
    node[last] = value
  return out


def flatten(params: Params) -> dict[str, Any]:
  """Turn parameters into one leaf an address, layers unstacked.

  Args:
    params: nested parameters.

  Returns:
    Address to leaf, in natural order.

  Example:
    >>> flat = flatten({"layers": {"0:2": {"w": jnp.arange(2)}}})
    >>> {k: int(v) for k, v in flat.items()}
    {'layers/0/w': 0, 'layers/1/w': 1}
  """
  out = walk({k: v for k, v in params.items() if k != "layers"})
  for start, stop, tree in segments(params):
    for suffix, leaf in walk(tree).items():
      out.update({f"layers/{start + i}/{suffix}": take(leaf, i) for i in range(stop - start)})
  return {k: out[k] for k in sorted(out, key=natural)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Stack consecutive layers of equal structure and nest the rest.

  Args:
    flat: address to leaf.

  Returns:
    Nested parameters with maximal segments.

  Example:
    >>> tree = unflatten({"layers/0/w": jnp.zeros(3), "layers/1/w": jnp.ones(3)})
    >>> tree["layers"]["0:2"]["w"].shape
    (2, 3)
  """
  rest, layers = {}, {}
  for address, leaf in flat.items():
    match = _LAYER.fullmatch(address)
    if match:
      layers.setdefault(int(match[1]), {})[match[2]] = leaf
    else:
      rest[address] = leaf
  out = nest(rest)
  if layers:
    out["layers"] = _group(layers)
  return out


def get(params: Params, address: str) -> Any:
  """Fetch one leaf by its address.

  Args:
    params: nested parameters.
    address: like `layers/3/mlp/down/kernel`.

  Returns:
    The leaf, unstacked.

  Raises:
    ValueError: if there is none; the nearest addresses are named.

  Example:
    >>> get({"layers": {"0:2": {"w": jnp.arange(2)}}}, "layers/1/w").item()
    1
  """
  match = _LAYER.fullmatch(address)
  if match:
    layer, suffix = int(match[1]), match[2]
    for start, stop, tree in segments(params):
      if start <= layer < stop:
        leaf = _descend(tree, suffix)
        if leaf is not None:
          return take(leaf, layer - start)
  else:
    leaf = _descend(params, address)
    if leaf is not None:
      return leaf
  raise NoMatch(_no_match(address, addresses(params)))


def update(params: Params, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Replace leaves by address and leave every other leaf as it is.

  A segment whose layers stop being equal (mixed precision, structured pruning) is split, and
  neighbours that become equal are joined, so segments stay as long as they can be.

  Args:
    params: nested parameters; not modified.
    changes: address to new leaf; addresses must exist.

  Returns:
    New nested parameters that share the unchanged leaves.

  Raises:
    ValueError: for an address that does not exist.

  Example:
    >>> old = {"layers": {"0:2": {"w": jnp.zeros((2, 3))}}}
    >>> update(old, {"layers/1/w": jnp.ones(3)})["layers"]["0:2"]["w"][:, 0].tolist()
    [0.0, 1.0]
  """
  names = addresses(params)
  unknown = sorted(set(changes) - set(names), key=natural)
  if unknown:
    raise NoMatch(_no_match(unknown[0], names))
  rest = walk({k: v for k, v in params.items() if k != "layers"})
  rest.update({k: v for k, v in changes.items() if not _LAYER.fullmatch(k)})
  out = nest(rest)
  if "layers" in params:
    new: list[Segment] = []
    for start, stop, tree in segments(params):
      for one in _update_segment(start, stop, tree, changes):
        _append(new, (*one, one[2] is not tree and _kind(one[2]) != _kind(tree)))
    out["layers"] = {f"{start}:{stop}": tree for start, stop, tree, _ in new}
  return out


def select(names: Sequence[str], pattern: str) -> list[str]:
  """Pick the addresses that a regular expression matches in full.

  Args:
    names: addresses to choose from.
    pattern: regular expression.

  Returns:
    The matching addresses, in the order given.

  Raises:
    ValueError: if none matches (the nearest are named) or the pattern does not compile.

  Example:
    >>> select(["layers/0/mlp/up/kernel", "final_norm/scale"], r".*/kernel")
    ['layers/0/mlp/up/kernel']
  """
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise ValueError(f"select={pattern!r} is not a regular expression: {error}") from error
  found = [n for n in names if compiled.fullmatch(n)]
  if not found:
    raise NoMatch(_no_match(pattern, names))
  return found


def nearest(pattern: str, names: Iterable[str]) -> str:
  """Name the addresses that look most like a pattern, for a message.

  Args:
    pattern: an address or a regular expression.
    names: addresses to choose from.

  Returns:
    Up to three, joined by commas.

  Example:
    >>> nearest(r"layers/0/mlp/upp/.*", ["layers/0/mlp/up/kernel"])
    'layers/0/mlp/up/kernel'
  """
  plain = re.sub(r"\\.|[.*+?()\[\]|^$]", "", pattern)
  near = difflib.get_close_matches(plain, list(names), n=3, cutoff=0.0)
  return ", ".join(near) or "(the model has no leaves)"


def natural(address: str) -> tuple:
  """Order addresses so that layer 2 comes before layer 10.

  Args:
    address: an address.

  Returns:
    A sort key.

  Example:
    >>> sorted(["layers/10/w", "layers/2/w"], key=natural)
    ['layers/2/w', 'layers/10/w']
  """
  return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in address.split("/"))


def take(leaf: Any, index: int) -> Any:
  """Cut one layer out of a stacked leaf.

  Args:
    leaf: array, shape struct, or compressed leaf with a leading layer axis.
    index: which layer, from 0 within the segment.

  Returns:
    The leaf without the layer axis.

  Example:
    >>> take(jnp.arange(6).reshape(2, 3), 1).tolist()
    [3, 4, 5]
  """

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return _cut(x, index) if isinstance(x, jax.Array) else x[index]

  return jax.tree.map(one, leaf)


@jax.jit
def _cut(x: jax.Array, index: int | jax.Array) -> jax.Array:
  """Index as one program a shape, for all layers."""
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def stack(parts: Sequence[Any]) -> Any:
  """Stack equal leaves along a new leading layer axis; the inverse of `take`.

  Args:
    parts: leaves of one structure, shape and dtype.

  Returns:
    The stacked leaf; host arrays stay on the host.

  Example:
    >>> stack([jnp.zeros(3), jnp.ones(3)]).shape
    (2, 3)
  """

  def join(*xs: Any) -> Any:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return (np if all(isinstance(x, np.ndarray) for x in xs) else jnp).stack(xs)

  return jax.tree.map(join, *parts)


def _group(layers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
  """Stack runs of consecutive layers whose leaves have equal signatures."""
  runs: list[list[int]] = []
  last = None
  for i in sorted(layers):
    sign = {s: leaves.signature(x) for s, x in layers[i].items()}
    if runs and i == runs[-1][-1] + 1 and sign == last:
      runs[-1].append(i)
    else:
      runs.append([i])
    last = sign
  return {
    f"{run[0]}:{run[-1] + 1}": nest(
      {s: stack([layers[i][s] for i in run]) for s in sorted(layers[run[0]])}
    )
    for run in runs
  }


def _update_segment(
  start: int, stop: int, tree: Params, changes: Mapping[str, Any]
) -> list[tuple[int, int, Params]]:
  """Replace leaves of one segment; returns the segments it becomes, itself if nothing changes."""
  flat = walk(tree)
  columns, bounds = {}, set()
  for suffix, leaf in flat.items():
    names = [f"layers/{i}/{suffix}" for i in range(start, stop)]
    if not any(n in changes for n in names):
      continue
    column = [changes[n] if n in changes else take(leaf, i) for i, n in enumerate(names)]
    signs = [leaves.signature(x) for x in column]
    bounds |= {i for i in range(1, len(signs)) if signs[i] != signs[i - 1]}
    columns[suffix] = column
  if not columns:
    return [(start, stop, tree)]
  cuts = [0, *sorted(bounds), stop - start]
  return [
    (
      start + a,
      start + b,
      nest({s: stack(columns[s][a:b]) if s in columns else _run(x, a, b) for s, x in flat.items()}),
    )
    for a, b in zip(cuts, cuts[1:], strict=False)
  ]


def _append(found: list[Segment], new: Segment) -> None:
  """Add a segment, joined with the one before it if an update made them equal."""
  if found:
    start, stop, tree, fresh = found[-1]
    if (fresh or new[3]) and stop == new[0] and _kind(tree) == _kind(new[2]):
      found[-1] = (start, new[1], _concatenate(tree, new[2]), True)
      return
  found.append(new)


def _run(leaf: Any, start: int, stop: int) -> Any:
  """Cut a run of layers out of a stacked leaf; the leaf itself where that is all of it."""

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((stop - start, *x.shape[1:]), x.dtype)
    return x if stop - start == x.shape[0] else x[start:stop]

  return jax.tree.map(one, leaf)


def _kind(tree: Params) -> dict[str, tuple]:
  """Describe what one layer of a segment looks like."""
  out = {}
  for suffix, leaf in walk(tree).items():
    structure, arrays = leaves.signature(leaf)
    out[suffix] = structure, tuple((shape[1:], dtype) for shape, dtype in arrays)
  return out


def _concatenate(a: Params, b: Params) -> Params:
  def join(x: Any, y: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((x.shape[0] + y.shape[0], *x.shape[1:]), x.dtype)
    host = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    return (np if host else jnp).concatenate([x, y])

  return jax.tree.map(join, a, b)


def _descend(tree: Any, name: str) -> Any:
  for part in name.split("/"):
    if not isinstance(tree, Mapping) or part not in tree:
      return None
    tree = tree[part]
  return None if isinstance(tree, Mapping) else tree


def _no_match(pattern: str, names: Iterable[str]) -> str:
  return f"no address matches {pattern!r}; nearest: {nearest(pattern, names)}"
