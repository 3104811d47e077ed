# SPDX-License-Identifier: Apache-2.0
"""A kernel whose inputs are quantized when it is multiplied by."""

import jax
import jax.numpy as jnp

from treesurgeon.core import formats
from treesurgeon.core.leaves import base


@base.container(("weight", "scale"))
class ActivationQuantized(base.Around):
  """Hold a kernel, compressed or not, and how its inputs are quantized: the A8 of W8A8.

  Attributes:
    weight: array or compressed leaf.
    scale: (..., 1, 1), the inputs' scale where it is static; None takes it from each token's (or
      the whole input's) largest magnitude.
    bits: width of an input.
    format: "int" or a table of `core.formats`, such as "e4m3fn".
    per: "token" or "tensor": what shares a dynamic scale.
  """

  weight: base.Part
  scale: base.Part
  bits: int = 8
  format: str = "int"
  per: str = "token"

  def dense(self) -> jax.Array:
    """Compute the weight's dense value; what happens to inputs is not part of it."""
    return base.dense(self.weight)

  def scales_of(self, x: jax.Array) -> jax.Array:
    """Compute the scale of each input vector, float32, shape (..., 1)."""
    if self.scale is not None:
      return jnp.broadcast_to(self.scale.reshape((1,) * x.ndim), (*x.shape[:-1], 1))
    top = jnp.abs(x.astype(jnp.float32)).max(
      axis=-1 if self.per == "token" else None, keepdims=True
    )
    scale = _divide(top, jnp.float32(formats.divisor(self.format, self.bits)))
    return jnp.broadcast_to(jnp.where(scale == 0, 1.0, scale), (*x.shape[:-1], 1))

  def codes_of(self, x: jax.Array, scales: jax.Array) -> jax.Array:
    """Round inputs to units of their scales, float32: whole numbers, or values of the table."""
    units = _divide(x.astype(jnp.float32), scales)
    if self.format == "int":
      half = 2.0 ** (self.bits - 1)
      return jnp.clip(jnp.round(units), -half, half - 1)
    if self.format in ("e4m3fn", "e5m2"):  # which hardware rounds to
      top = formats.divisor(self.format, self.bits)
      return jnp.clip(units, -top, top).astype(f"float8_{self.format}").astype(jnp.float32)
    table = jnp.asarray(formats.levels(self.format, self.bits))
    return table[formats.encode(units, self.format, self.bits)]


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """Divide as IEEE says. XLA multiplies by the reciprocal of what is broadcast, and one bit counts:
  a token's largest input lies half way between two codes, -127.5 units.
  """
  return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, x.shape))
