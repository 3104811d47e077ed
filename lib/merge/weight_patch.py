# SPDX-License-Identifier: Apache-2.0
"""Weight patches: robust weight signatures as small files.

A signature (see `robust_weight_signatures`) covers the first layers only, and rounding to nearest
makes its matrices smaller still; Cai et al., 2023 (arXiv 2302.12480), report files up to 13 times
smaller than a copy of the model. `patching` puts them on a model and takes them off again.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, needs, programs, step
from treesurgeon.io import safetensors, writer
from treesurgeon.merge import robust_weight_signatures as rws

FILE = "patch.json"
Signature = Mapping[str, Any]


def extract(
  robust: needs.Source,
  pretrained: needs.Source,
  standard: needs.Source,
  *,
  layers: int = 4,
  select: str | None = None,
) -> dict[str, Any]:
  """Extract a robust model's signature, leaf by leaf.

  Args:
    robust: trained on shifted data.
    pretrained: what it and `standard` started from.
    standard: trained on clean data.
    layers: how many of the first layers it covers.
    select: regular expression over addresses in the place of `layers`.

  Returns:
    Address to float32 array.

  Raises:
    ValueError: if nothing is selected.
  """
  pattern = rws.first_layers(layers) if select is None else select
  found = {}
  for address in standard.addresses():
    if re.fullmatch(pattern, address):
      w, r, p = (leaves.dense(m.leaf(address)) for m in (standard, robust, pretrained))
      step.check_donors(address, w, (r, p))
      found[address] = programs.compiled(_extract, ())(w, {"robust": r, "pretrained": p})
  if not found:
    raise ValueError(f"no address matches {pattern!r}")
  return found


def quantize(signature: Signature, *, bits: int = 8, group_size: int = 128) -> dict[str, Any]:
  """Quantize a signature's matrices; vectors stay as they are.

  Args:
    signature: address to array.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale.

  Returns:
    Address to leaf.

  Example:
    >>> small = quantize({"w": jnp.ones((8, 4)), "b": jnp.ones(4)}, bits=4)
    >>> small["w"].bits, small["b"].dtype.name
    (4, 'float32')
  """
  out = {}
  for address, delta in signature.items():
    if delta.ndim < 2:
      out[address] = delta
      continue
    size = grids.clamp_group(group_size, delta.shape[-2])
    codes, grid = rtn.quantize(jnp.asarray(delta), bits=bits, group_size=size)
    out[address] = grids.tensor(codes, grid, bits=bits, group_size=size, store=jnp.dtype("float32"))
  return out


def save(directory: str | pathlib.Path, signature: Signature, *, overwrite: bool = False) -> None:
  """Write a signature as a patch file.

  Args:
    directory: the output, which appears when it is complete.
    signature: address to array or compressed leaf.
    overwrite: replace an existing output.
  """
  metas = {}
  room = 1024 + 512 * len(signature)  # the usual room for a header would outweigh a small patch
  with writer.Writer(directory, overwrite=overwrite, header_bytes=room) as out:
    for address, leaf in signature.items():
      metas[address], arrays = leaves.to_parts(leaf)
      for part, array in arrays.items():
        out.write(f"{address}:{part}", array)
    out.stage.text(FILE, json.dumps({"version": 1, "leaves": metas}) + "\n")


def load(directory: str | pathlib.Path) -> dict[str, Any]:
  """Read a patch file.

  Args:
    directory: what `save` wrote.

  Returns:
    Address to array or compressed leaf.

  Raises:
    ValueError: if it is no patch.
  """
  path = pathlib.Path(directory) / FILE
  try:
    metas = json.loads(path.read_text(encoding="utf-8"))["leaves"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{directory} is no weight patch: {FILE}: {error!r}") from error
  tensors = safetensors.open_folder(directory)
  parts: dict[str, dict[str, Any]] = {a: {} for a in metas}
  for name in tensors:
    address, _, part = name.rpartition(":")
    parts[address][part] = jnp.asarray(tensors[name])
  return {a: leaves.from_parts(meta, parts[a]) for a, meta in metas.items()}


def size_ratio(directory: str | pathlib.Path, base: needs.Source) -> float:
  """Compare a patch's files with a full copy of the model.

  Args:
    directory: what `save` wrote.
    base: a model of the patched one's shapes and dtypes.

  Returns:
    bytes of the patch / bytes of the model's leaves.
  """
  files = sum(f.stat().st_size for f in pathlib.Path(directory).iterdir() if f.is_file())
  whole = 0
  for address in base.addresses():
    leaf = base.struct(address)
    whole += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
  return files / whole


def _extract(w: Any, robust: Any, pretrained: Any) -> Any:
  return rws.extract(robust, pretrained, w)
