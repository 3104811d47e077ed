# SPDX-License-Identifier: Apache-2.0
"""Search a box of numbers for the least of a function that has no gradient, by CMA-ES.

Hansen, "The CMA evolution strategy: a tutorial", 2016 (arXiv 1604.00772), in the implementation of
the package `cmaes`. The box is scaled to the unit cube. The start is tried first and is the
incumbent, so that the outcome is never worse. Everything follows from the seed: a search that was
broken off is resumed by running it again with its history, whose values are not computed anew.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cmaes
import numpy as np
from jaxtyping import Float

_WORST = 1e30  # what a candidate without a finite value is ranked by


class Found(NamedTuple):
  """Hold the outcome of a search.

  Attributes:
    x: the best point.
    value: its value.
    values: all values, the start's first.
  """

  x: Float[np.ndarray, " n"]
  value: float
  values: list[float]


def minimize(
  fn: Callable[[np.ndarray], float],
  *,
  start: Sequence[float] | np.ndarray,
  low: Sequence[float] | np.ndarray,
  high: Sequence[float] | np.ndarray,
  budget: int,
  seed: int = 0,
  sigma: float = 0.25,
  population: int | None = None,
  history: str | os.PathLike[str] | None = None,
) -> Found:
  """Search for the point of a box where a function is least.

  Args:
    fn: point (n,) -> value; one that is not finite counts as worst.
    start: where to begin; tried first.
    low: least coordinates.
    high: largest coordinates.
    budget: how many points to try, the start included.
    seed: of the search.
    sigma: first spread, relative to the box.
    population: points a generation; None lets the dimension tell.
    history: JSONL file to append each point and value to; what it holds already is not tried again.

  Returns:
    The best point and all values.

  Raises:
    ValueError: for a box that is empty or does not hold the start, a budget below 1, or a history
      of another search.

  Example:
    >>> found = minimize(lambda x: (x[0] - 0.3) ** 2, start=[1.0], low=[0.0], high=[2.0], budget=60)
    >>> bool(abs(found.x[0] - 0.3) < 0.05)
    True
  """
  first, least, most = (np.asarray(x, np.float64) for x in (start, low, high))
  _check(first, least, most, budget, sigma)
  known = _read(history)
  values: list[float] = []
  best, best_value = first, math.inf

  def value_of(x: np.ndarray) -> float:
    nonlocal best, best_value
    i = len(values)
    if i < len(known):
      if not np.allclose(known[i][0], x, rtol=0, atol=1e-9):
        raise ValueError(
          f"history={str(history)!r}: trial {i} is another point than this search tries; it was "
          "made with other settings"
        )
      value = known[i][1]
    else:
      value = float(fn(x))
      value = value if math.isfinite(value) else math.inf
      _append(history, i, x, value)
    values.append(value)
    if value < best_value or i == 0:
      best, best_value = x, value
    return min(value, _WORST)

  value_of(first)
  wide = np.where(most > least, most - least, 1.0)
  n = max(2, first.size)  # the package needs two dimensions; one more is without effect

  def pad(x: np.ndarray, fill: float) -> np.ndarray:
    return np.pad(x, (0, n - x.size), constant_values=fill)

  edges = np.stack([np.zeros(n), pad((most > least).astype(float), 1.0)], axis=1)
  edges[:, 1] = np.maximum(edges[:, 1], 1e-9)
  strategy = cmaes.CMA(
    mean=np.clip(pad((first - least) / wide, 0.5), edges[:, 0], edges[:, 1]),
    sigma=sigma,
    bounds=edges,
    seed=seed,
    population_size=population,
  )
  while len(values) < budget and not strategy.should_stop():
    told = []
    for _ in range(strategy.population_size):
      if len(values) == budget:
        break
      u = strategy.ask()
      x = np.clip(least + wide * u[: first.size], least, most)
      told.append((u, value_of(x)))
    if len(told) == strategy.population_size:
      strategy.tell(told)
  return Found(best, best_value, values)


def _check(
  first: np.ndarray, least: np.ndarray, most: np.ndarray, budget: int, sigma: float
) -> None:
  if not first.size or first.shape != least.shape or first.shape != most.shape:
    raise ValueError(
      f"start, low and high have {first.size}, {least.size} and {most.size} numbers; give as many "
      "of each, at least one"
    )
  for i in range(first.size):
    if not (np.isfinite([least[i], most[i]]).all() and least[i] <= first[i] <= most[i]):
      raise ValueError(f"coordinate {i} starts at {first[i]}, outside {least[i]} to {most[i]}")
  if budget < 1 or sigma <= 0:
    raise ValueError(f"budget={budget} must be at least 1 and sigma={sigma} above 0")


def _read(history: Any) -> list[tuple[list[float], float]]:
  if history is None or not pathlib.Path(history).exists():
    return []
  found = []
  for line in pathlib.Path(history).read_text(encoding="utf-8").splitlines():
    try:
      held = json.loads(line)
      value = math.inf if held["value"] is None else float(held["value"])
      found.append(([float(v) for v in held["x"]], value))
    except (ValueError, KeyError, TypeError):
      break  # a line that a kill cut short, and what may follow
  return found


def _append(history: Any, trial: int, x: np.ndarray, value: float) -> None:
  if history is None:
    return
  path = pathlib.Path(history)
  held = {"trial": trial, "x": x.tolist(), "value": value if math.isfinite(value) else None}
  lines = path.read_text(encoding="utf-8").splitlines()[:trial] if path.exists() else []
  if path.exists() and len(lines) == trial and path.read_text(encoding="utf-8").endswith("\n"):
    with path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(held) + "\n")
  else:
    path.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(held)]), encoding="utf-8")
