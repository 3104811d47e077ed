# SPDX-License-Identifier: Apache-2.0
"""Vectors from a table."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("codes", "codebook", "scales"))
class Codebook(base.Compressed):
  """Hold indices into a table of short vectors (vector quantization).

  A vector covers a tile of `length` rows and `width` columns; the last tiles may stick out. A `Sum`
  of these is residual or additive quantization.

  Attributes:
    codes: packed indices, (..., bytes, tiles across): one a tile.
    codebook: (..., books * entries, length * width); row by row of a tile.
    rows, cols: the matrix shape, input dimension first.
    bits: width of an index, 1 to 16.
    length: rows that a vector covers.
    scales: (..., 1, cols) multiplies the columns, or None.
    width: columns that a vector covers.
    books: how many tables; each serves a run of columns, of equal length but the last.
  """

  codes: base.Part
  codebook: base.Part
  rows: int
  cols: int
  bits: int
  length: int
  scales: base.Part = None
  width: int = 1
  books: int = 1

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return tuple(self.codes.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.codebook.dtype

  def indices(self) -> jax.Array:
    """Unpack the index of every tile, (..., tiles down, tiles across) int32."""
    down = -(-self.rows // self.length)
    index = packing.unpack(self.codes, bits=self.bits, rows=down).astype(jnp.int32)
    if self.books == 1:
      return index
    across, entries = index.shape[-1], self.codebook.shape[-2] // self.books
    book = jnp.arange(across) // -(-across // self.books)
    return index + (entries * book).reshape((1,) * (index.ndim - 1) + (across,))

  def dense(self) -> jax.Array:
    """Look every index up."""
    index = self.indices()
    *batch, down, across = index.shape

    def look(book: jax.Array, idx: jax.Array) -> jax.Array:
      tiles = book[idx].reshape(down, across, self.length, self.width)
      return jnp.swapaxes(tiles, 1, 2).reshape(down * self.length, across * self.width)

    for _ in batch:
      look = jax.vmap(look)
    found = look(self.codebook, index)[..., : self.rows, : self.cols]
    if self.scales is None:
      return found
    wide = base.dense(self.scales).astype(jnp.float32)
    return (found.astype(jnp.float32) * wide).astype(self.dtype)
