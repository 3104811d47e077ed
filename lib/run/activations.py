# SPDX-License-Identifier: Apache-2.0
"""The hidden states of all calibration batches, between two blocks.

They are held in memory up to a limit and beyond it in a file without a name, which is gone when its
process is, however that ends. One batch is on the devices at a time then. Over several devices the
examples of a batch are dealt out where they divide evenly.
"""

import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Room:
  """Where calibration may take place.

  Attributes:
    nbytes: most bytes of hidden states in memory, over all the streams of a walk; None is no limit.
    folder: where files go beyond that; None is the system's for temporary files.
    mesh: devices with an axis "data", over which batches are dealt out; None is one device.
  """

  nbytes: int | None = None
  folder: str | None = None
  mesh: jax.sharding.Mesh | None = None

  def share(self, streams: int) -> "Room":
    """Return the room of one of several streams."""
    if self.nbytes is None:
      return self
    return dataclasses.replace(self, nbytes=self.nbytes // max(1, streams))

  def deal(self, x: Any) -> Any:
    """Put an array of examples on the devices."""
    if self.mesh is None or x is None:
      return x
    axis = "data" if len(x) % self.mesh.shape["data"] == 0 else None
    return jax.device_put(x, jax.NamedSharding(self.mesh, jax.P(axis)))

  def everywhere(self, tree: Any) -> Any:
    """Put a whole tree on every device."""
    if self.mesh is None:
      return tree
    return jax.device_put(tree, jax.NamedSharding(self.mesh, jax.P()))


HERE = Room()


def mask_of(batch: Any) -> Any:
  """Return the mask over a batch's padding.

  Args:
    batch: an array, or a mapping with perhaps "mask", nonzero at real tokens.

  Returns:
    The mask (batch, length), or None.

  Example:
    >>> mask_of(np.ones((1, 2))), mask_of({"tokens": np.ones((1, 2)), "mask": np.ones((1, 2))})
    (None, array([[1., 1.]]))
  """
  return batch.get("mask") if isinstance(batch, Mapping) else None


class Hidden:
  """The hidden states of a collection of batches.

  Args:
    embed: batch -> hidden states, examples first.
    batches: the batches.
    room: how much of them may be in memory, and where.

  Attributes:
    firsts: how many examples come before each batch.
    masks: each batch's mask, or None.

  Example:
    >>> states = Hidden(jnp.asarray, [np.ones((2, 3)), np.ones((1, 3))], Room(nbytes=8))
    >>> states.advance(lambda h, mask: h + 1)
    >>> [h.shape for h, _, _ in states], states.whole()[2].tolist(), states.spilled
    ([(2, 3), (1, 3)], [2.0, 2.0, 2.0], True)
  """

  def __init__(self, embed: Callable[[Any], jax.Array], batches: Iterable[Any], room: Room):
    self._room, self._file = room, None
    self._held: list[Any] = []
    self.firsts: list[int] = []
    self.masks: list[Any] = []
    count = size = 0
    for batch in batches:
      h, mask = embed(batch), mask_of(batch)
      self.masks.append(None if mask is None else room.deal(jnp.asarray(mask)))
      self.firsts.append(count)
      self._held.append(h)
      count += len(h)
      if room.nbytes is None:
        continue
      start, size = size, size + h.nbytes
      if self._file is not None:
        self._held[-1] = self._write(self._file, h, start)
      elif size > room.nbytes:
        self._file, start = self._open(), 0
        for i, x in enumerate(self._held):
          self._held[i] = self._write(self._file, x, start)
          start += x.nbytes

  @property
  def spilled(self) -> bool:
    """Whether they lie in a file."""
    return self._file is not None

  def __len__(self) -> int:
    return len(self._held)

  def __getitem__(self, i: int) -> jax.Array:
    h = self._held[i]
    if self._file is not None:
      array = np.empty(h.shape, h.dtype)
      _read(self._file, array, h.start)
      h = jnp.asarray(array)
    return self._room.deal(h)

  def __iter__(self) -> Iterator[tuple[jax.Array, int, Any]]:
    for i in range(len(self)):
      yield self[i], self.firsts[i], self.masks[i]

  def advance(self, fn: Callable[[jax.Array, Any], jax.Array]) -> None:
    """Replace every batch's states by what comes out of the next block.

    Args:
      fn: (states, mask) -> states.
    """
    file, start = self._file, 0
    for i in range(len(self)):
      out = fn(self[i], self.masks[i])
      if self._file is None:
        self._held[i] = out
        continue
      if i == 0 and out.nbytes != self._held[0].nbytes:
        file = self._open()  # a network whose width changes
      self._held[i] = self._write(file, out, start)
      start += out.nbytes
    self._file = file

  def whole(self) -> jax.Array:
    """Join all batches: one array, examples first; of a file, a view where the device allows it.

    Returns:
      The states.

    Raises:
      ValueError: if there are none, they differ in length, or some positions are padding.
    """
    shapes = sorted({h.shape[1:] for h in self._held})
    if len(shapes) != 1:
      raise ValueError(
        "to tune blocks, all calibration batches must have one length; there are "
        + (" and ".join(str(s[0]) for s in shapes) or "none")
      )
    if any(mask is not None for mask in self.masks):
      raise ValueError("to tune blocks, calibration rows must have no padding; pack the documents")
    if self._file is None:
      return self._room.deal(jnp.concatenate(self._held) if len(self) > 1 else self._held[0])
    rows = sum(h.shape[0] for h in self._held)
    held = np.memmap(self._file, self._held[0].dtype, mode="r", shape=(rows, *shapes[0]))
    return self._room.deal(jax.device_put(held, may_alias=True))

  def _open(self) -> Any:
    if self._room.folder is not None:
      os.makedirs(self._room.folder, exist_ok=True)
    file = tempfile.TemporaryFile(dir=self._room.folder)
    weakref.finalize(self, file.close)
    return file

  def _write(self, file: Any, h: jax.Array, start: int) -> "_Place":
    array = np.ascontiguousarray(h)
    data = array.reshape(-1).view(np.uint8).data
    try:
      while data:
        done = os.pwrite(file.fileno(), data, start + array.nbytes - len(data))
        data = data[done:]
    except OSError as error:
      folder = self._room.folder or tempfile.gettempdir()
      raise OSError(
        error.errno,
        f"hidden states of calibration do not fit: {os.strerror(error.errno or 0)}; fewer samples "
        "take less, and a larger activation budget keeps more in memory",
        folder,
      ) from error
    return _Place(start, array.shape, array.dtype, array.nbytes)


class _Place(NamedTuple):
  """Where in the file a batch's states lie."""

  start: int
  shape: tuple[int, ...]
  dtype: Any
  nbytes: int


def _read(file: Any, array: np.ndarray, start: int) -> None:
  data = array.reshape(-1).view(np.uint8).data
  while data:
    done = os.preadv(file.fileno(), [data], start + array.nbytes - len(data))
    data = data[done:]
