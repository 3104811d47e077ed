# SPDX-License-Identifier: Apache-2.0
"""Remembered hashes: the true ones, whatever happened to the file, and fewer of them."""

import hashlib
import math
import os

import pytest

from treesurgeon.core import lineage
from treesurgeon.io import digests


@pytest.fixture
def hashed(monkeypatch, tmp_path):
  """Counts the files that are read; all are large and old enough to be remembered."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(digests, "LARGE", 1)
  monkeypatch.setattr(digests, "SETTLED", -math.inf)
  read, true = [], lineage.digest
  monkeypatch.setattr(lineage, "digest", lambda path: read.append(path) or true(path))
  return read


def sha(content):
  return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_under_any_name(hashed, tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"one")
  assert digests.digest(path) == digests.digest(str(path)) == sha(b"one")
  (tmp_path / "link").symlink_to(path)
  assert digests.digest(tmp_path / "link") == sha(b"one")
  assert len(hashed) == 1


def test_a_change_of_equal_size_is_noticed(hashed, tmp_path):
  path = tmp_path / "a"
  for content in (b"one", b"two", b"six"):
    path.write_bytes(content)
    assert digests.digest(path) == sha(content)
  assert len(hashed) == 3


def test_a_replacement_with_the_old_times_is_noticed(hashed, tmp_path):
  path, other = tmp_path / "a", tmp_path / "b"
  path.write_bytes(b"one")
  assert digests.digest(path) == sha(b"one")
  other.write_bytes(b"two")
  old = path.stat()
  os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
  os.replace(other, path)
  assert digests.digest(path) == sha(b"two")
  assert len(hashed) == 2


def test_young_and_small_files_are_read_each_time(hashed, monkeypatch, tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"one")
  monkeypatch.setattr(digests, "SETTLED", 3600.0)
  assert [digests.digest(path) for _ in range(2)] == [sha(b"one")] * 2
  monkeypatch.setattr(digests, "SETTLED", -math.inf)
  monkeypatch.setattr(digests, "LARGE", 4)
  assert [digests.digest(path) for _ in range(2)] == [sha(b"one")] * 2
  assert len(hashed) == 4


def test_a_cache_that_cannot_be_written_costs_time_only(hashed, monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  path = tmp_path / "a"
  path.write_bytes(b"one")
  assert [digests.digest(path) for _ in range(2)] == [sha(b"one")] * 2
  assert len(hashed) == 2
