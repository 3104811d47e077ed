# SPDX-License-Identifier: Apache-2.0
"""Many fine-tuned models in one directory: their merged model, and a bit an entry for each.

The storage of TALL masks (Wang et al., 2024, arXiv 2405.07813). Beside the base, which is not
copied, a store holds θ₀ + τ_mt once, in the storage dtype, and for each task its packed mask.
Serving is a select between the two models, so it gives the bits of `merge.tall_masks` in any
dtype, without arithmetic. Written and served leaf by leaf, so that neither the models nor the store
need fit in memory. Mask bits run along a leaf's rows (`core.packing`).
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8

from treesurgeon.core import leaves, needs, packing, programs, step
from treesurgeon.io import safetensors, writer
from treesurgeon.merge import tall_masks
from treesurgeon.merge import weights as weights_lib

FILE = "task_store.json"
VERSION = 1
MASKS = "masks"
MERGED = "merged"


def save(
  directory: str | pathlib.Path,
  base: needs.Source,
  donors: Sequence[needs.Source],
  *,
  names: Sequence[str] | None = None,
  lam: float | Sequence[float] = 0.4,
  weights: Sequence[float] | None = None,
  overwrite: bool = False,
) -> None:
  """Write the merged model and every donor's mask.

  Args:
    directory: the output, which appears when it is complete.
    base: the model that was fine-tuned; serving needs it again.
    donors: the fine-tuned models.
    names: the tasks' names; None numbers them.
    lam: λ_t, for all donors or one a donor, see `tall_masks.choose`.
    weights: one number a donor in the multi-task vector; None means ones.
    overwrite: replace an existing output.

  Raises:
    ValueError: for wrong counts, leaves of different shape, or an existing output.
  """
  names = [str(i) for i in range(len(donors))] if names is None else list(names)
  if len(names) != len(donors) or len(set(names)) != len(names):
    raise ValueError(f"names={names} must be {len(donors)} different names, one a donor")
  lams = weights_lib.each(
    lam if isinstance(lam, int | float) else tuple(lam), len(donors), name="lam"
  )
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  knobs = {"lam": tuple(map(np.float32, lams)), "weights": tuple(map(np.float32, weight))}
  encode = programs.compiled(_encode, ())
  with writer.Writer(directory, overwrite=overwrite) as out:
    for address in base.addresses():
      w = leaves.dense(base.leaf(address))
      given = tuple(leaves.dense(d.leaf(address)) for d in donors)
      step.check_donors(address, w, given)
      merged, packed = encode(w, {"donors": given, **knobs})
      out.write(f"{MERGED}/{address}", merged)
      for i, bits in enumerate(packed):
        out.write(f"{MASKS}/{i}/{address}", bits)
    about = {"version": VERSION, "tasks": names, "lam": list(lams), "weights": list(weight)}
    out.stage.text(FILE, json.dumps(about, indent=2) + "\n")


class Store:
  """An opened store; tensors are read when they are asked for.

  Args:
    directory: what `save` wrote.

  Attributes:
    tasks: the tasks' names.
    lam: λ of each task.

  Raises:
    ValueError: if it is no store, or of an unknown version.
  """

  def __init__(self, directory: str | pathlib.Path):
    self.directory = pathlib.Path(directory)
    try:
      about = json.loads((self.directory / FILE).read_text(encoding="utf-8"))
      self.tasks: list[str] = list(about["tasks"])
      self.lam: list[float] = list(about["lam"])
      version = about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{self.directory} is no task store: {FILE}: {error!r}") from error
    if version != VERSION:
      raise ValueError(f"{self.directory}: version {version} of {FILE}; known: {VERSION}")
    self._tensors = safetensors.open_folder(self.directory)

  def serve(self, base: needs.Source, task: str | int) -> "Served":
    """Rebuild one task's model over the base, lazily.

    Args:
      base: the model that `save` was given.
      task: a name, or a place among them.

    Returns:
      A source, which drivers stream and `Served.leaf` reads.

    Raises:
      ValueError: for an unknown task.
    """
    names: Sequence[Any] = self.tasks if isinstance(task, str) else range(len(self.tasks))
    if task not in names:
      raise ValueError(f"{self.directory} has no task {task!r}; it has {', '.join(self.tasks)}")
    return Served(self, base, list(names).index(task))

  def tensor(self, name: str) -> np.ndarray:
    """Read one tensor of the store.

    Args:
      name: as `save` writes it.

    Returns:
      A view into the file.

    Raises:
      ValueError: if it is not there.
    """
    if name not in self._tensors:
      raise ValueError(f"{self.directory} lacks {name}; was it made from another base?")
    return self._tensors[name]

  def nbytes(self) -> int:
    """Count the bytes of the store's files."""
    return sum(f.stat().st_size for f in self.directory.iterdir() if f.is_file())


class Served:
  """One task's model, rebuilt leaf by leaf; a `needs.Source`."""

  def __init__(self, store: Store, base: needs.Source, place: int):
    self._store, self._base, self._place = store, base, place

  @property
  def spec(self) -> Any:
    """Architecture description."""
    return self._base.spec

  def addresses(self) -> Sequence[str]:
    """List the addresses of every leaf."""
    return self._base.addresses()

  def leaf(self, address: str) -> jax.Array:
    """Rebuild one leaf."""
    w = leaves.dense(self._base.leaf(address))
    merged = self._store.tensor(f"{MERGED}/{address}")
    if merged.shape != tuple(w.shape) or merged.dtype != w.dtype:
      raise ValueError(
        f"{address}: the store holds {merged.dtype}{list(merged.shape)}, the base "
        f"{w.dtype}{list(w.shape)}; serve over the base that it was made from"
      )
    bits = self._store.tensor(f"{MASKS}/{self._place}/{address}")
    return programs.compiled(_decode, ())(
      w, {"merged": jnp.asarray(merged), "bits": jnp.asarray(bits)}
    )

  def struct(self, address: str) -> jax.ShapeDtypeStruct:
    """Describe one leaf without reading it."""
    merged = self._store.tensor(f"{MERGED}/{address}")
    return jax.ShapeDtypeStruct(merged.shape, merged.dtype)


def ratio(store: Store, base: needs.Source, *, with_base: bool = True) -> float:
  """Compare a store's bytes with those of all the tasks' checkpoints.

  Args:
    store: the store.
    base: the base model, which serving needs.
    with_base: whether to count the base to the store's side.

  Returns:
    bytes(store [+ base]) / bytes(T checkpoints), the checkpoints counted in the base's dtypes.
  """
  one = sum(_dense_bytes(base.leaf(a)) for a in base.addresses())
  return (store.nbytes() + with_base * one) / (len(store.tasks) * one)


def pack_mask(mask: Bool[Array, "*shape"]) -> UInt8[Array, "*bytes"]:
  """Pack a mask, eight entries of a column to a byte.

  Args:
    mask: array of one or more axes, or a scalar.

  Returns:
    Bytes; the row axis (the last but one, or the only one) is an eighth as long.

  Example:
    >>> pack_mask(jnp.array([True, False, True])).tolist()
    [[5]]
  """
  columns = mask.reshape(-1, 1) if mask.ndim < 2 else mask
  return packing.pack(columns.astype(jnp.uint8), bits=1)


def unpack_mask(packed: UInt8[Array, "*bytes"], shape: Sequence[int]) -> Bool[Array, "*shape"]:
  """Unpack what `pack_mask` returned.

  Args:
    packed: bytes.
    shape: of the mask.

  Returns:
    The mask.

  Example:
    >>> unpack_mask(jnp.array([[5]], jnp.uint8), (3,)).tolist()
    [True, False, True]
  """
  rows = shape[-2] if len(shape) > 1 else int(np.prod(shape))
  return (packing.unpack(packed, bits=1, rows=rows) == 1).reshape(tuple(shape))


def _encode(w: jax.Array, donors: tuple[jax.Array, ...], **knobs: Any) -> tuple:
  merged, found = tall_masks.masks(w, donors, **knobs)
  return (w.astype(jnp.float32) + merged).astype(w.dtype), tuple(pack_mask(m) for m in found)


def _decode(w: jax.Array, merged: jax.Array, bits: jax.Array) -> jax.Array:
  return jnp.where(unpack_mask(bits, w.shape), merged, w)


def _dense_bytes(leaf: Any) -> int:
  return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
