# SPDX-License-Identifier: Apache-2.0
"""Files that are cheap to lose, in the user's cache folder: derived text and compiled programs."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import jax

SECONDS = 0.01  # that a program takes to compile, for it to be kept


def folder() -> Path:
  """Name the cache folder: `$XDG_CACHE_HOME/treesurgeon`, by default under `~/.cache`.

  Returns:
    The folder, which need not exist.

  Example:
    >>> folder().name
    'treesurgeon'
  """
  base = os.environ.get("XDG_CACHE_HOME")
  return (Path(base) if base else Path.home() / ".cache") / "treesurgeon"


def keep_programs() -> None:
  """Keep compiled programs for the next command, unless JAX was told where to, or nowhere.

  The environment variable JAX_COMPILATION_CACHE_DIR names another folder; empty, it is none.

  Example:
    >>> keep_programs()
  """
  held = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if held or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  where = folder() / "programs"
  with contextlib.suppress(OSError):
    where.mkdir(parents=True, exist_ok=True)
  if os.access(where, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def remember(name: str, make: Callable[[], str], *, where: str | Path | None = None) -> str:
  """Read a cached text, or make and keep it.

  Two processes that make the same text at once both succeed. Where nothing can be written, the
  text is made each time.

  Args:
    name: file name; it must hold a digest of everything the text depends on.
    make: computes the text.
    where: folder, by default `folder()`.

  Returns:
    The text.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...   first = remember("a.txt", lambda: "x", where=d)
    ...   first, remember("a.txt", lambda: "y", where=d)
    ('x', 'x')
  """
  path = (folder() if where is None else Path(where)) / name
  try:
    return path.read_text("utf-8")
  except (OSError, UnicodeDecodeError):
    text = make()
  with contextlib.suppress(OSError):  # a read-only home or a full disk costs time, not the run
    write(path, text)
  return text


def write(path: str | Path, text: str) -> None:
  """Write a text file so that nobody ever sees half of it.

  Args:
    path: file to replace or make; folders are made.
    text: its content.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...   write(f"{d}/a/b.txt", "x")
    ...   os.listdir(f"{d}/a")
    ['b.txt']
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
  finally:
    draft.unlink(missing_ok=True)
