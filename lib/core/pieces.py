# SPDX-License-Identifier: Apache-2.0
"""Take a large host array through a program in pieces of rows.

What streams from a file is a host array. Where a method treats entries independently of each other,
pieces that fit the caches bound the memory for float32 intermediates, which for an embedding would
be several times the leaf, and keep all cores busy. A result that is written next is not put
together at all: its pieces are computed while it is written. Arrays on devices go through whole:
there the compiler and the mesh decide.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SIZE = 1 << 20  # entries in a piece
Bounds = Sequence[tuple[int, int]]


class Pieces:
  """An array that is computed a piece of rows at a time, whenever it is gone through.

  Args:
    shape: of the whole.
    first: the first piece, which tells the dtype.
    piece: computes the piece of an index.
    count: number of pieces.

  Attributes:
    shape: of the whole.
    dtype: of the whole.

  Example:
    >>> pieces = Pieces((4,), np.arange(2), lambda i: np.arange(2 * i, 2 * i + 2), 2)
    >>> [x.tolist() for x in pieces], np.asarray(pieces).tolist()
    ([[0, 1], [2, 3]], [0, 1, 2, 3])
  """

  def __init__(
    self, shape: tuple[int, ...], first: np.ndarray, piece: Callable[[int], np.ndarray], count: int
  ):
    self.shape, self.dtype = shape, first.dtype
    self._first, self._piece, self._count = first, piece, count

  def __iter__(self) -> Iterator[np.ndarray]:
    yield self._first
    yield from each(self._piece, range(1, self._count))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # it is always made anew
    out = np.empty(self.shape, self.dtype)
    row = 0
    for piece in self:
      out[row : row + len(piece)] = piece
      row += len(piece)
    return out if dtype is None else out.astype(dtype)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole."""
    return int(np.prod(self.shape)) * self.dtype.itemsize

  def watched(self, look: Callable[[np.ndarray], None]) -> "Pieces":
    """Return the same array, each piece of which is shown to a function when it is computed."""

    def piece(i: int) -> np.ndarray:
      made = self._first if i == 0 else self._piece(i)
      look(made)
      return made

    return Pieces(self.shape, piece(0), piece, self._count)


def bounds(w: Any, donors: Sequence[Any]) -> list[tuple[int, int]] | None:
  """Tell where to cut a leaf.

  Args:
    w: the leaf.
    donors: its counterparts.

  Returns:
    (first, last + 1) rows of each piece; None if the leaf stays whole: it is small, or not
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
) -> Pieces:
  """Run a program on every piece.

  Args:
    call: of (piece, evidence) -> array of the piece's shape.
    w: the leaf.
    given: evidence, the same for every piece but for the donors.
    donors: the donors' name in it, if there are some.
    where: from `bounds`.
    more: further evidence, one mapping a piece.

  Returns:
    The result, of which the first piece is computed.

  Example:
    >>> double = lambda w, given: w * given["by"]
    >>> made = through(double, np.arange(3), {"by": 2}, None, [(0, 2), (2, 3)], None)
    >>> np.asarray(made).tolist()
    [0, 2, 4]
  """

  def piece(i: int) -> np.ndarray:
    a, b = where[i]
    here = dict(given) if donors is None else {**given, donors: _rows(given[donors], a, b)}
    return np.asarray(call(w[a:b], {**here, **(more[i] if more else {})}))

  return Pieces(w.shape, piece(0), piece, len(where))


def each(fn: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
  """Call a function with every item, on all cores, few items ahead of what is taken.

  Args:
    fn: what to call; it should spend its time outside the interpreter.
    items: its arguments.

  Returns:
    The results, in order.

  Example:
    >>> list(each(abs, [-1, 2]))
    [1, 2]
  """
  cores = min(8, os.cpu_count() or 1)
  ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    for item in items:
      ahead.append(pool.submit(fn, item))
      if len(ahead) >= cores:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def _rows(donors: Sequence[np.ndarray], a: int, b: int) -> tuple[np.ndarray, ...]:
  return tuple(d[a:b] for d in donors)
