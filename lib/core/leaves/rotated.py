# SPDX-License-Identifier: Apache-2.0
"""A kernel whose inputs are turned by a Hadamard matrix when it is multiplied by."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import hadamard
from treesurgeon.core.leaves import base


@base.container(("weight",))
class Rotated(base.Compressed):
  """Hold a kernel W as Hᵀ W, compressed or not; inputs become x H, so that the product is x W.

  Attributes:
    weight: Hᵀ W, array or compressed leaf; H is `hadamard.matrix` of its rows.
  """

  weight: base.Part

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.weight.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.weight.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.weight.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.weight.dtype

  @classmethod
  def of(cls, w: jax.Array) -> "Rotated":
    """Turn a kernel."""
    return cls(jnp.swapaxes(hadamard.transform(jnp.swapaxes(w, -1, -2)), -1, -2))

  def dense(self) -> jax.Array:
    """Turn the weight back."""
    turned = jnp.swapaxes(base.dense(self.weight), -1, -2)
    return jnp.swapaxes(hadamard.transform(turned, back=True), -1, -2)
