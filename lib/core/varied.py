# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters that vary over a model: one value, or the first matching of several rules.

Wherever a method's argument is annotated `Varied`, a tuple of (regular expression over addresses,
value) pairs may stand for the number: `alpha=(("layers/[0-3]/.*", 0.2), (".*", 0.8))`. A tuple of
values, one a model, may hold such rules in the place of any of them.
"""

import functools
import re
from typing import Any

Varied = float | tuple[tuple[str, float], ...]


def at(value: Any, address: str) -> Any:
  """Return what a hyper-parameter is at one address.

  Args:
    value: a value; rules; or a tuple of these, one a model.
    address: a leaf's address.

  Returns:
    The value with every set of rules replaced by that of its first matching rule.

  Raises:
    ValueError: if no rule matches.

  Example:
    >>> at((1.0, (("a/.*", 0.25), (".*", 0.5))), "a/kernel")
    (1.0, 0.25)
  """
  if not isinstance(value, tuple):
    return value
  if not is_rules(value):
    return tuple(at(v, address) for v in value)
  for pattern, inner in value:
    if _compiled(pattern).fullmatch(address):
      return inner
  raise ValueError(
    f"{address}: none of the rules {', '.join(repr(p) for p, _ in value)} matches it; "
    "end with a rule for '.*'"
  )


def is_rules(value: Any) -> bool:
  """Tell rules from a tuple of values.

  Args:
    value: a hyper-parameter.

  Returns:
    Whether it is a non-empty tuple of (string, value) pairs.

  Example:
    >>> is_rules(((".*", 1.0),)), is_rules((1.0, 2.0)), is_rules(())
    (True, False, False)
  """
  return (
    isinstance(value, tuple)
    and bool(value)
    and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value)
  )


def values(value: Any) -> list[Any]:
  """List every number that a hyper-parameter takes anywhere, to check its range.

  Args:
    value: a value; rules; or a tuple of these.

  Returns:
    The values.

  Example:
    >>> values((1.0, (("a", 0.25), (".*", 0.5))))
    [1.0, 0.25, 0.5]
  """
  if is_rules(value):
    return [inner for _, inner in value]
  if isinstance(value, tuple):
    return [x for v in value for x in values(v)]
  return [value]


@functools.lru_cache(maxsize=1 << 16)  # a gradient over a deep model has more than `re` keeps
def _compiled(pattern: str) -> re.Pattern[str]:
  return re.compile(pattern)
