# SPDX-License-Identifier: Apache-2.0
"""A directory that appears whole or not at all.

Work happens in a hidden sibling, `.NAME.partial`, which takes the final name by a rename when it is
complete. A killed run leaves the old output or none; what it had done stays in the sibling, where
a rerun finds it. A replaced output is moved aside first and put back should the run die
between the two renames.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from treesurgeon.io import safetensors

LOCK = "lock"


class Staging:
  """Hold the working directory of one output, locked against a second writer.

  Args:
    directory: the output.
    overwrite: replace an existing output when the new one is complete.

  Attributes:
    path: the working directory; every file in it becomes part of the output.

  Raises:
    ValueError: if the output exists, or another process is writing it.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   stage = Staging(f"{root}/out")
    ...   stage.text("a.txt", "hello")
    ...   before = os.path.exists(f"{root}/out")
    ...   stage.commit()
    ...   before, os.listdir(f"{root}/out")
    (False, ['a.txt'])
  """

  def __init__(self, directory: str | Path, *, overwrite: bool = False):
    # Not resolved: a link given as output is replaced itself, not what it points to.
    self.directory = Path(os.path.abspath(directory))
    self.path = self.directory.with_name(f".{self.directory.name}.partial")
    self._backup = self.directory.with_name(f".{self.directory.name}.old")
    self._overwrite = overwrite
    if not self._backup.exists():
      check_output(self.directory, overwrite)
    with self.disk():
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / LOCK, "w")  # held until the end
      try:
        self._claim()
      except BaseException:
        self._lock.close()
        raise

  def text(self, name: str, content: str) -> None:
    """Put a text file into the output, synced, replacing one of that name in one step."""
    temporary = self.path / f"{name}.new"
    with self.disk():
      with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
      os.rename(temporary, self.path / name)

  def copy(self, file: Path) -> None:
    """Copy a file into the output under its own name."""
    with self.disk():
      shutil.copyfile(file, self.path / file.name)

  def clear(self) -> None:
    """Remove what an earlier run left in the working directory."""
    for path in self.path.iterdir():
      if path.name != LOCK:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

  def commit(self) -> None:
    """Put the working directory in the output's place."""
    with self.disk():
      check_output(self.directory, self._overwrite)
      (self.path / LOCK).unlink()
      sync_folder(self.path)
      replace(self.directory, self.path)
    self._lock.close()

  def abort(self, *, keep: bool) -> None:
    """Give up; `keep` leaves the working directory for a rerun."""
    if not keep:
      shutil.rmtree(self.path, ignore_errors=True)
    self._lock.close()

  @contextlib.contextmanager
  def disk(self) -> Iterator[None]:
    """Turn a full disk into one message, around anything that writes."""
    try:
      yield
    except OSError as error:
      told = error.filename == str(self.directory)
      if told or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      free = shutil.disk_usage(self.directory.parent).free
      raise OSError(
        error.errno,
        f"disk full: {free} bytes are free; free some space or choose another output, finished "
        "shards are kept for a rerun",
        str(self.directory),
      ) from error

  def _claim(self) -> None:
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f"{self.directory} is being written by another process; wait or choose another output"
      ) from error
    if self._backup.exists() or self._backup.is_symlink():
      if self.directory.exists():
        _remove(self._backup)
      else:
        os.rename(self._backup, self.directory)
      check_output(self.directory, self._overwrite)


def check_output(directory: str | Path, overwrite: bool) -> None:
  """Require that an output may be written.

  Args:
    directory: where the output will be.
    overwrite: whether an existing directory may be replaced.

  Raises:
    ValueError: if it exists, unless it is an empty directory, or a directory and `overwrite`.

  Example:
    >>> check_output("no such directory", overwrite=False)
  """
  directory = Path(directory)
  if directory.exists() and not directory.is_dir():
    raise ValueError(f"{directory} is a file; the output must be a new directory")
  if directory.is_dir() and any(directory.iterdir()) and not overwrite:
    raise ValueError(
      f"{directory} exists and holds {safetensors.listing(directory)}; choose another output or "
      "pass overwrite=True, which replaces all of it"
    )


def replace(directory: Path, new: Path) -> None:
  """Rename a complete directory into place, moving what is there aside until it is done.

  Args:
    directory: where it goes.
    new: the complete directory, on the same file system.
  """
  backup = directory.with_name(f".{directory.name}.old")
  if directory.is_symlink() or directory.exists():
    os.rename(directory, backup)
  os.rename(new, directory)
  sync_folder(directory.parent)
  _remove(backup)


def sync_folder(path: Path) -> None:
  """Make renames and new files in a directory survive a power loss.

  Args:
    path: an existing directory.
  """
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _remove(path: Path) -> None:
  if path.is_symlink():
    path.unlink()
  elif path.exists():
    shutil.rmtree(path)
