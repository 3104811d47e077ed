# SPDX-License-Identifier: Apache-2.0
"""The weights of a merge: one for each merged model, ones when none are given."""

import math
from collections.abc import Sequence
from typing import Any


def resolve(weights: Sequence[Any] | None, count: int, *, of: str) -> tuple[Any, ...]:
  """Fill in and check a merge's weights.

  Args:
    weights: one number a model, of any sign, or None for ones; numbers may be traced.
    count: number of models.
    of: whose weights they are, for the message.

  Returns:
    `count` numbers.

  Raises:
    ValueError: for a wrong number of weights, or one that is not finite.

  Example:
    >>> resolve(None, 2, of="donors")
    (1.0, 1.0)
  """
  if count < 1:
    raise ValueError(f"a merge needs at least one model among the {of}; give models or donors")
  if weights is None:
    return (1.0,) * count
  if len(weights) != count:
    raise ValueError(f"weights={tuple(weights)} has {len(weights)} entries for {count} {of}")
  plain = [w for w in weights if isinstance(w, int | float)]
  if not all(math.isfinite(w) for w in plain):
    raise ValueError(f"weights={tuple(weights)} must be finite numbers")
  return tuple(float(w) if isinstance(w, int | float) else w for w in weights)


def check(donors: int, *, weights: Sequence[float] | None, **rest: Any) -> None:
  """Check weights of donors as plain numbers, before they are traced; for `step.over_leaves`.

  Args:
    donors: number of donors.
    weights: one number a donor, or None.
    **rest: other hyper-parameters, not looked at.

  Raises:
    ValueError: as `resolve`.

  Example:
    >>> check(2, weights=(0.5, 0.5))
  """
  del rest
  resolve(weights, donors, of="donors")
