# SPDX-License-Identifier: Apache-2.0
"""Signs times a low-rank magnitude: one block of a stack that may be cut anywhere."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base


@base.container(("signs", "a", "b", "order"))
class SignedLowRank(base.Compressed):
  """Hold the elementwise product of signs and a product of thin factors.

  Attributes:
    signs: (..., bytes, cols), packed bits along the rows, 1 for plus and 0 for minus.
    a: (..., rows, rank), an array or a leaf.
    b: (..., rank, cols), likewise.
    order: (..., 1, 1) int32, the block's place among all of a model's: those of a higher one go
      first when it must become smaller. None where it stands alone.
    store: name of the dtype of the dense value.
  """

  signs: base.Part
  a: base.Part
  b: base.Part
  order: base.Part = None
  store: str = "float32"

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.a.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.b.shape[-1]

  @property
  def rank(self) -> int:
    """Inner dimension."""
    return self.a.shape[-1]

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  def dense(self) -> jax.Array:
    """Multiply the factors in float32 and give them their signs."""
    a, b = (base.dense(x).astype(jnp.float32) for x in (self.a, self.b))
    bits = packing.unpack(self.signs, bits=1, rows=self.rows)
    product = jnp.matmul(a, b, precision="highest")
    return jnp.where(bits == 1, product, -product).astype(self.dtype)
