# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from treesurgeon.io import safetensors, staging, writer

ARRAYS = {f"t{i}": np.full((4, 8), i, np.float32) for i in range(7)}
SHARD = 300  # bytes: two tensors a shard

# Writes the tensors above and dies by SIGKILL before the given one.
KILLED = """
import os, signal, sys
import numpy as np
from treesurgeon.io import writer
out = writer.Writer(sys.argv[1], max_shard_bytes=300, job=sys.argv[3], overwrite=True)
for i in range(7):
  if str(i) == sys.argv[2]:
    os.kill(os.getpid(), signal.SIGKILL)
  out.write(f"t{i}", np.full((4, 8), i, np.float32))
files = out.seal()
if sys.argv[2] == "sealed":
  os.kill(os.getpid(), signal.SIGKILL)
"""


def write(directory, arrays=ARRAYS, **options):
  with writer.Writer(directory, max_shard_bytes=SHARD, **options) as out:
    skipped = [n for n in arrays if out.done(n)]
    for name, x in arrays.items():
      out.write(name, x)
  return skipped


def digests(directory):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def killed(directory, before, job):
  command = [sys.executable, "-P", "-c", KILLED, str(directory), before, job]
  done = subprocess.run(command, check=False)
  assert done.returncode == -signal.SIGKILL


def test_shards_and_index(tmp_path):
  assert write(tmp_path / "out") == []
  names = sorted(p.name for p in (tmp_path / "out").iterdir())
  shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
  assert names == [*shards, "model.safetensors.index.json"]
  index = json.loads((tmp_path / "out" / safetensors.INDEX).read_text())
  assert index["metadata"] == {"total_size": sum(x.nbytes for x in ARRAYS.values())}
  assert index["weight_map"]["t2"] == shards[1]
  assert os.listdir(tmp_path) == ["out"]
  read = safetensors.open_folder(tmp_path / "out")
  assert all(np.array_equal(read[n], x) for n, x in ARRAYS.items())


def test_single_file_and_no_tensors(tmp_path):
  with writer.Writer(tmp_path / "one") as out:
    out.write("a", np.float32(3))
  assert os.listdir(tmp_path / "one") == ["model.safetensors"]
  assert safetensors.open_folder(tmp_path / "one")["a"].shape == ()
  with writer.Writer(tmp_path / "none"):
    pass
  assert len(safetensors.open_folder(tmp_path / "none")) == 0


def test_equal_runs_give_equal_bytes(tmp_path):
  write(tmp_path / "a")
  write(tmp_path / "b")
  assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_existing_output(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  write(out)  # an empty directory is fine
  before = digests(out)
  with pytest.raises(ValueError, match=r"out exists and holds model-00001.*pass overwrite=True"):
    write(out)
  assert digests(out) == before and os.listdir(tmp_path) == ["out"]
  (out / "stale.txt").write_text("old")
  write(out, {"x": np.zeros(2)}, overwrite=True)
  assert os.listdir(out) == ["model.safetensors"]  # replaced, never merged into
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file is a file; the output must be a new directory"):
    write(tmp_path / "file", overwrite=True)


def test_output_that_appears_meanwhile_is_kept(tmp_path):
  out = writer.Writer(tmp_path / "out")
  out.write("a", np.zeros(3))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("")
  with pytest.raises(ValueError, match="exists and holds mine"):
    out.commit()
  out.abort()
  assert os.listdir(tmp_path / "out") == ["mine"]


def test_linked_output_is_replaced_not_followed(tmp_path):
  (tmp_path / "real").mkdir()
  (tmp_path / "real" / "keep").write_text("")
  (tmp_path / "out").symlink_to(tmp_path / "real")
  write(tmp_path / "out", overwrite=True)
  assert os.listdir(tmp_path / "real") == ["keep"]
  assert not (tmp_path / "out").is_symlink()


def test_two_writers(tmp_path):
  with writer.Writer(tmp_path / "out") as out:
    with pytest.raises(ValueError, match="out is being written by another process; wait"):
      writer.Writer(tmp_path / "out")
    out.write("a", np.zeros(3))
  assert set(safetensors.open_folder(tmp_path / "out")) == {"a"}


def test_bad_arguments(tmp_path):
  with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
    writer.Writer(tmp_path / "out", max_shard_bytes=0)
  with pytest.raises(ValueError, match="tensor 'a' is written twice"):
    with writer.Writer(tmp_path / "out") as out:
      out.write("a", np.zeros(3))
      out.write("a", np.zeros(3))
  with pytest.raises(ValueError, match="tensor 'a': safetensors cannot hold dtype int4; pack it"):
    with writer.Writer(tmp_path / "out") as out:
      out.write("a", np.zeros(3, "int4"))
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", ["0", "3", "5", "sealed"])
def test_kill_and_rerun_equals_an_uninterrupted_run(tmp_path, before):
  write(tmp_path / "whole", job="j")
  out = tmp_path / "out"
  killed(out, before, "j")
  assert not out.exists()
  skipped = write(out, job="j")
  assert skipped == {"0": [], "3": ["t0", "t1"], "5": ["t0", "t1", "t2", "t3"]}.get(
    before, list(ARRAYS)
  )
  assert digests(out) == digests(tmp_path / "whole")
  assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.parametrize("last", [1, 3, 5])  # in a shard's middle, and at its end
def test_a_run_goes_on_behind_a_flush_within_a_shard(tmp_path, last):
  whole, out = tmp_path / "whole", tmp_path / "out"
  write(whole, job="j")
  first = writer.Writer(out, max_shard_bytes=SHARD, job="j")
  for i in range(last):
    first.write(f"t{i}", ARRAYS[f"t{i}"])
  first.flush({"at": last})
  first.write(f"t{last}", ARRAYS[f"t{last}"])
  first.abort()
  again = writer.Writer(out, max_shard_bytes=SHARD, job="j")
  assert again.state == {"at": last}
  for i in range(last):
    assert again.done(f"t{i}")
    np.testing.assert_array_equal(again.read(f"t{i}"), ARRAYS[f"t{i}"])
  # Writing the next tensor may have finished the shard that the flush was in.
  assert not again.done(f"t{last}")
  with again:
    for name, x in ARRAYS.items():
      again.write(name, x)
  assert digests(out) == digests(whole)


def test_a_flushed_shard_that_was_cut_starts_afresh(tmp_path):
  first = writer.Writer(tmp_path / "out", job="j")
  first.write("t0", ARRAYS["t0"])
  first.flush({})
  first.abort()
  shard = tmp_path / ".out.partial" / "shard.open"
  os.truncate(shard, shard.stat().st_size - 1)
  again = writer.Writer(tmp_path / "out", job="j")
  assert not again.done("t0")
  again.abort()


def test_killed_replacement_leaves_the_old_output(tmp_path):
  write(tmp_path / "out", {"old": np.zeros(2)})
  before = digests(tmp_path / "out")
  killed(tmp_path / "out", "5", "j")
  assert digests(tmp_path / "out") == before
  assert len(write(tmp_path / "out", job="j", overwrite=True)) == 4
  assert set(safetensors.open_folder(tmp_path / "out")) == set(ARRAYS)


@pytest.mark.parametrize("change", ["job", "no job", "shard", "truncated", "journal"])
def test_other_or_damaged_leftovers_start_afresh(tmp_path, change):
  killed(tmp_path / "out", "5", "j")
  part = tmp_path / ".out.partial"
  if change == "truncated":
    path = part / "shard-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
  if change == "journal":
    (part / "journal.json").write_text('{"job"')
  job = {"job": "k", "no job": None}.get(change, "j")
  if change == "shard":
    with writer.Writer(tmp_path / "out", max_shard_bytes=500, job=job) as out:
      assert not out.done("t0")
      out.write("t0", np.zeros(2))
    return
  assert write(tmp_path / "out", job=job) == []
  assert set(safetensors.open_folder(tmp_path / "out")) == set(ARRAYS)


def test_killed_between_the_two_renames(tmp_path):
  write(tmp_path / "out", {"old": np.zeros(2)})
  (tmp_path / "out").rename(tmp_path / ".out.old")
  with pytest.raises(ValueError, match="out exists and holds model.safetensors"):
    writer.Writer(tmp_path / "out")  # the old output is put back first
  assert set(safetensors.open_folder(tmp_path / "out")) == {"old"}
  (tmp_path / "out").rename(tmp_path / ".out.old")
  write(tmp_path / "out", overwrite=True)
  assert os.listdir(tmp_path) == ["out"]
  # Killed after the second rename: the new output stays, the old one goes with the next run.
  (tmp_path / ".out.old").mkdir()
  write(tmp_path / "out", overwrite=True)
  assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("job", [None, "j"])
def test_full_disk(tmp_path, monkeypatch, job):
  room = [700]

  def full(fd, data, real=os.write):
    if len(data) > room[0]:
      raise OSError(errno.ENOSPC, "No space left on device")
    room[0] -= len(data)
    return real(fd, data)

  write(tmp_path / "out", {"old": np.zeros(2)})
  before = digests(tmp_path / "out")
  with monkeypatch.context() as patch:
    patch.setattr(writer.os, "write", full)
    with pytest.raises(OSError, match=r"disk full: \d+ bytes are free; free some .*out") as caught:
      write(tmp_path / "out", overwrite=True, job=job)
  assert caught.value.errno == errno.ENOSPC
  assert digests(tmp_path / "out") == before
  assert (tmp_path / ".out.partial").exists() == (job is not None)
  assert len(write(tmp_path / "out", overwrite=True, job=job)) == (4 if job else 0)
  assert set(safetensors.open_folder(tmp_path / "out")) == set(ARRAYS)


def test_full_disk_when_syncing(tmp_path, monkeypatch):
  def full(fd):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(staging.os, "fsync", full)
  with pytest.raises(OSError, match="disk full"):
    write(tmp_path / "out")
  assert os.listdir(tmp_path) == []


def test_other_errors_of_the_disk_pass(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError):
    writer.Writer(tmp_path / "file" / "out")


def test_memory_stays_bounded(tmp_path):
  code = f"""
import resource, numpy as np
from treesurgeon.io import writer
x = np.ones((1 << 11, 1 << 11), np.float32)  # 16 MiB
with writer.Writer({str(tmp_path / "out")!r}, max_shard_bytes=1e9) as out:
  out.write("first", x)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for i in range(8):
    out.write(f"t{{i}}", x if i % 2 else x.T)
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
  done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
  assert int(done.stdout) < 24 * 1024  # KiB: one transposed block, not eight tensors
