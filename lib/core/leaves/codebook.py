# SPDX-License-Identifier: Apache-2.0
"""Vectors from a table."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("codes", "codebook"))
class Codebook(base.Compressed):
  """Hold indices into a table of short vectors along the input axis (vector quantization).

  Attributes:
    codes: packed indices, (..., bytes, cols): one a run of `length` rows.
    codebook: (..., entries, length).
    rows, cols: the matrix shape; rows is a multiple of `length`.
    bits: width of an index, 1 to 8.
    length: rows one entry covers.
  """

  codes: base.Part
  codebook: base.Part
  rows: int
  cols: int
  bits: int
  length: int

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.codebook.dtype

  def dense(self) -> jax.Array:
    """Look every index up."""
    runs = self.rows // self.length
    index = packing.unpack(self.codes, bits=self.bits, rows=runs).astype(jnp.int32)

    def look(book: jax.Array, idx: jax.Array) -> jax.Array:
      return jnp.swapaxes(book[idx], -1, -2).reshape(self.rows, self.cols)

    for _ in self.batch:
      look = jax.vmap(look)
    return look(self.codebook, index)
