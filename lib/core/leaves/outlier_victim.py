# SPDX-License-Identifier: Apache-2.0
"""Pairs of codes in which an outlier takes the place of its neighbour."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import packing
from treesurgeon.core.leaves import base

THRESHOLD = 32.0  # units that part normal values from outliers
FLINT = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)


def normals(bits: int, *, flint: bool) -> np.ndarray:
  """List the magnitudes of normal values, one a code without its sign.

  Args:
    bits: width of a code, 4 or 8.
    flint: whether they are ANT's flint numbers (4 bits only); else they are evenly spaced.

  Returns:
    float32, 2^(bits - 1) of them, in units of which 32 is the threshold.

  Example:
    >>> normals(4, flint=False).tolist()
    [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0]
  """
  half = 2 ** (bits - 1)
  return np.asarray(FLINT if flint else np.arange(half) * (THRESHOLD / half), np.float32)


def outliers(bits: int) -> np.ndarray:
  """List the magnitudes of outliers, floats of two exponent bits (`abfloat`).

  Args:
    bits: width of a code, 4 or 8.

  Returns:
    float32, 2^(bits - 1) - 1 of them, those of the codes 1, 2, ...: code 0 would be the threshold
    itself and is not used.

  Example:
    >>> outliers(4).tolist()
    [48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0]
  """
  steps = 2 ** (bits - 3)
  code = np.arange(1, 4 * steps)
  return np.ldexp(THRESHOLD * (1 + code % steps / steps), code // steps).astype(np.float32)


@base.container(("codes", "scales", "flint"))
class OutlierVictim(base.Compressed):
  """Hold rows 2i and 2i + 1 as pairs: two normal values, or an outlier and its victim, a zero.

  A code is a sign, the highest bit, and a magnitude. Minus zero is the identifier: it marks the
  victim, whose neighbour is then read as an outlier.

  Attributes:
    codes: bytes, (..., packed_rows(rows, bits), cols), an even number of rows.
    scales: (..., 1, cols), floating point.
    flint: (..., 1, 1) uint8, whether normal values are flint numbers; None means integers.
    rows, cols: the matrix shape, input dimension first.
    bits: width of a code, 4 or 8.
    store: name of the dtype of the dense value.
  """

  codes: base.Part
  scales: base.Part
  flint: base.Part
  rows: int
  cols: int
  bits: int = 4
  store: str = "float32"

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  def units(self) -> jax.Array:
    """Decode the pairs, float32, (..., rows, cols), in units of the scales."""
    half = 2 ** (self.bits - 1)
    even = self.rows + self.rows % 2
    codes = packing.unpack(self.codes, bits=self.bits, rows=even)
    pairs = codes.reshape(*self.batch, even // 2, 2, self.cols)
    beside = jnp.flip(pairs, axis=-2) == half
    magnitude = pairs % half
    plain = jnp.asarray(normals(self.bits, flint=False))[magnitude]
    if self.flint is not None:
      other = jnp.asarray(normals(self.bits, flint=True))[magnitude]
      plain = jnp.where(self.flint[..., None, :, :] == 1, other, plain)
    far = jnp.asarray(np.append(np.float32(0), outliers(self.bits)))[magnitude]
    size = jnp.where(beside, far, plain)
    signed = jnp.where(pairs > half, -size, size).reshape(*self.batch, even, self.cols)
    return signed[..., : self.rows, :]

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    return (self.units() * self.scales.astype(jnp.float32)).astype(self.dtype)
