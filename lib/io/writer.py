# SPDX-License-Identifier: Apache-2.0
"""Stream tensors into the safetensors files of a directory, in bounded memory, resumably.

Tensors go straight to disk, in the order in which they come, behind room left for the header that
is filled in when the shard is complete, so nothing is buffered and no byte is copied twice. Every
finished shard is synced and noted in a journal together with the job's fingerprint, and so is a
shard in the making by `flush`: a run of the same job that follows a killed one skips the tensors
noted, and can read them back. Equal sequences of writes give equal bytes, interrupted or not.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treesurgeon.core import pieces
from treesurgeon.io import blocks, header, safetensors, staging

MAX_SHARD_BYTES = int(5e9)
_CHUNK = 1 << 24
_JOURNAL, _OPEN = "journal.json", "shard.open"


class Writer:
  """Write safetensors into a new directory; also a context manager, which commits on success.

  Args:
    directory: the output, which must not exist (or be empty) unless `overwrite`.
    max_shard_bytes: data bytes after which a new shard begins.
    overwrite: replace an existing output when the new one is complete.
    job: fingerprint of everything the tensors depend on; a run with the fingerprint of a killed
      one resumes it. None always starts afresh.
    header_bytes: room kept for each shard's header; a full one begins a new shard.
    single: name of the file if there is only one.

  Attributes:
    stage: the working directory, for further files of the output.
    notes: JSON values that the journal keeps along with the finished shards.
    state: JSON that `flush` was last given, by a killed run of the same job too.

  Raises:
    ValueError: if the output exists, or another process is writing it.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   with Writer(f"{root}/out") as out:
    ...     out.write("w", np.zeros((2, 3), np.float32))
    ...   os.listdir(f"{root}/out")
    ['model.safetensors']
  """

  def __init__(
    self,
    directory: str | Path,
    *,
    max_shard_bytes: int | float = MAX_SHARD_BYTES,
    overwrite: bool = False,
    job: str | None = None,
    header_bytes: int = 1 << 16,
    single: str = safetensors.SINGLE,
  ):
    if max_shard_bytes <= 0:
      raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive, such as 5e9")
    self._max, self._header_bytes = int(max_shard_bytes), -(-header_bytes // 8) * 8
    self._job = None if job is None else f"{job} {self._max} {self._header_bytes}"
    self._single = single
    self.notes: dict[str, Any] = {}
    self.state: dict[str, Any] = {}
    self._shards: list[dict[str, Any]] = []
    self._finished: set[str] = set()
    self._open: dict[str, header.Info] = {}
    self._fd = -1
    self._at = self._room = self._size = 0
    self.stage = staging.Staging(directory, overwrite=overwrite)
    if not self._resume():
      self.stage.clear()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: Any, *rest: Any) -> None:
    del rest
    if kind is None:
      self.commit()
    else:
      self.abort()

  def done(self, name: str) -> bool:
    """Tell whether the journal notes a tensor, so that a resumed run need not compute it."""
    return name in self._finished

  def read(self, name: str) -> np.ndarray:
    """Read back a tensor that the journal notes.

    Args:
      name: one for which `done` holds.

    Returns:
      The tensor.
    """
    if name not in self._open:
      shard = next(s for s in self._shards if name in s["tensors"])
      return safetensors.open_file(self.stage.path / shard["file"])[name]
    info = self._open[name]
    array = np.empty(info.shape, info.dtype)
    data = array.reshape(-1).view(np.uint8).data
    while data:
      done = os.preadv(self._fd, [data], self._size + info.stop - len(data))
      data = data[done:]
    return array

  def flush(self, state: Mapping[str, Any]) -> None:
    """Make all that was written outlive the process.

    Args:
      state: JSON kept beside it.

    Raises:
      OSError: if the disk is full.
    """
    self.state = dict(state)
    with self.stage.disk():
      if self._fd >= 0:
        os.fsync(self._fd)
      self._finished.update(self._open)
      self._note()

  def write(self, name: str, array: Any) -> None:
    """Append a tensor; one that is already in a finished shard is skipped.

    Args:
      name: tensor name.
      array: numpy or jax array, or `core.pieces.Pieces`, which need not be in memory as a whole.

    Raises:
      ValueError: for a name written twice, or a dtype that the format lacks.
      OSError: if the disk is full; finished shards are kept for a rerun of the same job.
    """
    if self.done(name):
      return
    if name in self._open:
      raise ValueError(f"tensor {name!r} is written twice to {self.stage.directory}")
    array = array if isinstance(array, pieces.Pieces) else np.asarray(array)
    dtype = header.check_dtype(name, array.dtype)
    info = header.Info(dtype, array.shape, self._at, self._at + array.nbytes)
    need = len(json.dumps({name: header.entry(info)})) + 32
    with self.stage.disk():
      if self._open and (info.stop > self._max or need > self._room):
        self._finish()
        info = info._replace(start=0, stop=array.nbytes)
      if not self._open:
        self._begin(need)
      for part in array if isinstance(array, pieces.Pieces) else (array,):
        for piece in _pieces(part):
          while piece:
            piece = piece[os.write(self._fd, piece) :]
    self._open[name] = info
    self._at, self._room = info.stop, self._room - need

  def seal(self) -> dict[str, Path]:
    """Finish the last shard; return each weight file's final name and where it is now."""
    with self.stage.disk():
      if self._open or not self._shards:
        self._finish()
    n = len(self._shards)
    names = [self._single] if n == 1 else [
      f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)
    ]  # fmt: skip
    paths = [self.stage.path / s["file"] for s in self._shards]
    return dict(zip(names, paths, strict=True))

  def commit(self) -> None:
    """Finish, name the shards, write the index, and put the directory in its place."""
    files = self.seal()
    if len(files) > 1:
      owners = zip(files, self._shards, strict=True)
      table = {tensor: file for file, shard in owners for tensor in shard["tensors"]}
      total = sum(shard["bytes"] for shard in self._shards)
      index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
      self.stage.text(safetensors.INDEX, json.dumps(index, indent=2) + "\n")
    with self.stage.disk():
      for name, path in files.items():
        os.rename(path, self.stage.path / name)
      (self.stage.path / _JOURNAL).unlink()
    self.stage.commit()

  def abort(self) -> None:
    """Give up; the finished shards of a job with a fingerprint stay for its rerun."""
    if self._fd >= 0:
      os.close(self._fd)
      self._fd = -1
    self.stage.abort(keep=self._job is not None and bool(self._finished))

  def _begin(self, need: int) -> None:
    self._size = max(self._header_bytes, -(-(need + 64) // 8) * 8)
    self._room, self._at = self._size - 64, 0
    self._fd = os.open(self.stage.path / _OPEN, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.lseek(self._fd, self._size, os.SEEK_SET)

  def _finish(self) -> None:
    """Fill in the header, sync the shard, name it, note it."""
    if self._fd < 0:
      self._begin(0)
    os.pwrite(self._fd, header.build(self._open, reserve=self._size), 0)
    os.fsync(self._fd)
    os.close(self._fd)
    self._fd = -1
    file = f"shard-{len(self._shards) + 1:05}.safetensors"
    os.rename(self.stage.path / _OPEN, self.stage.path / file)
    self._shards.append({"file": file, "bytes": self._at, "tensors": list(self._open)})
    self._finished.update(self._open)
    self._open, self._at = {}, 0
    self._note()

  def _note(self) -> None:
    """Write the journal."""
    state = {"job": self._job, "shards": self._shards, "notes": self.notes, "state": self.state}
    if self._open:
      tensors = {name: header.entry(info) for name, info in self._open.items()}
      state["open"] = {"tensors": tensors, "start": self._size, "room": self._room}
    self.stage.text(_JOURNAL, json.dumps(state))

  def _resume(self) -> bool:
    """Take over what a killed run of the same job finished; False if there is nothing of use."""
    try:
      state = json.loads((self.stage.path / _JOURNAL).read_bytes())
      if self._job is None or state["job"] != self._job:
        return False
      for shard in state["shards"]:
        held = safetensors.open_file(self.stage.path / shard["file"])  # checks the size too
        if list(held) != shard["tensors"]:
          return False
      notes, kept = dict(state["notes"]), dict(state["state"])
      if "open" in state:
        self._reopen(**state["open"])
    except (OSError, ValueError, KeyError, TypeError):
      return False
    self._shards, self.notes, self.state = state["shards"], notes, kept
    self._finished = {name for shard in self._shards for name in shard["tensors"]} | {*self._open}
    return True

  def _reopen(self, tensors: Mapping[str, Any], start: int, room: int) -> None:
    """Go on in a shard that was flushed, behind what was."""
    path = self.stage.path / _OPEN
    end = max(entry["data_offsets"][1] for entry in tensors.values())
    found = header.parse(json.dumps(tensors).encode(), data_bytes=end, file=str(path))
    if path.stat().st_size < start + end:
      raise ValueError(f"{path} is shorter than the journal says")
    self._fd = os.open(path, os.O_RDWR)
    os.ftruncate(self._fd, start + end)
    os.lseek(self._fd, 0, os.SEEK_END)
    self._open, self._at, self._size, self._room = found, end, start, room


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
  """Cut an array into contiguous runs of bytes, copying only where its strides ask for it."""
  if array.flags.c_contiguous:
    yield array.reshape(-1).view(np.uint8).data
    return
  rows = max(1, _CHUNK * len(array) // max(1, array.nbytes))
  for i in range(0, len(array), rows):
    part = array[i : i + rows]
    out = np.empty(part.shape, part.dtype)
    blocks.copy(out, part)
    yield out.reshape(-1).view(np.uint8).data
