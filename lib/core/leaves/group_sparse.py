# SPDX-License-Identifier: Apache-2.0
"""Runs of rows of each column that are zero as a whole."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("kept", "mask"))
class GroupSparse(base.Compressed):
  """Hold as many groups of `group` rows in every column, the others being zero.

  Attributes:
    kept: (..., groups kept * group, cols), array or leaf: each column's groups in row order; of a
      group that sticks out the last rows mean nothing.
    mask: (..., bytes, cols), packed bits along the groups, 1 where one is kept.
    rows: input dimension.
    group: rows in a group.
  """

  kept: base.Part
  mask: base.Part
  rows: int
  group: int

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.kept.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.mask.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.kept.dtype

  def places(self) -> jax.Array:
    """Tell which groups are kept, (..., groups, cols), 1 or 0."""
    return packing.unpack(self.mask, bits=1, rows=-(-self.rows // self.group))

  def dense(self) -> jax.Array:
    """Put the groups in their places."""
    mask = self.places().astype(jnp.int32)
    *batch, groups, cols = mask.shape
    kept = base.dense(self.kept).reshape(*batch, -1, self.group, cols)
    which = jnp.maximum(jnp.cumsum(mask, axis=-2) - 1, 0)[..., :, None, :]
    full = jnp.where(mask[..., :, None, :] == 1, jnp.take_along_axis(kept, which, axis=-3), 0)
    return full.reshape(*batch, groups * self.group, cols)[..., : self.rows, :]
