# SPDX-License-Identifier: Apache-2.0
"""Vectors of codebooks as 8-bit integers: what a TPU multiplies by, made once.

On a TPU vectors of codebooks are a format to keep weights in, not one to compute with. Its vector
units look 128 entries of a register up at a time; vectors of four rows out of 256 entries took an
earlier prototype 37, 27 and 21 us of a 4096 x 4096 matrix on v5e, v6e and tpu7x by the compiler's
count, where the product of 8-bit integers is predicted to take 21, 11 and 5 and the dense bfloat16
product 41, 21 and 9. `kernels.prepare` therefore makes integers of them, with a scale for 128 rows
of a column: an error of at most half a step, 1 / 254 of the largest weight of its group, which is a
tenth and less of what vector quantization itself changes. Vectors are kept beside the integers, so
that `restore` gives them back; memory is 8.25 bits a weight and the vectors' own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import layouts, prepared


@base.container(("weight", "original"))
class Transcoded(prepared.Instead):
  """Hold vectors of codebooks, and the integers that are multiplied by in their place.

  Attributes:
    weight: the prepared integers.
    original: Codebook, or a Sum of them.
    target: name of the device.
  """

  weight: base.Part
  original: base.Part
  target: str

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.original.rows

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.original.cols

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return self.original.batch

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.original.dtype

  def restore(self) -> Any:
    """Return the vectors."""
    return self.original


def takes(leaf: Any) -> bool:
  """Tell whether a leaf is vectors of codebooks, or a sum of such.

  Args:
    leaf: array or compressed leaf.

  Returns:
    Whether it is.

  Example:
    >>> takes(jnp.ones((2, 3)))
    False
  """
  parts = leaf.parts if isinstance(leaf, leaves.Sum) else (leaf,)
  return all(isinstance(part, leaves.Codebook) for part in parts)


@functools.partial(jax.jit, static_argnames=("target",))
def transcode(leaf: Any, target: str) -> leaves.QuantizedTensor:
  """Round vectors to 8-bit integers, a scale for 128 rows of a column.

  Args:
    leaf: Codebook, or a Sum of them.
    target: name of the device; it makes no difference.

  Returns:
    The integers; each weight differs by at most half a scale.

  Example:
    >>> leaf = leaves.Codebook(jnp.ones((1, 1), jnp.uint8), jnp.array([[0.0, 0.0], [2.0, -1.0]]),
    ...                        2, 1, 8, 2)
    >>> transcode(leaf, "tpu-v6e").codes.tolist()
    [[255], [64]]
  """
  del target
  size = min(layouts.GROUP, leaf.rows)

  def one(leaf: Any) -> tuple[jax.Array, jax.Array]:
    w = leaf.dense().astype(jnp.float32)
    groups = jnp.pad(w, [(0, -leaf.rows % size), (0, 0)]).reshape(-1, size, leaf.cols)
    top = jnp.abs(groups).max(axis=1)
    scales = jnp.where(top > 0, top / 127, 1)
    codes = jnp.round(groups / scales[:, None]) + 128
    return codes.reshape(-1, leaf.cols)[: leaf.rows].astype(jnp.uint8), scales

  each: Any = one
  for _ in leaf.batch:  # one after the other: dense matrices are large
    each = functools.partial(jax.lax.map, each)
  codes, scales = each(leaf)
  return leaves.QuantizedTensor(
    codes, scales, None, None, rows=leaf.rows, cols=leaf.cols, bits=8, group_size=size,
    store=jnp.dtype(leaf.dtype).name,
  )  # fmt: skip
