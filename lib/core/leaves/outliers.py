# SPDX-License-Identifier: Apache-2.0
"""A few single weights of a matrix, the rest zero."""

import jax.numpy as jnp
import numpy as np

from treesurgeon.core.leaves import base


@base.container(("values", "positions"))
class Outliers(base.Compressed):
  """Hold single weights and where they are; zero elsewhere.

  Added to a quantized base in a `Sum` it makes SpQR's and GWQ's leaves.

  Attributes:
    values: (..., 1, count).
    positions: (..., 1, count) int32, `row * cols + col`, each once.
    rows, cols: the matrix shape, input dimension first.
  """

  values: base.Part
  positions: base.Part
  rows: int
  cols: int

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.values.dtype

  def dense(self) -> base.Part:
    """Scatter the values into zeros."""
    count = self.values.shape[-1]
    at = jnp.reshape(self.positions, (-1, count))
    lead = jnp.arange(at.shape[0])[:, None]
    flat = jnp.zeros((at.shape[0], self.rows * self.cols), self.dtype)
    return flat.at[lead, at].add(jnp.reshape(self.values, (-1, count))).reshape(self.shape)
