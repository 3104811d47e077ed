# SPDX-License-Identifier: Apache-2.0
"""Search a transform's numbers by evolution: for any registered method, any evaluator.

Akiba et al., "Evolutionary optimization of model merging recipes", 2024 (arXiv 2403.13187), in the
space of parameters. Candidates differ in numbers that a step hands to its program as data (its
knobs), so all of them run the programs of the first. Evidence is gathered once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from treesurgeon.core import meshes, needs, step
from treesurgeon.core import model as model_lib
from treesurgeon.merge import search as search_lib
from treesurgeon.run import collect, drivers


class Outcome(NamedTuple):
  """Hold what a search found.

  Attributes:
    arguments: the best numbers, by argument.
    transform: the transform with them.
    model: what it makes, with lineage.
    value: the evaluator's verdict on it.
    values: of all candidates, the start's first.
  """

  arguments: dict[str, Any]
  transform: step.Transform
  model: model_lib.Model
  value: float
  values: list[float]


def search(
  template: Callable[..., step.Transform],
  bounds: Mapping[str, Sequence[Any]],
  evaluator: Callable[[model_lib.Model], float],
  model: model_lib.Model,
  materials: collect.Materials | None = None,
  *,
  budget: int,
  start: Mapping[str, Any] | None = None,
  seed: int = 0,
  sigma: float = 0.25,
  history: str | os.PathLike[str] | None = None,
) -> Outcome:
  """Search for the numbers at which a transform makes the best model.

  Args:
    template: a factory, such as `registry.load("merge.ties")` with some arguments bound, that
      takes the numbers by name.
    bounds: for each argument (low, high), or several such pairs for an argument that is a tuple.
    evaluator: model -> value, less is better.
    model: the model that candidates are made from.
    materials: batches, donors and requests.
    budget: how many candidates, the start included.
    start: where to begin, by argument; None, or what it leaves out, is the middle.
    seed: of the search and of the steps.
    sigma: first spread, relative to the bounds.
    history: JSONL file that keeps all candidates; given again it resumes a search broken off.

  Returns:
    The best candidate, which is never worse than the start.

  Raises:
    ValueError: for bounds that are empty or out of order, a start without a bound, and as `run`.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon import registry
    >>> base, donor = (model_lib.Model(None, {"w": jnp.full(2, x)}) for x in (0.0, 1.0))
    >>> found = search(
    ...   registry.load("merge.task_arithmetic"), {"lam": (0.0, 1.0)},
    ...   lambda m: float((m.leaf("w")[0] - 0.7) ** 2), base, collect.Materials(donors=[donor]),
    ...   budget=60)
    >>> round(found.arguments["lam"], 1)
    0.7
  """
  names, low, high, shapes = _layout(bounds)
  first = _first(names, low, high, shapes, start or {})
  materials = materials or collect.Materials()
  mesh = meshes.explicit_mesh(model.params)
  flat = model.replace(params=meshes.to_auto(model.params))
  gathered: list[tuple[Any, needs.Evidence]] = []

  def build(x: np.ndarray) -> tuple[dict[str, Any], step.Transform]:
    arguments = _arguments(names, shapes, x)
    return arguments, template(**arguments)

  def value_of(x: np.ndarray) -> float:
    _, transform = build(x)
    if len(transform) != 1 or transform[0].scope == "block":
      go = drivers.run_blockwise if any(s.scope == "block" for s in transform) else drivers.run
      return evaluator(go(transform, model, materials, seed=seed))
    (one,) = transform
    if not gathered or gathered[0][0] != one.needs:
      gathered[:] = [(one.needs, collect.evidence(one, flat, materials))]
    key = jax.random.fold_in(jax.random.key(seed), 0)
    made = one.apply(flat, gathered[0][1], key)
    return evaluator(made.replace(params=meshes.to_explicit(made.params, mesh)))

  found = search_lib.minimize(
    value_of, start=first, low=low, high=high, budget=budget, seed=seed, sigma=sigma,
    history=history,
  )  # fmt: skip
  arguments, transform = build(found.x)
  go = drivers.run_blockwise if any(s.scope == "block" for s in transform) else drivers.run
  best = go(transform, model, materials, seed=seed)
  return Outcome(arguments, transform, best, found.value, found.values)


def _layout(
  bounds: Mapping[str, Sequence[Any]],
) -> tuple[list[str], list[float], list[float], dict[str, int | None]]:
  """Return (argument of each coordinate, lows, highs, size of each tuple or None)."""
  names: list[str] = []
  low: list[float] = []
  high: list[float] = []
  shapes: dict[str, int | None] = {}
  for name, bound in bounds.items():
    single = len(bound) == 2 and all(isinstance(b, int | float) for b in bound)
    pairs: Any = [bound] if single else bound
    shapes[name] = None if single else len(pairs)
    for pair in pairs:
      if not isinstance(pair, Sequence) or len(pair) != 2 or not pair[0] <= pair[1]:
        raise ValueError(f"bounds of {name!r}: {pair!r} must be (low, high)")
      names.append(name)
      low.append(float(pair[0]))
      high.append(float(pair[1]))
  if not names:
    raise ValueError("bounds name no argument to search for, like {'lam': (0.0, 1.0)}")
  return names, low, high, shapes


def _first(
  names: Sequence[str],
  low: Sequence[float],
  high: Sequence[float],
  shapes: Mapping[str, int | None],
  start: Mapping[str, Any],
) -> list[float]:
  odd = sorted(set(start) - set(shapes))
  if odd:
    raise ValueError(f"start names {odd[0]!r}, which has no bounds: {', '.join(shapes)}")
  left = {n: [float(v) for v in np.ravel(start[n])] for n in start}
  for name, given in left.items():
    if len(given) != (shapes[name] or 1):
      raise ValueError(f"start of {name!r} has {len(given)} numbers, its bounds {shapes[name]}")
  return [
    left[n].pop(0) if n in left else (a + b) / 2 for n, a, b in zip(names, low, high, strict=True)
  ]


def _arguments(
  names: Sequence[str], shapes: Mapping[str, int | None], x: np.ndarray
) -> dict[str, Any]:
  found: dict[str, list[float]] = {n: [] for n in shapes}
  for name, value in zip(names, x, strict=True):
    found[name].append(float(value))
  return {n: v[0] if shapes[n] is None else tuple(v) for n, v in found.items()}
