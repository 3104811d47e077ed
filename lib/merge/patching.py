# SPDX-License-Identifier: Apache-2.0
"""Put weight patches on a model, in any number and strength, and take them off to the bit.

Floating-point addition loses bits, so subtracting a patch does not restore a model. What was lost
depends on the model and must be kept: beside the patched leaves `put` returns an `Undo`, for every
leaf the distance, counted in representable numbers, between the true weights and what
subtraction gives back. Most are zero or one, so deflated they take a fraction of the leaf;
`take_off` adds them and checks the result against a checksum. To remove one of several patches, or
to change its strength, take off all and put the others on: the result is that of having put on
only those.

Arithmetic is numpy's, on the host, each operation rounded by itself, so that a compiler's fused
multiply-add on another machine cannot change a bit. Made for the signatures of Cai et al., 2023
(arXiv 2302.12480), whose patches can be taken off, and right for any additive patch.
"""

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from treesurgeon.core import leaves
from treesurgeon.io import safetensors, writer

FILE = "undo.json"
Patches = Sequence[tuple[Mapping[str, Any], float]]


class Undo(NamedTuple):
  """What takes patches off again.

  Attributes:
    applied: (checksum of the signature, its strength) of every patch, in order.
    residues: address to deflated distances.
    checks: address to the checksum of the clean leaf's bytes.
  """

  applied: tuple[tuple[int, float], ...]
  residues: Mapping[str, bytes]
  checks: Mapping[str, int]

  def nbytes(self) -> int:
    """Count the bytes to be stored."""
    return sum(len(r) + 4 for r in self.residues.values())


def put(model: Mapping[str, Any], patches: Patches) -> tuple[dict[str, np.ndarray], Undo]:
  """Put patches on leaves.

  Args:
    model: address to array, at least of what the patches cover.
    patches: (signature, strength) pairs.

  Returns:
    (the changed leaves by address, what takes the patches off).

  Raises:
    ValueError: for a leaf that is missing or of another shape.

  Example:
    >>> clean = {"w": np.array([0.1, 1e-9], np.float32)}
    >>> patches = [({"w": np.array([0.3, 0.7], np.float32)}, 0.5)]
    >>> patched, undo = put(clean, patches)
    >>> take_off(patched, patches, undo)["w"].tobytes() == clean["w"].tobytes()
    True
  """
  patched, residues, checks = {}, {}, {}
  for address, change in _changes(patches).items():
    w = _fetch(model, address, change)
    new = (w.astype(np.float32) + change).astype(w.dtype)
    back = (new.astype(np.float32) - change).astype(w.dtype)
    distance = _place(w) - _place(back)  # wraps around, which adding undoes
    patched[address] = new
    residues[address] = _deflate(distance)
    checks[address] = zlib.crc32(w.tobytes())
  return patched, Undo(_names(patches), residues, checks)


def take_off(model: Mapping[str, Any], patches: Patches, undo: Undo) -> dict[str, np.ndarray]:
  """Take patches off again, to the bit.

  Args:
    model: address to patched array.
    patches: the pairs that were put on, in the same order.
    undo: what `put` returned.

  Returns:
    The clean leaves by address.

  Raises:
    ValueError: for other patches than were put on, or a leaf that was changed since.
  """
  if _names(patches) != undo.applied:
    raise ValueError(
      f"these are not the patches that were put on: (checksum, strength) {list(_names(patches))}, "
      f"put on were {list(undo.applied)}"
    )
  clean = {}
  for address, change in _changes(patches).items():
    new = _fetch(model, address, change)
    back = (new.astype(np.float32) - change).astype(new.dtype)
    distance = _inflate(undo.residues[address], new)
    w = _from_place(_place(back) + distance, new.dtype)
    if zlib.crc32(w.tobytes()) != undo.checks[address]:
      raise ValueError(f"{address} was changed after it was patched; it cannot be restored")
    clean[address] = w
  return clean


def save(directory: str | pathlib.Path, undo: Undo, *, overwrite: bool = False) -> None:
  """Write what takes patches off again.

  Args:
    directory: the output, which appears when it is complete.
    undo: what `put` returned.
    overwrite: replace an existing output.
  """
  room = 1024 + 512 * len(undo.residues)
  with writer.Writer(directory, overwrite=overwrite, header_bytes=room) as out:
    for address, residue in undo.residues.items():
      out.write(address, np.frombuffer(residue, np.uint8))
    about = {"version": 1, "applied": undo.applied, "checks": dict(undo.checks)}
    out.stage.text(FILE, json.dumps(about) + "\n")


def load(directory: str | pathlib.Path) -> Undo:
  """Read what takes patches off again.

  Args:
    directory: what `save` wrote.

  Returns:
    The undo.

  Raises:
    ValueError: if it is none.
  """
  path = pathlib.Path(directory) / FILE
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
    applied = tuple((int(name), float(strength)) for name, strength in about["applied"])
    checks = about["checks"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{directory} holds no undo: {FILE}: {error!r}") from error
  tensors = safetensors.open_folder(directory)
  return Undo(applied, {a: tensors[a].tobytes() for a in checks}, checks)


def _changes(patches: Patches) -> dict[str, np.ndarray]:
  """Add all patches' changes, each scaled, in order."""
  total: dict[str, np.ndarray] = {}
  for signature, strength in patches:
    for address, leaf in signature.items():
      change = np.float32(strength) * np.asarray(leaves.dense(leaf), np.float32)
      total[address] = total[address] + change if address in total else change
  return total


def _fetch(model: Mapping[str, Any], address: str, change: np.ndarray) -> np.ndarray:
  if address not in model:
    raise ValueError(f"the patch changes {address}, which the model lacks")
  w = np.asarray(model[address])
  if w.shape != change.shape:
    raise ValueError(f"{address}: the patch has shape {change.shape}, the model {w.shape}")
  return w


def _names(patches: Patches) -> tuple[tuple[int, float], ...]:
  out = []
  for signature, strength in patches:
    total = 0
    for address in sorted(signature):
      total = zlib.crc32(address.encode(), total)
      total = zlib.crc32(np.asarray(leaves.dense(signature[address]), np.float32).tobytes(), total)
    out.append((total, float(strength)))
  return tuple(out)


def _unsigned(dtype: Any) -> np.dtype:
  return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")


def _place(x: np.ndarray) -> np.ndarray:
  """Number the representable values in their order, as unsigned integers."""
  kind = _unsigned(x.dtype)
  bits = np.ascontiguousarray(x).view(kind)
  top = kind.type(1 << (8 * kind.itemsize - 1))
  return np.where(bits & top, ~bits, bits | top)


def _from_place(place: np.ndarray, dtype: Any) -> np.ndarray:
  kind = place.dtype
  top = kind.type(1 << (8 * kind.itemsize - 1))
  return np.where(place & top, place ^ top, ~place).view(dtype)


def _deflate(distance: np.ndarray) -> bytes:
  """Fold signs into the lowest bit, split into planes of bytes, deflate."""
  signed = distance.view(np.dtype(f"int{8 * distance.itemsize}"))
  folded = (distance << 1) ^ (signed >> (8 * distance.itemsize - 1)).view(distance.dtype)
  planes = folded.reshape(-1, 1).view(np.uint8)
  return zlib.compress(np.ascontiguousarray(planes.T).tobytes(), 9)


def _inflate(data: bytes, like: np.ndarray) -> np.ndarray:
  kind = _unsigned(like.dtype)
  planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(kind.itemsize, -1)
  folded = np.ascontiguousarray(planes.T).view(kind).reshape(like.shape)
  return (folded >> 1) ^ (~(folded & 1) + kind.type(1))
