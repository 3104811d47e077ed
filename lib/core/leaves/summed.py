# SPDX-License-Identifier: Apache-2.0
"""Sums of leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core.leaves import base


@base.container(("parts",))
class Sum(base.Compressed):
  """Hold a sum of leaves: a quantized base plus low-rank, outlier or adapter terms.

  Attributes:
    parts: arrays or compressed leaves of one logical shape; the first is the base and
      gives the dtype.
  """

  parts: tuple[Any, ...]

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.parts[0].shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.parts[0].shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.parts[0].shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value: the base's."""
    return self.parts[0].dtype

  def dense(self) -> jax.Array:
    """Add the parts in float32."""
    total = sum(base.dense(p).astype(jnp.float32) for p in self.parts)
    return jnp.asarray(total).astype(self.dtype)
