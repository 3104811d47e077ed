# SPDX-License-Identifier: Apache-2.0
"""The weights of a merge: one for each merged model, ones when none are given."""

import math
from collections.abc import Sequence


def resolve(weights: Sequence[float] | None, count: int, *, of: str) -> tuple[float, ...]:
  """Fill in and check a merge's weights.

  Args:
    weights: one number a model, of any sign, or None for ones.
    count: number of models.
    of: whose weights they are, for the message.

  Returns:
    `count` floats.

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
  if not all(math.isfinite(w) for w in weights):
    raise ValueError(f"weights={tuple(weights)} must be finite numbers")
  return tuple(float(w) for w in weights)


def freeze(values: Sequence[float] | float | None) -> tuple[float, ...] | float | None:
  """Make a list of numbers hashable, so that it can key a compiled program.

  Args:
    values: numbers, one number, or None.

  Returns:
    A tuple in place of a list.

  Example:
    >>> freeze([0.5, 0.5]), freeze(1.0)
    ((0.5, 0.5), 1.0)
  """
  return tuple(values) if isinstance(values, Sequence) else values
