# SPDX-License-Identifier: Apache-2.0
"""A matrix of few different columns."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core.leaves import base


@base.container(("centroids", "index"))
class ClusteredColumns(base.Compressed):
  """Hold a matrix whose columns are drawn from a few: a head over a clustered vocabulary.

  Attributes:
    centroids: (..., rows, K), array or leaf.
    index: (..., 1, cols), integers below K, the column that each column is.
  """

  centroids: base.Part
  index: base.Part

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.centroids.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.index.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.index.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.centroids.dtype

  def dense(self) -> jax.Array:
    """Repeat the columns."""
    index = self.index.astype(jnp.int32)
    return jnp.take_along_axis(base.dense(self.centroids), index, axis=-1)
