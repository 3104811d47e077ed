# SPDX-License-Identifier: Apache-2.0
"""What learned merges do with models: line them up before, write and note the outcome after.

The merge between the two is `mixture`'s, of arrays alone.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from treesurgeon.core import leaves, meshes, paths, programs, step
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs as needs_lib
from treesurgeon.merge import mixture

_NOTED = 10_000  # coefficients that a lineage still records


def gather(
  m: model_lib.Model,
  donors: Mapping[str, tuple[Any, ...]],
  pattern: str,
  *,
  granularity: str,
  blocks: int = 1,
  option: Any = None,
) -> tuple[mixture.Plan, mixture.Parts]:
  """Line up a base and its donors as they are stored.

  Args:
    m: the base.
    donors: address to the donors' leaves.
    pattern: regular expression over addresses: what is merged.
    granularity: "task", "layer" or "tensor".
    blocks: random blocks a tensor.
    option: see `mixture.Plan`.

  Returns:
    What is static, and the arrays.

  Raises:
    ValueError: for donors of other shapes.

  Example:
    >>> m = model_lib.Model(None, {"w": np.zeros(2, np.float32)})
    >>> plan, parts = gather(m, {"w": (np.ones(2),)}, ".*", granularity="task")
    >>> mixture.merge(plan, parts, mixture.start(plan, 1, 0.5))["w"].tolist()
    [0.5, 0.5]
  """
  base, rest, chosen, columns = {}, {}, [], []
  stored = [paths.walk(s.params) for s in _whole(donors)]
  for name, leaf in paths.walk(m.params).items():
    inside = tuple(bool(re.fullmatch(pattern, a)) for a in mixture.addresses(name))
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
  plan = mixture.Plan(m.spec, granularity, depth, tuple(chosen), blocks, option)
  return plan, mixture.Parts(base, each, rest)


def put(
  m: model_lib.Model, plan: mixture.Plan, parts: mixture.Parts, coefficients: Any
) -> model_lib.Model:
  """Write a merge into the base.

  Args:
    m: the base.
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `mixture.start`.

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
      names = mixture.addresses(name)
      some |= {a: paths.take(w, i) for i, a in enumerate(names) if inside[i]}
  return m.replace(params=paths.nest(flat)).update(some)


def by_address(plan: mixture.Plan, coefficients: Any) -> dict[str, list[Any]]:
  """List coefficients by address.

  Args:
    plan: what is static.
    coefficients: concrete, shaped like those of `mixture.start`.

  Returns:
    Address to one number a donor, or one list of numbers a donor where there are blocks.

  Example:
    >>> plan = mixture.Plan(None, "task", 0, (("w", (True,)),))
    >>> by_address(plan, np.array([0.25, 0.5]))
    {'w': [0.25, 0.5]}
  """
  out = {}
  host = jax.tree.map(np.asarray, coefficients)
  for name, inside in plan.chosen:
    for j, address in enumerate(mixture.addresses(name)):
      if inside[j]:
        out[address] = mixture.pick(plan, name, host, slice(None), j).tolist()
  return out


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
  m: model_lib.Model,
  plan: mixture.Plan,
  parts: mixture.Parts,
  coefficients: Any,
  losses: np.ndarray,
) -> model_lib.Model:
  """Write a learned merge into the base and note what was learned.

  Args:
    m: the base.
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `mixture.start`.
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


def coefficients_of_note(plan: mixture.Plan, coefficients: Any, found: Mapping[str, Any]) -> Any:
  """Write coefficients in the shortest way.

  Args:
    plan: what is static.
    coefficients: concrete.
    found: from `by_address`.

  Returns:
    One number a donor where that is all, otherwise `found`.
  """
  return np.asarray(coefficients).tolist() if plan.granularity == "task" else dict(found)


@functools.partial(jax.jit, static_argnums=0)
def _merged(plan: mixture.Plan, parts: mixture.Parts, coefficients: Any) -> mixture.Flat:
  return mixture.merge(plan, parts, coefficients)


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
  rows = [[leaves.dense(d) for d in donors[a]] for a in mixture.addresses(name)]
  if not mixture.stacked(name):
    return rows[0]
  return [paths.stack(column) for column in zip(*rows, strict=True)]


def _traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)
