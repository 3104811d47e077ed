# SPDX-License-Identifier: Apache-2.0
"""Codes of a few bits with scales: integers, small floats, tables, in groups of any shape."""

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import formats, packing
from treesurgeon.core.leaves import base


@base.container(("codes", "scales", "zeros", "group_index"))
class QuantizedTensor(base.Compressed):
  """Hold codes with one scale (and zero point) a group of weights.

  For integers `weight = (code - zero) * scale`, codes unsigned; `zeros=None` means symmetric, zero
  point `2**(bits - 1)`. For other formats `weight = levels[code] * scale`. A group is a tile of
  `group_size` rows and `group_cols` columns; the last ones may be smaller. So one scale an output
  is `group_size == rows`, one an input `group_size=1, group_cols=cols`, one a tensor both. With
  `group_index` it names each row's group (activation ordering without static groups).

  Attributes:
    codes: bytes, (..., packed_rows(rows, bits), cols), see `core.packing`; ternary codes five to
      a byte.
    scales: (..., groups of rows, groups of cols), floating point, or a leaf of that shape (double
      quantization).
    zeros: like `scales`, uint8 or floating point or a leaf; or None.
    group_index: (..., 1, rows) int32, or None.
    rows, cols: the matrix shape, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale.
    store: name of the dtype of the dense value.
    format: "int" or a table of `core.formats`.
    group_cols: columns that share a scale.
  """

  codes: base.Part
  scales: base.Part
  zeros: base.Part
  group_index: base.Part
  rows: int
  cols: int
  bits: int
  group_size: int
  store: str = "float32"
  format: str = "int"
  group_cols: int = 1

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return tuple(self.codes.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  @property
  def plain(self) -> bool:
    """Whether these are integers in groups of rows with scales as they are: what kernels take."""
    nested = base.is_leaf(self.scales) or base.is_leaf(self.zeros)
    return self.format == "int" and self.group_cols == 1 and not nested

  def integers(self) -> jax.Array:
    """Unpack the codes to uint8, (..., rows, cols)."""
    if self.format == "ternary":
      return formats.unpack_trits(self.codes, rows=self.rows)
    return packing.unpack(self.codes, bits=self.bits, rows=self.rows)

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    codes = self.integers()
    scales = self.spread(base.dense(self.scales).astype(jnp.float32))
    if self.format != "int":
      units = jnp.asarray(formats.levels(self.format, self.bits))[codes]
    elif self.zeros is None:
      units = codes.astype(jnp.float32) - 2.0 ** (self.bits - 1)
    else:
      units = codes.astype(jnp.float32) - self.spread(base.dense(self.zeros).astype(jnp.float32))
    return (units * scales).astype(self.dtype)

  def spread(self, per_group: jax.Array) -> jax.Array:
    """Repeat a (..., groups, groups) array to one row an input row, one column a column."""
    if self.group_cols >= self.cols > 1:
      per_group = jnp.broadcast_to(per_group, (*per_group.shape[:-1], self.cols))
    elif self.group_cols > 1:
      wide = jnp.repeat(per_group, self.group_cols, axis=-1)
      per_group = jax.lax.slice_in_dim(wide, 0, self.cols, axis=wide.ndim - 1)
    if self.group_index is not None:
      index = jnp.swapaxes(self.group_index, -1, -2)
      return jnp.take_along_axis(per_group, index, axis=-2)
    if self.group_size >= self.rows or self.group_size == 1:
      return per_group
    wide = jnp.repeat(per_group, self.group_size, axis=-2)
    return jax.lax.slice_in_dim(wide, 0, self.rows, axis=wide.ndim - 2)
