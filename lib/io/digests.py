# SPDX-License-Identifier: Apache-2.0
"""Hashes of files for the lineage; a large file that did not change is hashed once.

Merging the same checkpoints again and again would otherwise spend more time on sha256 than on the
merge. What is remembered goes by a file's device, inode, size and times of change to the
nanosecond, of which no program can set the one of its inode; a file so young that it might change
again within one tick of that clock is not remembered.
"""

import hashlib
import os
import time
from pathlib import Path

from treesurgeon.core import lineage
from treesurgeon.io import cache

LARGE = 1 << 24  # bytes; below, hashing costs nothing
SETTLED = 2.0  # seconds without a change


def digest(path: str | Path) -> str:
  """Hash a file's content, or remember its hash.

  Args:
    path: file to read.

  Returns:
    Hexadecimal sha256.

  Raises:
    OSError: if it cannot be read.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...   digest(file.name)[:8]
    'e3b0c442'
  """
  stat = os.stat(path)
  young = time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED
  if stat.st_size < LARGE or young:
    return lineage.digest(path)
  found = cache.remember(f"sha256/{_state(stat)}", lambda: lineage.digest(path))
  if _state(os.stat(path)) != _state(stat):
    return lineage.digest(path)  # it changed meanwhile
  return found


def _state(stat: os.stat_result) -> str:
  state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
  return hashlib.sha256(repr(state).encode()).hexdigest()
