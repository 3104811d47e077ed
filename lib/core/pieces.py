# SPDX-License-Identifier: Apache-2.0
"""Take a large host array through a program in pieces of rows.

What streams from a file is a host array. Where a method treats entries independently of each other,
pieces that fit the caches bound the memory for float32 intermediates, which for an embedding would
be several times the leaf, and keep all cores busy. Arrays on devices go through whole: there the
compiler and the mesh decide.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SIZE = 1 << 18  # entries in a piece
Bounds = Sequence[tuple[int, int]]


def bounds(w: Any, donors: Sequence[Any]) -> list[tuple[int, int]] | None:
  """Tell where to cut a leaf.

  Args:
    w: the leaf.
    donors: its counterparts.

  Returns:
    (first, last + 1) rows of each piece; None if the leaf stays whole: it is small, or they are not
    all are host arrays.

  Example:
    >>> bounds(np.zeros((3, SIZE)), ())
    [(0, 1), (1, 2), (2, 3)]
  """
  if not all(isinstance(x, np.ndarray) for x in (w, *donors)) or w.ndim == 0 or w.size < SIZE:
    return None
  rows = max(1, SIZE * len(w) // w.size)
  return [(i, min(i + rows, len(w))) for i in range(0, len(w), rows)]


def through(
  call: Callable[[Any, Mapping[str, Any]], Any],
  w: np.ndarray,
  given: Mapping[str, Any],
  donors: str | None,
  where: Bounds,
  more: Sequence[Mapping[str, Any]] | None,
) -> np.ndarray:
  """Run a program on every piece.

  Args:
    call: of (piece, evidence) -> array of the piece's shape.
    w: the leaf.
    given: evidence, the same for every piece but for the donors.
    donors: the donors' name in it, if there are some.
    where: from `bounds`.
    more: further evidence, one mapping a piece.

  Returns:
    The result, in host memory.

  Example:
    >>> double = lambda w, given: w * given["by"]
    >>> through(double, np.arange(3), {"by": 2}, None, [(0, 2), (2, 3)], None).tolist()
    [0, 2, 4]
  """
  out: list[np.ndarray] = []

  def one(i: int) -> None:
    a, b = where[i]
    here = dict(given) if donors is None else {**given, donors: _rows(given[donors], a, b)}
    made = np.asarray(call(w[a:b], {**here, **(more[i] if more else {})}))
    if not out:
      out.append(np.empty(w.shape, made.dtype))
    out[0][a:b] = made

  one(0)
  for _ in each(one, range(1, len(where))):
    pass
  return out[0]


def each(fn: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
  """Call a function with every item, on all cores; results in order.

  Args:
    fn: what to call; it should spend its time outside the interpreter.
    items: its arguments.

  Returns:
    The results.

  Example:
    >>> list(each(abs, [-1, 2]))
    [1, 2]
  """
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    yield from pool.map(fn, items)


def _rows(donors: Sequence[np.ndarray], a: int, b: int) -> tuple[np.ndarray, ...]:
  return tuple(d[a:b] for d in donors)
