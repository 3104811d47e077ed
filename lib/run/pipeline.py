# SPDX-License-Identifier: Apache-2.0
"""Read the next item and write the last one while the present one is worked on.

One thread each for reading and writing, one item ahead and one behind, so memory holds three items
at most and writes keep their order.
"""

import concurrent.futures
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Pipeline(Collection[tuple[Item, Any]], Generic[Item]):
  """Overlap reading, work and writing; a context manager, which waits for the last write.

  Args:
    read: called with each item, in another thread, in order.
    write: called with what `put` was given, in another thread, in order.
    items: what to go through.

  Example:
    >>> out = []
    >>> with Pipeline(lambda i: i * 10, lambda i, x: out.append((i, x)), [1, 2]) as line:
    ...   for item, found in line:
    ...     line.put(item, found + 1)
    >>> out
    [(1, 11), (2, 21)]
  """

  def __init__(
    self, read: Callable[[Item], Any], write: Callable[..., None], items: Sequence[Item]
  ):
    self._read, self._write, self._items = read, write, items
    self._reader = concurrent.futures.ThreadPoolExecutor(1, "read")
    self._writer = concurrent.futures.ThreadPoolExecutor(1, "write")
    self._last: concurrent.futures.Future[None] | None = None

  def __enter__(self) -> "Pipeline[Item]":
    return self

  def __exit__(self, kind: Any, *rest: Any) -> None:
    del rest
    try:
      if kind is None:
        self.flush()
    finally:
      # After an error, what is still being written finishes before the output is given up.
      self._reader.shutdown(cancel_futures=True)
      self._writer.shutdown(cancel_futures=True)

  def __len__(self) -> int:
    return len(self._items)

  def __contains__(self, item: object) -> bool:
    return item in self._items

  def __iter__(self) -> Iterator[tuple[Item, Any]]:
    ahead = self._reader.submit(self._read, self._items[0]) if self._items else None
    for i, item in enumerate(self._items):
      assert ahead is not None
      found = ahead.result()
      more = i + 1 < len(self._items)
      ahead = self._reader.submit(self._read, self._items[i + 1]) if more else None
      yield item, found
      del found  # it may be large, and the next one is on its way

  def put(self, *value: Any) -> None:
    """Write in the background, after the write before is done.

    Args:
      *value: arguments of `write`.

    Raises:
      Exception: what an earlier write raised.
    """
    self.flush()
    self._last = self._writer.submit(self._write, *value)

  def flush(self) -> None:
    """Wait for what is being written; raise what it raised."""
    if self._last is not None:
      last, self._last = self._last, None
      last.result()
