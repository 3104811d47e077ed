# SPDX-License-Identifier: Apache-2.0
"""A progress bar for long work, on the first process and only where somebody can see it."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import jax
import rich.console
import rich.progress


@contextlib.contextmanager
def bar(label: str, *, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
  """Show progress on stderr if it is a terminal.

  Args:
    label: what is going on.
    total: number of steps.
    done: steps that are done already.

  Yields:
    A function of (steps done, text to show beside).

  Example:
    >>> with bar("train", total=2) as show:
    ...   show(1, "loss 3.2")
  """
  if jax.process_index() != 0 or not sys.stderr.isatty():
    yield lambda step, text: None
    return
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn("{task.fields[text]}"),
  )
  with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
    task = progress.add_task(label, total=total, completed=done, text="compiling")
    yield lambda step, text: progress.update(task, completed=step, text=text)
