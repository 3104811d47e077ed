# SPDX-License-Identifier: Apache-2.0
"""Some input rows in one leaf, the others in another."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("first", "rest", "mask"))
class SplitRows(base.Compressed):
  """Hold a matrix whose salient rows are stored otherwise than the rest, each in its order.

  Attributes:
    first: (..., some rows, cols), array or leaf: the rows where the mask is 1.
    rest: (..., the other rows, cols), array or leaf; gives the dtype.
    mask: (..., bytes, 1), packed bits, one a row.
  """

  first: base.Part
  rest: base.Part
  mask: base.Part

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.first.shape[-2] + self.rest.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.rest.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.rest.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value: that of the rest."""
    return self.rest.dtype

  def order(self) -> jax.Array:
    """List the matrix rows that the stored rows are, the first part's before the rest's."""
    mask = packing.unpack(self.mask, bits=1, rows=self.rows)[..., 0]
    return jnp.argsort(1 - mask.astype(jnp.int32), axis=-1, stable=True)

  def dense(self) -> jax.Array:
    """Put the rows in their places."""
    parts = [base.dense(x).astype(self.dtype) for x in (self.first, self.rest)]
    place = jnp.argsort(self.order(), axis=-1)
    return jnp.take_along_axis(jnp.concatenate(parts, axis=-2), place[..., None], axis=-2)
