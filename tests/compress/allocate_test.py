# SPDX-License-Identifier: Apache-2.0
"""Allocation to a budget: brute force, and budgets that cannot be met."""

import itertools

import numpy as np
import pytest

from treesurgeon.compress import allocate


def problem(seed, items=5, options=4):
  rng = np.random.default_rng(seed)
  costs = rng.integers(1, 10**9, (items, options)).tolist()
  losses = rng.lognormal(0, 3, (items, options)).tolist()
  return costs, losses


def best(costs, losses, budget):
  found = np.inf
  for picks in itertools.product(*(range(len(c)) for c in costs)):
    if sum(c[i] for c, i in zip(costs, picks, strict=True)) <= budget:
      found = min(found, sum(x[i] for x, i in zip(losses, picks, strict=True)))
  return found


@pytest.mark.parametrize("seed", range(12))
def test_brute_force(seed):
  costs, losses = problem(seed)
  least, most = sum(map(min, costs)), sum(map(max, costs))
  for share in (0.0, 0.1, 0.4, 0.8, 1.0):
    budget = least + int(share * (most - least))
    picks = allocate.solve(costs, losses, budget)
    assert sum(c[i] for c, i in zip(costs, picks, strict=True)) <= budget
    total = sum(x[i] for x, i in zip(losses, picks, strict=True))
    assert total == pytest.approx(best(costs, losses, budget), rel=2e-6)


def test_items_differ_in_their_number_of_options():
  assert allocate.solve([[3], [1, 2, 9]], [[0.0], [2.0, 1.0, 0.0]], 5) == [0, 1]
  assert allocate.solve([[3], [1, 2, 9]], [[0.0], [2.0, 1.0, 0.0]], 12) == [0, 2]
  assert allocate.solve([[3.5], [1.25, 2.0]], [[0.0], [2.0, 2.0]], 100, unit="ms") == [0, 0]


def test_a_budget_that_is_met_to_the_byte_is_kept_to_the_byte():
  costs = [[10**12, 10**12 + 1]] * 3
  losses = [[1.0, 0.0]] * 3
  for extra in range(4):
    picks = allocate.solve(costs, losses, 3 * 10**12 + extra)
    assert sum(picks) == extra


def test_what_cannot_be_solved_is_told():
  with pytest.raises(ValueError, match=r"9 bytes cannot be met; the smallest possible is 10"):
    allocate.solve([[5, 6], [5, 7]], [[1.0, 0.0], [1.0, 0.0]], 9)
  with pytest.raises(ValueError, match=r"1.5 ms cannot be met; the smallest possible is 2"):
    allocate.solve([[2.0]], [[1.0]], 1.5, unit="ms")
  with pytest.raises(ValueError, match="item 1 has 1 costs and 2 losses"):
    allocate.solve([[5], [5]], [[1.0], [1.0, 0.0]], 9)
  with pytest.raises(ValueError, match="item 0 has a cost or a loss that is not finite"):
    allocate.solve([[5]], [[float("nan")]], 9)
