# SPDX-License-Identifier: Apache-2.0
"""A merge as a function of its coefficients: θ = θ₀ + Σ c_i (θ_i − θ₀), inside one program.

What learned merges share. Base and donors are held once, as stored (layers stacked, in their own
dtypes); no task vector is kept. The merge is formed in float32 within the compiled program that
runs the network on it, so that its gradient reaches the coefficients and nothing else. There is a
coefficient a donor for the model, for each layer, for each tensor, or for each of several random
blocks of every tensor's entries (drawn from the tensor's address).
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, meshes, paths, programs, step
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs as needs_lib

GRANULARITIES = ("task", "layer", "tensor")
_NOTED = 10_000  # coefficients that a lineage still records
Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is static of a merge to be learned; hashable.

  Attributes:
    spec: architecture.
    granularity: "task", "layer" or "tensor".
    layers: number of layers.
    chosen: for each stored leaf that is merged, by name, whether each of its layers is (one entry
      outside the layers).
    blocks: random blocks a tensor is divided into; granularity "tensor" only.
    option: what else the loss must know.
  """

  spec: Any
  granularity: str
  layers: int
  chosen: tuple[tuple[str, tuple[bool, ...]], ...]
  blocks: int = 1
  option: Any = None


@dataclasses.dataclass(frozen=True)
class Parts:
  """The arrays of a merge.

  Attributes:
    base: stored name to array.
    donors: the same of each donor.
    rest: stored name to what is not merged.
  """

  base: Flat
  donors: tuple[Flat, ...]
  rest: Flat


jax.tree_util.register_dataclass(Parts, ["base", "donors", "rest"], [])


def gather(
  m: model_lib.Model,
  donors: Mapping[str, tuple[Any, ...]],
  pattern: str,
  *,
  granularity: str,
  blocks: int = 1,
  option: Any = None,
) -> tuple[Plan, Parts]:
  """Line up a base and its donors as they are stored.

  Args:
    m: the base.
    donors: address to the donors' leaves.
    pattern: regular expression over addresses: what is merged.
    granularity: "task", "layer" or "tensor".
    blocks: random blocks a tensor.
    option: see `Plan`.

  Returns:
    What is static, and the arrays.

  Raises:
    ValueError: for donors of other shapes.

  Example:
    >>> m = model_lib.Model(None, {"w": jnp.zeros(2)})
    >>> plan, parts = gather(m, {"w": (jnp.ones(2),)}, ".*", granularity="task")
    >>> merge(plan, parts, start(plan, 1, 0.5))["w"].tolist()
    [0.5, 0.5]
  """
  base, rest, chosen, columns = {}, {}, [], []
  stored = [paths.walk(s.params) for s in _whole(donors)]
  for name, leaf in paths.walk(m.params).items():
    inside = tuple(bool(re.fullmatch(pattern, a)) for a in addresses(name))
    if not any(inside):
      rest[name] = leaf
      continue
    base[name] = w = leaves.dense(leaf)
    column = _column(name, w, donors, stored)
    step.check_donors(name, w, column)
    columns.append([meshes.to_auto(leaves.dense(d)) for d in column])
    chosen.append((name, inside))
  each = tuple(dict(zip(base, column, strict=True)) for column in zip(*columns, strict=True))
  depth = paths.num_layers(m.params)
  plan = Plan(m.spec, granularity, depth, tuple(chosen), blocks, option)
  return plan, Parts(base, each, rest)


def start(plan: Plan, donors: int, value: float | Sequence[float]) -> Any:
  """Make the coefficients to begin from.

  Args:
    plan: what is static.
    donors: how many.
    value: what all are, or one number a donor.

  Returns:
    A tree of float32 arrays, the donors' axis first.

  Example:
    >>> start(Plan(None, "task", 0, ()), 3, 0.3).shape
    (3,)
  """
  first = np.broadcast_to(np.asarray(value, np.float32), (donors,))

  def make(*shape: int) -> jax.Array:
    wide = first.reshape((donors,) + (1,) * len(shape))
    return jnp.asarray(np.broadcast_to(wide, (donors, *shape)))

  if plan.granularity == "task":
    return make()
  if plan.granularity == "layer":
    return {"layers": make(plan.layers), "rest": make()}
  tail = (plan.blocks,) if plan.blocks > 1 else ()
  return {
    name: make(*((len(inside),) if stacked(name) else ()), *tail) for name, inside in plan.chosen
  }


def merge(plan: Plan, parts: Parts, coefficients: Any) -> Flat:
  """Form θ₀ + Σ c_i (θ_i − θ₀) of every leaf that is merged.

  Args:
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.

  Returns:
    Stored name to array, in the base's dtypes; layers that are not chosen stay as they are.
  """
  out = {}
  for name, inside in plan.chosen:
    w = parts.base[name]
    base = w.astype(jnp.float32)
    total = base
    for i, donor in enumerate(parts.donors):
      c = _spread(plan, name, coefficients, i, w.shape)
      total = total + c * (donor[name].astype(jnp.float32) - base)
    keep = jnp.asarray(inside).reshape((-1,) + (1,) * (w.ndim - 1)) if stacked(name) else True
    out[name] = total.astype(w.dtype) if all(inside) else jnp.where(keep, total.astype(w.dtype), w)
  return out


def network(plan: Plan, parts: Parts, coefficients: Any) -> Any:
  """Form all parameters of the merged network.

  Args:
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.

  Returns:
    Nested parameters.
  """
  return paths.nest({**parts.rest, **merge(plan, parts, coefficients)})


def put(m: model_lib.Model, plan: Plan, parts: Parts, coefficients: Any) -> model_lib.Model:
  """Write a merge into the base.

  Args:
    m: the base.
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.

  Returns:
    The merged model; leaves that are not chosen are the base's own.
  """
  flat = dict(paths.walk(m.params))
  some = {}
  for name, w in _merged(plan, parts, coefficients).items():
    inside = dict(plan.chosen)[name]
    if all(inside):
      flat[name] = programs.like(w, flat[name]) if not _traced(w) else w
    else:
      names = addresses(name)
      some |= {a: paths.take(w, i) for i, a in enumerate(names) if inside[i]}
  return m.replace(params=paths.nest(flat)).update(some)


def by_address(plan: Plan, coefficients: Any) -> dict[str, list[Any]]:
  """List coefficients by address.

  Args:
    plan: what is static.
    coefficients: concrete, shaped like those of `start`.

  Returns:
    Address to one number a donor, or one list of numbers a donor where there are blocks.

  Example:
    >>> plan = Plan(None, "task", 0, (("w", (True,)),))
    >>> by_address(plan, np.array([0.25, 0.5]))
    {'w': [0.25, 0.5]}
  """
  out = {}
  host = jax.tree.map(np.asarray, coefficients)
  for name, inside in plan.chosen:
    for j, address in enumerate(addresses(name)):
      if inside[j]:
        out[address] = _pick(plan, name, host, slice(None), j).tolist()
  return out


def learnable(m: model_lib.Model, batches: Any) -> bool:
  """Tell whether there is anything to learn from; a dry run has no batches.

  Args:
    m: the base.
    batches: what was brought.

  Returns:
    False only while shapes are traced without data.

  Raises:
    ValueError: if there is no batch though the model is real.
  """
  if batches:
    return True
  if any(_traced(x) for x in jax.tree.leaves(m.params)):
    return False
  raise ValueError("there is no batch to learn from")


def abreast(lists: Sequence[Iterable[Any]]) -> list[tuple[Any, ...]]:
  """Take one batch of each donor at a time, shorter lists over again.

  Args:
    lists: each donor's batches.

  Returns:
    Tuples of batches, as many as the longest list has.

  Example:
    >>> abreast([[1, 2, 3], [4]])
    [(1, 4), (2, 4), (3, 4)]
  """
  each = [list(x) for x in lists]
  if not each or not all(each):
    return []
  return [tuple(x[i % len(x)] for x in each) for i in range(max(map(len, each)))]


def learned(
  m: model_lib.Model, plan: Plan, parts: Parts, coefficients: Any, losses: np.ndarray
) -> model_lib.Model:
  """Write a learned merge into the base and note what was learned.

  Args:
    m: the base.
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.
    losses: before each step.

  Returns:
    The model; `aux["coefficients"]` holds them by address, `aux["notes"]` how it went.
  """
  new = put(m, plan, parts, coefficients)
  if any(_traced(x) for x in jax.tree.leaves((coefficients, new.params))):
    return new
  found = by_address(plan, coefficients)
  size = sum(x.size for x in jax.tree.leaves(coefficients))
  note: dict[str, Any] = {"trainable": size, "steps": len(losses)}
  if len(losses):
    note |= {"first_loss": float(losses[0]), "last_loss": float(losses[-1])}
  if size <= _NOTED:
    note["coefficients"] = coefficients_of_note(plan, coefficients, found)
  old = dict(m.aux.get("notes", {}))
  return new.replace(aux={**m.aux, "notes": {**old, **note}, "coefficients": found})


def coefficients_of_note(plan: Plan, coefficients: Any, found: Mapping[str, Any]) -> Any:
  """Write coefficients in the shortest way.

  Args:
    plan: what is static.
    coefficients: concrete.
    found: from `by_address`.

  Returns:
    One number a donor where that is all, otherwise `found`.
  """
  return np.asarray(coefficients).tolist() if plan.granularity == "task" else dict(found)


def stacked(name: str) -> bool:
  """Tell whether a stored leaf holds a segment of layers.

  Args:
    name: its name as stored.

  Returns:
    Whether it has a leading layer axis.

  Example:
    >>> stacked("layers/0:2/mlp/up/kernel"), stacked("final_norm/scale")
    (True, False)
  """
  parts = name.split("/")
  return parts[0] == "layers" and len(parts) > 1 and ":" in parts[1]


def addresses(name: str) -> list[str]:
  """List the addresses that a stored leaf holds.

  Args:
    name: its name as stored.

  Returns:
    One address a layer, or the name itself.

  Example:
    >>> addresses("layers/1:3/w")
    ['layers/1/w', 'layers/2/w']
  """
  if not stacked(name):
    return [name]
  suffix = name.split("/", 2)[2]
  return [f"layers/{i}/{suffix}" for i in range(*_segment(name))]


@functools.partial(jax.jit, static_argnums=0)
def _merged(plan: Plan, parts: Parts, coefficients: Any) -> Flat:
  return merge(plan, parts, coefficients)


def _spread(
  plan: Plan, name: str, coefficients: Any, donor: int, shape: tuple[int, ...]
) -> jax.Array:
  """Shape a donor's coefficients so that they multiply the stored array."""
  c = _pick(plan, name, coefficients, donor, slice(None))
  depth = 1 if stacked(name) and plan.granularity != "task" else 0
  if plan.blocks > 1:
    keys = [jax.random.key(zlib.crc32(a.encode())) for a in addresses(name)]
    if not depth:
      return c[jax.random.randint(keys[0], shape, 0, plan.blocks)]
    draw = jax.vmap(lambda k, row: row[jax.random.randint(k, shape[1:], 0, plan.blocks)])
    return draw(jnp.stack(keys), c)
  return c.reshape(c.shape + (1,) * (len(shape) - depth))


def _pick(plan: Plan, name: str, coefficients: Any, donor: Any, layer: Any) -> Any:
  """Look coefficients of a stored leaf up; `layer` counts within its segment."""
  if plan.granularity == "task":
    return coefficients[donor]
  if plan.granularity == "layer":
    if not stacked(name):
      return coefficients["rest"][donor]
    first, stop = _segment(name)
    return coefficients["layers"][:, first:stop][donor][..., layer]
  c = coefficients[name]
  if not stacked(name):
    return c[donor]
  if isinstance(donor, slice):
    return c[:, layer]
  return c[donor][layer]


def _whole(donors: Mapping[str, tuple[Any, ...]]) -> list[model_lib.Model]:
  """List the donors if they are models in memory, whose stacked leaves can be used as they are."""
  sources = donors.sources if isinstance(donors, needs_lib.Aligned) else ()
  fine = [type(s) is model_lib.Model for s in sources]
  return [s for s in sources if isinstance(s, model_lib.Model)] if fine and all(fine) else []


def _column(
  name: str, w: Any, donors: Mapping[str, tuple[Any, ...]], stored: Sequence[Mapping[str, Any]]
) -> list[Any]:
  if stored and all(name in s and s[name].shape == w.shape for s in stored):
    return [s[name] for s in stored]
  rows = [[leaves.dense(d) for d in donors[a]] for a in addresses(name)]
  if not stacked(name):
    return rows[0]
  return [paths.stack(column) for column in zip(*rows, strict=True)]


def _segment(name: str) -> tuple[int, int]:
  first, stop = name.split("/")[1].split(":")
  return int(first), int(stop)


def _traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)
