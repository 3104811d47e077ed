# SPDX-License-Identifier: Apache-2.0
"""N of every M weights."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("values", "positions"))
class SparseTensor(base.Compressed):
  """Hold N of every M consecutive input rows of each column (N:M sparsity).

  Attributes:
    values: (..., rows // m * n, cols), the kept weights in row order, array or leaf.
    positions: their place within the run of m, packed as `ceil(log2 m)`-bit codes.
    rows, cols: the matrix shape; rows is a multiple of m.
    n, m: how many are kept of how many.
  """

  values: base.Part
  positions: base.Part
  rows: int
  cols: int
  n: int
  m: int

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.values.dtype

  def dense(self) -> jax.Array:
    """Scatter the kept values back to their rows."""
    kept, runs = self.rows // self.m * self.n, self.rows // self.m
    bits = max(1, (self.m - 1).bit_length())
    place = packing.unpack(self.positions, bits=bits, rows=kept)
    shape = (*self.batch, runs, self.n, 1, self.cols)
    lane = jnp.arange(self.m, dtype=jnp.uint8).reshape((1,) * (len(shape) - 2) + (self.m, 1))
    hit = place.reshape(shape) == lane
    values = base.dense(self.values).reshape(shape)
    full = jnp.where(hit, values, jnp.zeros((), self.dtype)).sum(axis=-3)
    return full.reshape(self.shape).astype(self.dtype)
