# SPDX-License-Identifier: Apache-2.0
"""The weights of a merge, and other numbers that may be one for each merged model."""

import math
from collections.abc import Sequence
from typing import Any

from treesurgeon.core import varied


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
  """Check weights of donors as plain numbers, before they are traced; for `lifting.over_leaves`.

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


def check_task(donors: int, *, task: int, weights: Sequence[float] | None, **rest: Any) -> None:
  """Check a donor's index too, for methods that serve one donor; for `lifting.over_leaves`.

  Args:
    donors: number of donors.
    task: index of a donor.
    weights: one number a donor, or None.
    **rest: other hyper-parameters, not looked at.

  Raises:
    ValueError: as `resolve`, and for an index that no donor has.

  Example:
    >>> check_task(2, task=1, weights=None)
  """
  check(donors, weights=weights, **rest)
  if not 0 <= task < donors:
    raise ValueError(f"task={task}: there are {donors} donors; valid: 0 to {donors - 1}")


def each(value: Any, count: int, *, name: str, of: str = "donors") -> tuple[Any, ...]:
  """Give every model its number of a hyper-parameter that may be one for all.

  Args:
    value: a number, or a tuple of one a model; numbers may be traced.
    count: number of models.
    name: the hyper-parameter's name, for the message.
    of: whose numbers they are, for the message.

  Returns:
    `count` numbers.

  Raises:
    ValueError: for a wrong number of numbers.

  Example:
    >>> each(0.5, 2, name="density")
    (0.5, 0.5)
  """
  if not isinstance(value, tuple | list):
    return (value,) * count
  if len(value) != count:
    raise ValueError(f"{name}={tuple(value)} has {len(value)} entries for {count} {of}")
  return tuple(value)


def check_shares(value: Any, *, name: str) -> None:
  """Refuse fractions outside 0 to 1 wherever a hyper-parameter has them.

  Args:
    value: a fraction; rules of `varied`; or a tuple of these, one a model.
    name: the hyper-parameter's name, for the message.

  Raises:
    ValueError: naming the hyper-parameter and what it is.

  Example:
    >>> check_shares((0.0, 1.0), name="density")
  """
  if not all(0 <= share <= 1 for share in varied.values(value)):
    raise ValueError(f"{name}={value} must lie between 0 and 1")
