# SPDX-License-Identifier: Apache-2.0
"""Lazy reading of safetensors files and folders through a memory map.

Opening reads the headers only; a tensor is a zero-copy, read-only numpy view that the operating
system pages in when it is used. Pickled weights are never opened.
"""

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from treesurgeon.io import header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")

RESIDENT = 32 << 20  # bytes of a file that are kept in memory once read


class Tensors(Mapping[str, np.ndarray]):
  """Name to tensor over one or more files; `tensors[name]` is a view into the file.

  Args:
    files: the safetensors files.
    index: name to file as an index lists it; None takes the files as they are.

  Raises:
    ValueError: for a truncated or corrupt file, a tensor in two files, or files that do not
      hold what the index lists.

  Example:
    >>> import tempfile
    >>> from treesurgeon.io import writer
    >>> with tempfile.TemporaryDirectory() as root:
    ...   with writer.Writer(f"{root}/out") as out:
    ...     out.write("w", np.arange(3, dtype=np.int8))
    ...   Tensors([Path(root, "out", "model.safetensors")])["w"].tolist()
    [0, 1, 2]
  """

  def __init__(self, files: list[Path], index: Mapping[str, Path] | None = None):
    self.files = list(files)
    self._recent: list[_File] = []
    self._found: dict[str, tuple[_File, header.Info]] = {}
    for path in self.files:
      opened = _File(path)
      for name, info in opened.infos.items():
        if name in self._found:
          raise ValueError(
            f"tensor {name!r} is listed twice: in {self._found[name][0].path} and in {path}"
          )
        self._found[name] = opened, info
    if index is not None:
      self._check_index(index)

  def __getitem__(self, name: str) -> np.ndarray:
    file, info = self._found[name]
    if file not in self._recent[-1:]:
      # What was read last may be at work yet; of the files before it nothing need stay in memory.
      recent = [*self._recent, file]
      for other in recent[:-2]:
        if other is not file:
          other.forget()
      self._recent = recent[-2:]
    return file.view(info)

  def __iter__(self) -> Iterator[str]:
    return iter(self._found)

  def __len__(self) -> int:
    return len(self._found)

  def info(self, name: str) -> header.Info:
    """Return a tensor's dtype, shape and offsets without touching its data."""
    return self._found[name][1]

  def file(self, name: str) -> Path:
    """Return the file that holds a tensor."""
    return self._found[name][0].path

  def prefetch(self, name: str) -> None:
    """Ask the operating system to read a tensor ahead of its use."""
    file, info = self._found[name]
    file.prefetch(info)

  def _check_index(self, index: Mapping[str, Path]) -> None:
    for name, path in index.items():
      if name not in self._found:
        raise ValueError(f"{path}: tensor {name!r} is missing, though the index lists it there")
      if self.file(name) != path:
        raise ValueError(f"tensor {name!r} is in {self.file(name)}, but the index says {path.name}")
    extra = [name for name in self._found if name not in index]
    if extra:
      raise ValueError(f"{self.file(extra[0])}: tensor {extra[0]!r} is not listed in the index")


def open_file(path: str | Path) -> Tensors:
  """Open one safetensors file.

  Args:
    path: the file.

  Returns:
    Its tensors, lazily.

  Raises:
    ValueError: if it is not there, is a pickle, or is corrupt.
  """
  path = Path(path)
  if path.suffix in _PICKLES:
    raise ValueError(_refusal(str(path)))
  if not path.is_file():
    raise ValueError(f"{path}: no such file; expected a .safetensors file")
  return Tensors([path])


def open_folder(directory: str | Path) -> Tensors:
  """Open the weights of a Hugging Face directory, in one file or in shards with an index.

  Args:
    directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards, or
      one other .safetensors file.

  Returns:
    All tensors, lazily.

  Raises:
    ValueError: if there are none, only pickled ones, or they do not fit the index.
  """
  directory = check_folder(directory)
  if (directory / SINGLE).is_file():
    return Tensors([directory / SINGLE])
  if (directory / INDEX).is_file():
    index = _read_index(directory / INDEX)
    return Tensors(list(dict.fromkeys(index.values())), index)
  loose = sorted(directory.glob("*.safetensors"))
  if len(loose) == 1:
    return Tensors(loose)
  if loose:
    names = ", ".join(p.name for p in loose[:5])
    raise ValueError(f"{directory}: several weight files ({names}) but no {INDEX} to join them")
  pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
  if pickles:
    raise ValueError(_refusal(f"{directory}/{pickles[0]}"))
  raise ValueError(f"{directory}: no {SINGLE} and no {INDEX}; it holds {listing(directory)}")


def check_folder(directory: str | Path) -> Path:
  """Require a directory.

  Args:
    directory: path to check.

  Returns:
    The path.

  Raises:
    ValueError: if it is something else or nothing.

  Example:
    >>> check_folder(".")
    PosixPath('.')
  """
  directory = Path(directory)
  if not directory.is_dir():
    what = "is a file" if directory.exists() else "does not exist"
    raise ValueError(f"{directory} {what}; expected a directory with config.json and safetensors")
  return directory


def listing(directory: Path) -> str:
  """Name what a directory holds, for messages.

  Args:
    directory: an existing directory.

  Returns:
    Up to ten names, or "nothing".
  """
  names = sorted(p.name for p in directory.iterdir())
  return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "nothing"


class _File:
  """One mapped file and its checked header."""

  def __init__(self, path: Path):
    self.path = path
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size < 8:
        raise ValueError(f"{path}: truncated: {size} bytes; a safetensors file has at least 8")
      length = int.from_bytes(file.read(8), "little")
      if length > header.MAX_HEADER:
        raise ValueError(
          f"{path}: not a safetensors file: it claims a header of {length} bytes, valid are up to "
          f"{header.MAX_HEADER}"
        )
      if 8 + length > size:
        raise ValueError(
          f"{path}: truncated: the header takes {length} bytes, but the file holds {size} in all"
        )
      self.start = 8 + length
      data_bytes = size - self.start
      self.infos = header.parse(file.read(length), data_bytes=data_bytes, file=str(path))
      self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    self._resident = 0

  def view(self, info: header.Info) -> np.ndarray:
    # Pages read stay resident until told otherwise, and a stream through a large file would hold
    # all of it. Views stay valid: what is touched again comes back from the file.
    if self._resident > RESIDENT:
      self.forget()
    self._resident += info.stop - info.start
    count = (info.stop - info.start) // info.dtype.itemsize
    flat = np.frombuffer(self.map, info.dtype, count, self.start + info.start)
    return flat.reshape(info.shape)

  def forget(self) -> None:
    if self._resident and hasattr(mmap, "MADV_DONTNEED"):
      self.map.madvise(mmap.MADV_DONTNEED)
      self._resident = 0

  def prefetch(self, info: header.Info) -> None:
    page = mmap.PAGESIZE
    start = (self.start + info.start) // page * page
    length = self.start + info.stop - start
    if length and hasattr(mmap, "MADV_WILLNEED"):
      self.map.madvise(mmap.MADV_WILLNEED, start, length)


def _read_index(path: Path) -> dict[str, Path]:
  """Read an index; every file it names must lie in its directory."""
  try:
    table = json.loads(path.read_bytes().decode("utf-8"))["weight_map"]
  except (ValueError, RecursionError, KeyError, TypeError) as error:
    raise ValueError(f"{path}: expected JSON with a weight_map; {error!r}") from error
  if not isinstance(table, dict) or not table:
    raise ValueError(f"{path}: weight_map must be an object that maps tensors to files")
  found = {}
  for name, file in table.items():
    # Judged by its spelling: hub caches link each shard to a file elsewhere, which is fine.
    if not isinstance(file, str) or not re.fullmatch(r"[^\\\0]+\.safetensors", file):
      raise ValueError(f"{path}: tensor {name!r}: {file!r} is not a .safetensors file")
    parts = PurePosixPath(file).parts
    if parts[0] == "/" or ".." in parts:
      raise ValueError(f"{path}: tensor {name!r}: {file!r} points outside the directory")
    found[name] = path.parent / file
  absent = sorted({str(p) for p in found.values() if not p.is_file()})
  if absent:
    raise ValueError(
      f"{path}: missing shard {absent[0]} ({len(absent)} of {len(set(found.values()))} are "
      "absent); download it again"
    )
  return found


def _refusal(file: str) -> str:
  return (
    f"{file}: refused: pickled or unsupported weights can run code when loaded; convert them to "
    "safetensors (only a weights-only loader would be accepted)"
  )
