# SPDX-License-Identifier: Apache-2.0
"""mergekit's parameters: numbers, gradients over layers and filters on names, tensor by tensor.

A setting is a scalar; a list of scalars, read as a gradient over a slice's layers; or a list of
{filter, value}, of which the first counts whose filter is part of the tensor's name. What a setting
says of every tensor becomes rules of `core.varied`, written over the fewest names that tell the
values apart.
"""

import collections
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

_TRUE, _FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")


def evaluate(setting: Any, name: str, t: float, read: Callable[[Any], Any]) -> Any:
  """Find what a setting says of one tensor.

  Args:
    setting: scalar, gradient, or list of {filter, value}.
    name: the tensor's name.
    t: where its layer lies in the slice, 0 to 1; 0 outside the layers.
    read: checks and converts one scalar.

  Returns:
    The value, interpolated linearly if it is a number, else that of the gradient's step; None
    where no filter matches.

  Raises:
    ValueError: for anything else.

  Example:
    >>> evaluate([0, 1], "h.0.w", 0.25, float)
    0.25
    >>> evaluate([{"filter": "v", "value": 2}], "h.0.w", 0.25, float)  # None
  """
  if isinstance(setting, Mapping):
    setting = [setting]
  if not isinstance(setting, list):
    return read(setting)
  if not any(isinstance(item, Mapping | list) for item in setting):
    return _along([read(item) for item in setting], t, read)
  for item in setting:
    if not isinstance(item, Mapping) or "value" not in item or set(item) - {"value", "filter"}:
      raise ValueError(f"{item!r} must be a mapping of 'value' and, except in the last, 'filter'")
    part = item.get("filter")
    if part is not None and not isinstance(part, str):
      raise ValueError(f"filter={part!r} must be a part of tensors' names")
    if part is None or part == "*" or part in name:
      return evaluate(item["value"], name, t, read)
  return None


def number(value: Any) -> float:
  """Read a number; YAML takes 1e-5 for text.

  Args:
    value: a scalar of the file.

  Returns:
    The number.

  Raises:
    ValueError: if it is none.

  Example:
    >>> number("1e-5"), number(1)
    (1e-05, 1.0)
  """
  try:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
      return float(value)
  except ValueError:
    pass
  raise ValueError(f"{value!r} is not a number")


def integer(value: Any) -> int:
  """Read a whole number.

  Args:
    value: a scalar of the file.

  Returns:
    The number.

  Raises:
    ValueError: if it is none.

  Example:
    >>> integer(10.0)
    10
  """
  if (found := number(value)) != int(found):
    raise ValueError(f"{value!r} is not a whole number")
  return int(found)


def flag(value: Any) -> bool:
  """Read true or false, in the spellings that mergekit takes.

  Args:
    value: a scalar of the file.

  Returns:
    Whether it is on.

  Raises:
    ValueError: if it is neither.

  Example:
    >>> flag(1), flag("no")
    (True, False)
  """
  word = str(value).lower() if isinstance(value, bool | int | str) else ""
  if word not in _TRUE + _FALSE:
    raise ValueError(f"{value!r} must be true or false")
  return word in _TRUE


def text(value: Any) -> str:
  """Read a word.

  Args:
    value: a scalar of the file.

  Returns:
    The word.

  Raises:
    ValueError: if it is none.

  Example:
    >>> text("global")
    'global'
  """
  if not isinstance(value, str):
    raise ValueError(f"{value!r} is not a word")
  return value


class Names:
  r"""The output's tensor names, which rules must tell apart.

  Args:
    names: all of them.

  Example:
    >>> names = Names(["h.0.v", "h.0.w", "h.1.w", "out"])
    >>> names.pattern(["h.0.v", "h.0.w"])
    'h\\.0\\..*'
    >>> names.rules({"h.0.v": 1.0, "h.0.w": 1.0, "h.1.w": 0.5, "out": 0.5})
    (('h\\.0\\..*', 1.0), ('.*', 0.5))
  """

  def __init__(self, names: Iterable[str]):
    self._below: collections.Counter[tuple[str, ...]] = collections.Counter()
    self._patterns: dict[frozenset[str], str] = {}
    for name in names:
      parts = tuple(name.split("."))
      for i in range(len(parts)):
        self._below[parts[:i]] += 1

  def pattern(self, chosen: Iterable[str]) -> str:
    """Write a regular expression that matches the chosen names in full, and none of the others."""
    key = frozenset(chosen)
    if key not in self._patterns:
      parts = sorted(tuple(name.split(".")) for name in key)
      self._patterns[key] = self._write((), parts)
    return self._patterns[key]

  def rules(self, values: Mapping[str, Hashable]) -> Any:
    """Turn a value for every name into one value, or into rules of `core.varied`."""
    groups: dict[Hashable, list[str]] = {}
    for name, value in values.items():
      groups.setdefault(value, []).append(name)
    *others, most = sorted(groups, key=lambda v: len(groups[v]))
    if not others:
      return most
    order = {value: i for i, value in enumerate(groups)}
    told = [(self.pattern(groups[v]), v) for v in sorted(others, key=order.__getitem__)]
    return (*told, (".*", most))

  def _write(self, prefix: tuple[str, ...], rests: Sequence[tuple[str, ...]]) -> str:
    """Write the expression for what follows a prefix, which `rests` lists."""
    if len(rests) == self._below[prefix] > 1 or (not prefix and len(rests) == self._below[()]):
      return ".*"
    children: dict[str, list[tuple[str, ...]]] = {}
    for part, *rest in rests:
      children.setdefault(part, []).append(tuple(rest))
    alike: dict[str, list[str]] = {}
    for part, below in children.items():
      inner = [r for r in below if r]
      if len(inner) < len(below):  # a name ends here
        alike.setdefault("", []).append(re.escape(part))
      if inner:
        alike.setdefault(rf"\.{self._write((*prefix, part), inner)}", []).append(re.escape(part))
    told = [(p[0] if len(p) == 1 else f"(?:{'|'.join(p)})") + tail for tail, p in alike.items()]
    return told[0] if len(told) == 1 else f"(?:{'|'.join(told)})"


def _along(values: Sequence[Any], t: float, read: Callable[[Any], Any]) -> Any:
  if not values:
    return None
  if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
    return values[int(t * (len(values) - 1))]
  at = t * (len(values) - 1)
  low = int(at)
  high = min(len(values) - 1, low + 1)
  part = at - low
  return read((1 - part) * values[low] + part * values[high])
