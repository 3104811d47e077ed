# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices to whose inputs or output something is done beside a kernel's product.

`fitting.py` says what and makes them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import layouts, prepared


@base.container(("matrix", "order", "scales", "zeros", "gain"))
class FittedTensor(prepared.Prepared):
  """Hold a matrix that was fitted, and what its inputs and outputs need.

  Attributes:
    matrix: PreparedTensor of the fitted matrix.
    order: (..., 1, its rows) int32, which row each of its rows is, `rows` for none; None if they
      are in order.
    scales, zeros: as they were, where the matrix does not give them back, or None.
    gain: (..., 1, 1), multiplies the output, or None.
    rows, cols, bits, group_size, store, format, group_cols: as of the QuantizedTensor.
    padded: rows that a group has in the matrix.
    nested: the QuantizedTensor of scales without its arrays, where there is a gain, or None.
  """

  matrix: base.Part
  order: base.Part
  scales: base.Part
  zeros: base.Part
  gain: base.Part
  rows: int
  cols: int
  bits: int
  group_size: int
  store: str
  format: str
  group_cols: int
  padded: int
  nested: Any = None

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return self.matrix.batch

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  @property
  def target(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Name of the device."""
    return self.matrix.target

  @property
  def size(self) -> int:
    """Rows of a group."""
    return min(self.group_size, self.rows)

  @property
  def by_inputs(self) -> bool:
    """Whether it is the inputs that are scaled."""
    return self.order is None and by_inputs(self)

  @property
  def completes(self) -> bool:
    """Whether something is done to the output."""
    shifts = self.by_inputs and self.zeros is not None and self.format == "int"
    return self.gain is not None or shifts

  def inputs(self, x: jax.Array) -> jax.Array:
    """Bring inputs into the matrix's order, or scale them; then they are bfloat16."""
    if self.by_inputs:
      return (x.astype(jnp.float32) * self._per_row(self.scales, x.ndim)).astype(jnp.bfloat16)
    if self.order is not None:
      return jnp.take(x, self.order[0], axis=-1, mode="fill", fill_value=0)
    if self.padded == self.size:
      return x
    groups = -(-self.rows // self.size)
    widths = [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, [*widths, (0, groups * self.size - self.rows)])
    x = x.reshape(*x.shape[:-1], groups, self.size)
    x = jnp.pad(x, [*widths, (0, 0), (0, self.padded - self.size)])
    return x.reshape(*x.shape[:-2], groups * self.padded)

  def output(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Complete the product `y` of what `inputs(x)` returned, float32."""
    if self.gain is not None:
      y = y * self.gain.astype(jnp.float32).reshape((1,) * y.ndim)
    if self.by_inputs and self.zeros is not None and self.format == "int":
      shift = self._per_row(self.zeros, x.ndim) - 2.0 ** (self.bits - 1)
      y = y - (self.inputs(x).astype(jnp.float32) * shift).sum(axis=-1, keepdims=True)
    return y

  def restore(self) -> leaves.QuantizedTensor:
    """Return the QuantizedTensor, bit for bit."""
    plain = self.matrix.restore()
    codes, index = plain.codes, None
    if self.order is not None:
      at = _places(self.order, self.rows)
      index = at // self.padded
      codes = layouts.over_batch(
        lambda c, at: pack(self, jnp.take(unpack(plain, c), at[0], axis=0)), codes, at
      )
    elif plain.rows != self.rows:
      rows = np.arange(self.rows)
      at = rows // self.size * self.padded + rows % self.size
      codes = layouts.over_batch(lambda c: pack(self, unpack(plain, c)[at]), codes)

    def part(kept: Any, found: Any) -> Any:
      if kept is not None or found is None:
        return kept
      runs = max(1, self.padded // plain.group_size) if plain.group_size < plain.rows else 1
      return found[..., ::runs, :: min(self.group_cols, self.cols)]

    scales = part(self.scales, None if self.by_inputs else plain.scales)
    if self.nested is not None:
      stream = jax.lax.bitcast_convert_type(scales.astype(jnp.float8_e4m3fn), jnp.uint8)
      scales = dataclasses.replace(self.nested, codes=stream, scales=self.gain)
    return leaves.QuantizedTensor(
      codes, scales, part(self.zeros, plain.zeros), index, rows=self.rows, cols=self.cols,
      bits=self.bits, group_size=self.group_size, store=self.store, format=self.format,
      group_cols=self.group_cols,
    )  # fmt: skip

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    return self.restore().dense()

  def _per_row(self, part: Any, ndim: int) -> jax.Array:
    """Repeat what all columns share to one number a row, on the last of `ndim` axes."""
    part = leaves.dense(part).astype(jnp.float32)[:, 0]
    rows = jnp.repeat(part, self.group_size)[: self.rows]
    return rows.reshape(*(1,) * (ndim - 1), -1)


def by_inputs(leaf: Any) -> bool:
  """Tell whether all columns share scales of fewer rows than a kernel takes.

  Args:
    leaf: QuantizedTensor or FittedTensor.

  Returns:
    Whether they do.
  """
  few = leaf.group_size < 16 and leaf.group_size < leaf.rows
  return leaf.group_cols >= leaf.cols > 1 and few


def unpack(leaf: Any, stream: jax.Array) -> jax.Array:
  """Unpack the codes of a matrix.

  Args:
    leaf: says rows, bits and format.
    stream: packed codes.

  Returns:
    Codes, (rows, cols).
  """
  if leaf.format == "ternary":
    return formats.unpack_trits(stream, rows=leaf.rows)
  return packing.unpack(stream, bits=leaf.bits, rows=leaf.rows)


def pack(leaf: Any, codes: jax.Array) -> jax.Array:
  """Pack codes as a leaf's.

  Args:
    leaf: says bits and format.
    codes: (rows, cols).

  Returns:
    The stream.
  """
  if leaf.format == "ternary":
    return formats.pack_trits(codes)
  return packing.pack(codes, bits=leaf.bits)


def _places(order: jax.Array, rows: int) -> jax.Array:
  """Invert `_order`: the place of each row, (..., 1, rows) int32."""
  flat = order.reshape(-1, order.shape[-1])
  at = jnp.arange(order.shape[-1], dtype=jnp.int32)
  one = lambda o: jnp.zeros(rows, jnp.int32).at[o].set(at, mode="drop")
  return jax.vmap(one)(flat).reshape(*order.shape[:-1], rows)
