# SPDX-License-Identifier: Apache-2.0
"""Load a Hugging Face directory into memory, near the speed at which its bytes can be read."""

import concurrent.futures
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, model, paths
from treesurgeon.io import blocks, checkpoint

_ALIGN = 64  # bytes; lets JAX take a host buffer on the CPU without a copy


def load(
  directory: str | Path,
  *,
  dtype: Any = None,
  place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> model.Model:
  """Load a directory whole, near the speed at which its bytes can be read.

  Each stacked array is allocated once, filled layer by layer, and put on the device at once.

  Args:
    directory: config.json and safetensors.
    dtype: what floating arrays become; None keeps theirs. Compressed leaves stay.
    place: (address within the segment, host array) -> global array, for sharded loading; the
      address is like "layers/0:12/mlp/up/kernel". None puts it on the default device.

  Returns:
    The model, with the lineage the directory records.

  Raises:
    ValueError: as `Checkpoint`.
  """
  source = checkpoint.Checkpoint(directory)
  put = place or (lambda _, x: jax.device_put(x, may_alias=True))  # nobody else writes to it
  tree = paths.unflatten({a: source.struct(a) for a in source.addresses()})
  flat = {}
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for name, struct in paths.walk(tree).items():
      flat[name] = _gather(source, name, struct, pool, put)
      plain = not leaves.is_leaf(struct) and jnp.issubdtype(struct.dtype, jnp.floating)
      if dtype is not None and plain:
        flat[name] = flat[name].astype(dtype)
  return model.Model(source.spec, paths.nest(flat), source.lineage)


def _gather(source: checkpoint.Checkpoint, name: str, struct: Any, pool: Any, put: Callable) -> Any:
  """Read one stacked leaf, or one outside the layers."""
  parts = name.split("/", 2)
  if parts[0] == "layers":
    start, stop = map(int, parts[1].split(":"))
    addresses = [f"layers/{i}/{parts[2]}" for i in range(start, stop)]
  else:
    addresses = [name]
  for address in addresses:
    source.prefetch(address)
  out = jax.tree.map(lambda s: _empty(s.shape, s.dtype), struct)

  def fill(i: int) -> None:
    leaf = source.leaf(addresses[i])
    for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(leaf), strict=True):
      blocks.copy(whole[i] if parts[0] == "layers" else whole, part)

  list(pool.map(fill, range(len(addresses))))
  return jax.tree.map(lambda x: put(name, x), out)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  raw = np.empty(size + _ALIGN, np.uint8)
  start = -raw.ctypes.data % _ALIGN
  return raw[start : start + size].view(dtype).reshape(shape)
