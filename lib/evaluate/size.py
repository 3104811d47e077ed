# SPDX-License-Identifier: Apache-2.0
"""How big a model is: weights, bytes in memory and on disk, bits a weight."""

import dataclasses
from pathlib import Path

from treesurgeon.core import leaves, paths
from treesurgeon.core import model as model_lib


@dataclasses.dataclass(frozen=True)
class Size:
  """A model's size; scales, indices and zero points of compressed leaves are counted.

  Attributes:
    parameters: logical weights.
    nbytes: bytes in memory.
    bits_per_weight: over the whole model.
    compressed_parameters: logical weights in compressed leaves.
    compressed_bits_per_weight: over compressed leaves; None if there are none.
  """

  parameters: int
  nbytes: int
  bits_per_weight: float
  compressed_parameters: int
  compressed_bits_per_weight: float | None

  def to_json(self) -> dict[str, float | int | None]:
    """Return the figures by name."""
    return dataclasses.asdict(self)


def in_memory(model: model_lib.Model) -> Size:
  """Measure a model in memory.

  Args:
    model: any model; shapes in place of arrays will do.

  Returns:
    Its size.

  Example:
    >>> import jax.numpy as jnp
    >>> in_memory(model_lib.Model(None, {"w": jnp.zeros((4, 4), jnp.bfloat16)})).bits_per_weight
    16.0
  """
  held = list(paths.walk(model.params).values())
  packed = [x for x in held if leaves.is_leaf(x)]
  weights, nbytes = sum(x.size for x in held), sum(leaves.nbytes(x) for x in held)
  inside = sum(x.size for x in packed)
  bits = sum(leaves.nbytes(x) for x in packed) * 8
  return Size(
    parameters=weights,
    nbytes=nbytes,
    bits_per_weight=nbytes * 8 / max(1, weights),
    compressed_parameters=inside,
    compressed_bits_per_weight=bits / inside if inside else None,
  )


def on_disk(directory: str | Path, *, pattern: str = "*") -> int:
  """Add up the sizes of a folder's files, folders inside included.

  Args:
    directory: the folder; a file counts itself.
    pattern: glob over file names, such as "*.safetensors" for the weights alone.

  Returns:
    Bytes.

  Raises:
    ValueError: if there is no such folder.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...   Path(d, "a.bin").write_bytes(b"123") and on_disk(d)
    3
  """
  path = Path(directory)
  if not path.exists():
    raise ValueError(f"{path} does not exist, so it has no size")
  if path.is_file():
    return path.stat().st_size
  return sum(p.stat().st_size for p in path.rglob(pattern) if p.is_file())
