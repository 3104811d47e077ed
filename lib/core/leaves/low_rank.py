# SPDX-License-Identifier: Apache-2.0
"""Products of thin factors."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core.leaves import base


@base.container(("a", "b"))
class LowRank(base.Compressed):
  """Hold a product of thin factors, `scale * a @ b`.

  Attributes:
    a: (..., rows, rank), an array or a leaf.
    b: (..., rank, cols), likewise.
    scale: multiplier of the product (LoRA's alpha / rank).
  """

  a: base.Part
  b: base.Part
  scale: float = 1.0

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
    return self.a.dtype

  def dense(self) -> jax.Array:
    """Multiply the factors in float32."""
    a, b = (base.dense(x).astype(jnp.float32) for x in (self.a, self.b))
    return (self.scale * jnp.matmul(a, b, precision="highest")).astype(self.dtype)
