# SPDX-License-Identifier: Apache-2.0
"""Arguments of methods: plain literals, checked against annotations and written canonically."""

import math
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np


def freeze(value: Any) -> Any:
  """Turn an argument into hashable plain Python: lists to tuples, numpy scalars to numbers.

  Args:
    value: an argument as a caller or a config gave it.

  Returns:
    The value made of None, bool, int, float, str and tuples; anything else passes.

  Example:
    >>> freeze([np.float64(0.5), np.int32(2)])
    (0.5, 2)
  """
  if isinstance(value, list | tuple):
    return tuple(freeze(v) for v in value)
  if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
    return value.item()
  if isinstance(value, np.ndarray):
    return freeze(value.tolist())
  return os.fspath(value) if isinstance(value, os.PathLike) else value


def write(value: Any) -> str:
  """Write an argument so that Python reads it back as a literal.

  Args:
    value: a frozen argument.

  Returns:
    Its spelling.

  Raises:
    ValueError: if there is none.

  Example:
    >>> write((1, "a", float("inf")))
    "(1, 'a', 1e999)"
  """
  if isinstance(value, tuple):
    inner = ", ".join(write(v) for v in value)
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  if isinstance(value, float) and math.isinf(value):
    return "1e999" if value > 0 else "-1e999"
  if value is None or isinstance(value, bool | int | float | str) and value == value:
    return repr(value)
  raise ValueError(f"{value!r} is not a number, a string, True, False, None, or a list of these")


def fits(value: Any, hint: Any) -> bool:
  """Tell whether an argument is of the annotated type; an int stands for a float.

  Args:
    value: a frozen argument.
    hint: a type, a union, `Sequence[...]`, `tuple[..., ...]` or `Literal`; others take anything.

  Returns:
    Whether it fits.

  Example:
    >>> fits((1, 2.0), Sequence[float]), fits(True, int), fits("4", int)
    (True, False, False)
  """
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(fits(value, h) for h in inner)
  if origin is typing.Literal:
    return value in inner
  if origin in (tuple, Sequence):
    if not isinstance(value, tuple):
      return False
    if origin is tuple and inner[-1:] != (Ellipsis,):
      return len(value) == len(inner) and all(map(fits, value, inner))
    return all(fits(v, inner[0]) for v in value)
  if hint in (None, type(None)):
    return value is None
  if hint is bool or hint is str:
    return isinstance(value, hint)
  if hint is int or hint is float:
    number = int | float if hint is float else int
    return isinstance(value, number) and not isinstance(value, bool)
  return True


def name(hint: Any) -> str:
  """Name an annotated type for a message.

  Args:
    hint: the annotation.

  Returns:
    Words as they stand in the source.

  Example:
    >>> name(int | None), name(float)
    ('int | None', 'float')
  """
  return hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "")
