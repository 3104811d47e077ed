# SPDX-License-Identifier: Apache-2.0
"""A progress bar for whoever watches: on the first process, and only on a terminal."""

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

import jax
from rich import console, progress

T = TypeVar("T")


def track(items: Collection[T], what: str) -> Iterator[T]:
  """Iterate with a progress bar on standard error.

  Args:
    items: what to go through.
    what: the plural noun the bar counts.

  Returns:
    The items.

  Example:
    >>> list(track([1, 2], "leaves"))
    [1, 2]
  """
  if not sys.stderr.isatty() or jax.process_index() != 0:
    yield from items
    return
  with progress.Progress(
    progress.TextColumn(f"{what} {{task.completed}}/{{task.total}}"),
    progress.BarColumn(),
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
    console=console.Console(stderr=True),
  ) as bar:
    yield from bar.track(items, total=len(items))
