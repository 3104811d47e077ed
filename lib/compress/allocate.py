# SPDX-License-Identifier: Apache-2.0
"""Allocate a budget: one choice for each item, least total loss, total cost within the budget.

What mixed precision comes down to, whatever is allocated: the items are leaves or groups of leaves,
the choices formats, the cost bytes or time, the loss measured or estimated. This is the
multiple-choice knapsack problem, solved exactly (to a millionth of the loss) as an integer program
by HiGHS, through `scipy.optimize.milp`.
"""

from collections.abc import Sequence

import numpy as np

GAP = 1e-6  # of the loss, at which the search ends


def solve(
  costs: Sequence[Sequence[float]],
  losses: Sequence[Sequence[float]],
  budget: float,
  *,
  unit: str = "bytes",
) -> list[int]:
  """Choose one option for every item.

  Args:
    costs: of every option of every item, such as bytes; whole numbers up to 2^53 or reals.
    losses: likewise.
    budget: what the chosen costs may add up to.
    unit: of the costs, for messages.

  Returns:
    The index of each item's option.

  Raises:
    ValueError: if the budget cannot be met, or costs and losses do not pair up or are not finite.

  Example:
    >>> solve([[1, 2], [1, 2]], [[5.0, 0.0], [9.0, 1.0]], 3)
    [0, 1]
  """
  for i, (c, x) in enumerate(zip(costs, losses, strict=True)):
    if not len(c) or len(c) != len(x):
      raise ValueError(
        f"item {i} has {len(c)} costs and {len(x)} losses; it needs as many, and one"
      )
    if not np.isfinite([*c, *x]).all():
      raise ValueError(f"item {i} has a cost or a loss that is not finite")
  least = sum(min(c) for c in costs)
  if least > budget:
    raise ValueError(
      f"a budget of {_number(budget)} {unit} cannot be met; the smallest possible is "
      f"{_number(least)}"
    )
  kept = [_undominated(c, x) for c, x in zip(costs, losses, strict=True)]
  limit = budget
  while True:
    picks = _program(costs, losses, kept, limit)
    total = sum(c[i] for c, i in zip(costs, picks, strict=True))
    if total <= budget:
      return picks
    limit -= 2 * (total - budget)  # the solver's tolerance let it go over


def _undominated(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
  """List options that no other beats in cost and loss alike, cheapest first."""
  best, kept = np.inf, []
  for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
    if losses[i] < best:
      best = losses[i]
      kept.append(i)
  return kept


def _program(
  costs: Sequence[Sequence[float]],
  losses: Sequence[Sequence[float]],
  kept: Sequence[Sequence[int]],
  limit: float,
) -> list[int]:
  from scipy import optimize, sparse  # slow to import, and few need it

  if sum(c[k[-1]] for c, k in zip(costs, kept, strict=True)) <= limit:
    return [k[-1] for k in kept]
  cheapest = [k[0] for k in kept]
  if sum(c[i] for c, i in zip(costs, cheapest, strict=True)) >= limit:
    return cheapest
  # In what an option costs more than the cheapest and loses more than the best, for precision.
  cost = np.array([c[i] - c[k[0]] for c, k in zip(costs, kept, strict=True) for i in k], float)
  loss = np.array([x[i] - x[k[-1]] for x, k in zip(losses, kept, strict=True) for i in k], float)
  room = limit - sum(c[i] for c, i in zip(costs, cheapest, strict=True))
  item = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
  one_each = sparse.csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
  found = optimize.milp(
    loss / max(loss.max(), np.finfo(float).tiny),
    integrality=np.ones(len(item)),
    bounds=optimize.Bounds(0, 1),
    constraints=[
      optimize.LinearConstraint(one_each, 1, 1),
      optimize.LinearConstraint(cost[None] / room, -np.inf, 1),
    ],
    options={"mip_rel_gap": GAP},
  )
  if found.x is None:
    raise RuntimeError(f"the integer program has no solution: {found.message}")
  return [k[int(np.argmax(found.x[item == n]))] for n, k in enumerate(kept)]


def _number(x: float) -> str:
  return f"{int(x):,}" if float(x).is_integer() else f"{x:g}"
