# SPDX-License-Identifier: Apache-2.0
"""Gather layers along the layer axis: the one primitive of depth growth.

Stacking, interpolation, block expansion and layer pruning are each a list of layer indices. The
same gather serves parameters and everything shaped like them, an optimizer's moments above all:
counts and schedules stay as they are. Arrays are gathered where they live, a sharded one keeps its
sharding, a host array stays on the host.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, needs, paths, programs, step
from treesurgeon.core import model as model_lib

_LAYER = re.compile(r"layers/(\d+)/(.+)")
Pieces = tuple[tuple[str, tuple[int, ...]], ...]


class Plan(NamedTuple):
  """Where each new segment's layers come from.

  Attributes:
    sources: old segment to its number of layers.
    targets: new segment to its pieces, each an old segment and layer places within it.
  """

  sources: Mapping[str, int]
  targets: Mapping[str, Pieces]


def plan(params: paths.Params, index: Sequence[int]) -> Plan:
  """Work out how a list of layers is put together from a model's segments.

  Args:
    params: nested parameters.
    index: for each new layer the old one, from 0; they may repeat or be left out.

  Returns:
    The plan; new segments are as long as equal structure allows.

  Raises:
    ValueError: for an empty list or an index that is out of range.

  Example:
    >>> tree = {"layers": {"0:2": {"w": jnp.zeros((2, 3))}, "2:3": {"w": jnp.zeros((1, 4))}}}
    >>> plan(tree, [0, 2, 2]).targets
    {'0:1': (('0:2', (0,)),), '1:3': (('2:3', (0, 0)),)}
  """
  segments = paths.segments(params)
  home = {i: (f"{a}:{b}", i - a) for a, b, _ in segments for i in range(a, b)}
  index = [int(i) for i in index]
  bad = [i for i in index if i not in home]
  if bad or not index:
    raise ValueError(f"layers {bad or index} cannot be taken; valid are 0 to {len(home) - 1}")
  kind = {
    f"{a}:{b}": {s: leaves.signature(_first(x)) for s, x in paths.walk(tree).items()}
    for a, b, tree in segments
  }
  runs: list[list[tuple[str, list[int]]]] = []
  for name, place in (home[i] for i in index):
    if not runs or kind[runs[-1][-1][0]] != kind[name]:
      runs.append([(name, [place])])
    elif runs[-1][-1][0] == name:
      runs[-1][-1][1].append(place)
    else:
      runs[-1].append((name, [place]))
  targets, start = {}, 0
  for run in runs:
    stop = start + sum(len(places) for _, places in run)
    targets[f"{start}:{stop}"] = tuple((name, tuple(places)) for name, places in run)
    start = stop
  return Plan({f"{a}:{b}": b - a for a, b, _ in segments}, targets)


def take_layers(tree: Any, index: Sequence[int], *, like: paths.Params | None = None) -> Any:
  """Gather layers in every part of a tree that is laid out like a model's parameters.

  Args:
    tree: parameters, an optimizer's state, or any nesting of these.
    index: for each new layer the old one.
    like: the parameters that settle the layout; None means `tree` itself.

  Returns:
    The tree with each `layers` gathered; all else is passed on untouched.

  Raises:
    ValueError: for an index out of range, or an array in `layers` without the layer axis.

  Example:
    >>> tree = {"layers": {"0:2": {"w": jnp.arange(2)}}}
    >>> take_layers(tree, [0, 1, 0])["layers"]["0:3"]["w"].tolist()
    [0, 1, 0]
  """
  how = plan(tree if like is None else like, index)

  def fits(node: Any) -> bool:
    # The segments' names identify a tree of moments, whatever optax has masked in it or left out.
    inner = node.get("layers") if isinstance(node, Mapping) else None
    return isinstance(inner, Mapping) and set(inner) == set(how.sources)

  def change(node: Any) -> Any:
    return {**node, "layers": gather(node["layers"], how)} if fits(node) else node

  return jax.tree.map(change, tree, is_leaf=fits)


def gather(layers: Mapping[str, Any], how: Plan) -> dict[str, Any]:
  """Gather layers by a plan.

  Args:
    layers: segments, as under `params["layers"]`; leaves may be arrays, compressed or empty.
    how: from `plan`.

  Returns:
    The new segments.

  Raises:
    ValueError: for an array without the layer axis.

  Example:
    >>> tree = {"0:1": {"w": jnp.ones((1, 2))}}
    >>> gather(tree, plan({"layers": tree}, [0, 0]))["0:2"]["w"].shape
    (2, 2)
  """
  out = {}
  for target, pieces in how.targets.items():
    parts = [
      jax.tree.map(functools.partial(_take, places=p, of=how.sources[name]), layers[name])
      for name, p in pieces
    ]
    out[target] = parts[0] if len(parts) == 1 else jax.tree.map(_join, *parts)
  return out


def lift(index: Callable[[int], list[int]]) -> step.Step:
  """Lift an index list to a step: the form of every depthwise operator.

  Args:
    index: number of layers -> which layer each new layer is copied from.

  Returns:
    A step that takes whole models and rewrites the architecture too.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> from treesurgeon.core import model as model_lib
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> drop_last = lift(lambda count: list(range(count - 1)))
    >>> drop_last.apply(m, {}, jax.random.key(0)).spec.num_layers
    1
  """

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del evidence, key
    return reassemble(m, index(paths.num_layers(m.params)))

  def units(names: Sequence[str]) -> step.Units:
    inside = tuple(a for a in names if a.startswith("layers/"))
    if not inside:
      raise ValueError("a model without layers cannot grow in depth")
    return [inside]

  return step.Step({}, apply, "model", {}, units)


def check(num_layers: int, growth: int) -> None:
  """Refuse a growth that makes no sense.

  Args:
    num_layers: layers of the model.
    growth: how many times deeper it should become.

  Raises:
    ValueError: for a growth that is not a positive integer, or a model without layers.
  """
  if isinstance(growth, bool) or not isinstance(growth, int) or growth < 1:
    raise ValueError(f"growth={growth!r} must be an integer of at least 1")
  if num_layers < 1:
    raise ValueError("a model without layers cannot grow in depth")


def reassemble(model: model_lib.Model, index: Sequence[int]) -> model_lib.Model:
  """Build a model out of a model's layers: parameters, architecture, and optimizer moments.

  Args:
    model: the model; not modified. Whatever in `aux` is laid out like its parameters, such as the
      moments of an optax state under "optimizer", or keyed by address, such as masks, is
      gathered along.
    index: for each new layer the old one.

  Returns:
    The new model; `aux["notes"]` tells the layers and parameters before and after.

  Raises:
    ValueError: for an index out of range.

  Example:
    >>> m = model_lib.Model(None, {"layers": {"0:2": {"w": jnp.arange(2)}}})
    >>> reassemble(m, [1, 1, 0]).leaf("layers/2/w").item()
    0
  """
  new = model.replace(
    spec=None if model.spec is None else model.spec.take_layers(index),
    params=take_layers(model.params, index),
    aux={
      k: _by_address(v, index) if _addressed(v) else take_layers(v, index, like=model.params)
      for k, v in model.aux.items()
    },
  )
  notes = {
    "layers": [paths.num_layers(m.params) for m in (model, new)],
    "parameters": [m.size() for m in (model, new)],
    "index": [int(i) for i in index],
  }
  return new.replace(aux={**new.aux, "notes": {**new.aux.get("notes", {}), **notes}})


def _take(x: Any, *, places: tuple[int, ...], of: int) -> Any:
  if tuple(x.shape) == (1,):
    return x  # what optax's factored optimizers put where they keep nothing
  if x.shape[:1] != (of,):
    raise ValueError(f"an array of shape {tuple(x.shape)} lacks the axis of its {of} layers")
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(places), *x.shape[1:]), x.dtype)
  if isinstance(x, np.ndarray):
    return x[list(places)]
  if places == tuple(range(of)):
    return x
  return programs.compiled(_gather, ())(x, {"places": jnp.asarray(places, jnp.int32)})


def _join(*parts: Any) -> Any:
  if tuple(parts[0].shape) == (1,):
    return parts[0]
  if isinstance(parts[0], jax.ShapeDtypeStruct):
    count = sum(p.shape[0] for p in parts)
    return jax.ShapeDtypeStruct((count, *parts[0].shape[1:]), parts[0].dtype)
  return (np if all(isinstance(p, np.ndarray) for p in parts) else jnp).concatenate(parts)


def _gather(x: jax.Array, places: jax.Array) -> jax.Array:
  return jnp.take(x, places, axis=0, mode="clip")


def _addressed(value: Any) -> bool:
  return isinstance(value, Mapping) and any(_LAYER.fullmatch(str(k)) for k in value)


def _by_address(values: Mapping[str, Any], index: Sequence[int]) -> dict[str, Any]:
  out = {k: v for k, v in values.items() if not _LAYER.fullmatch(k)}
  for key, value in values.items():
    match = _LAYER.fullmatch(key)
    if match:
      new = (i for i, old in enumerate(index) if old == int(match[1]))
      out.update({f"layers/{i}/{match[2]}": value for i in new})
  return out


def _first(leaf: Any) -> Any:
  return jax.eval_shape(lambda x: paths.take(x, 0), leaf)
