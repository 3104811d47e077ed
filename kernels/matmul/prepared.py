# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices as a TPU's kernel reads them: arranged once, the same numbers.

Files and methods hold `QuantizedTensor`, a bitstream. `prepare` rearranges it for a device, exactly
and reversibly, and products with what it returns run the kernel of `tpu.py`:

* widths of 1, 2, 3 and 5 bits, and 4 bits on v5e and v5p: `gs32` (`layouts.py`), 16 // bits units
  of 128 rows side by side in the half-words. Three bits take 3.2: five to a half-word decode
  in as many instructions as any single field, whereas two planes of 2 + 1 bits take half as many
  again and were slower on every chip, by its compiler's count.
* 4 bits elsewhere `int4`, and the rest `int8`: the chip converts them.

Ternary codes, five to a byte in files, have two bits here. Rows are filled up to whole units and
steps; scales are grouped by the step of the kernel that reads them.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import layouts

UNIT = layouts.GROUP
MOST_UNITS = 48  # that one step of the kernel unrolls: 32 are 4096 rows
# Formats whose values are (code - zero) * factor: bits on the device, zero, factor.
LINEAR = {"ternary": (2, 1.0, 1.0), "sign": (1, 0.5, 2.0)}
# Composite leaves whose parts are multiplied by themselves.
_COMPOSITE = (
  leaves.Sum,
  leaves.LowRank,
  leaves.Rotated,
  leaves.SplitRows,
  leaves.ClusteredColumns,
)


@base.container(("codes", "scales", "zeros"))
class PreparedTensor(base.Compressed):
  """Hold a `QuantizedTensor` in a device's layout.

  Attributes:
    codes: int32 words of gs32, or int4, or int8, (..., stored rows, cols).
    scales: (..., steps, groups of a step, cols); of one group of all rows (..., 1, 1, cols).
    zeros: like `scales`, or None.
    rows, cols, bits, group_size, store, format: as of the QuantizedTensor.
    layout: "gs32" or "native".
    step: units of 128 rows that one step of the kernel takes.
    target: name of the device.
    dtypes: of scales and zeros in the QuantizedTensor.
  """

  codes: base.Part
  scales: base.Part
  zeros: base.Part
  rows: int
  cols: int
  bits: int
  group_size: int
  store: str
  format: str
  layout: str
  step: int
  target: str
  dtypes: tuple[str, str]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return tuple(self.codes.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  @property
  def width(self) -> int:
    """Bits of a code on the device."""
    return LINEAR[self.format][0] if self.format in LINEAR else self.bits

  @property
  def zero(self) -> float:
    """The zero point where `zeros` is None."""
    return LINEAR[self.format][1] if self.format in LINEAR else 2.0 ** (self.bits - 1)

  @property
  def factor(self) -> float:
    """What scales are multiplied by."""
    return LINEAR[self.format][2] if self.format in LINEAR else 1.0

  @property
  def steps(self) -> int:
    """Steps of the kernel over the rows."""
    units = 16 // self.width if self.layout == "gs32" else 1
    rows = UNIT // 2 if self.layout == "gs32" else UNIT
    return self.codes.shape[-2] // rows * units // self.step

  def restore(self) -> leaves.QuantizedTensor:
    """Return the QuantizedTensor, bit for bit."""

    def codes_of(codes: jax.Array) -> jax.Array:
      plain = layouts.decode(
        codes, layout=self.layout, bits=self.width, group_size=UNIT, rows=self.rows
      )
      if self.format == "ternary":
        return formats.pack_trits(plain)
      return packing.pack(plain, bits=self.bits)

    def grouped(part: Any, dtype: str) -> Any:
      if part is None:
        return None
      if self.group_size < self.rows:
        part = part[..., : self.step * UNIT // self.group_size, :]
      flat = part.reshape(*self.batch, -1, self.cols)
      groups = -(-self.rows // min(self.group_size, self.rows))
      return jax.lax.slice_in_dim(flat, 0, groups, axis=flat.ndim - 2).astype(dtype)

    return leaves.QuantizedTensor(
      _over_batch(codes_of, self.codes), grouped(self.scales, self.dtypes[0]),
      grouped(self.zeros, self.dtypes[1]), None, rows=self.rows, cols=self.cols, bits=self.bits,
      group_size=self.group_size, store=self.store, format=self.format,
    )  # fmt: skip

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    return self.restore().dense()


def prepare(tree: Any, *, target: str | None = None) -> Any:
  """Arrange the quantized kernels of a tree as a device reads them.

  Leaves that no kernel takes stay as they are, and `matmul` multiplies by them in plain XLA; the
  log says why, once. Preparing again changes nothing; for another device it rearranges.

  Args:
    tree: parameters, or one leaf.
    target: name from `devices.DEVICES`; None is the device of this process, and what is not
      among them needs no preparation.

  Returns:
    The tree.

  Raises:
    ValueError: for an unknown target.

  Example:
    >>> leaf = leaves.QuantizedTensor(jnp.zeros((64, 8), jnp.uint8), jnp.ones((1, 8)), None, None,
    ...                               rows=128, cols=8, bits=4, group_size=128)
    >>> prepare(leaf, target="tpu-v6e").codes.dtype.name
    'int4'
  """
  name = devices.here() if target is None else target
  if name is None:
    return tree
  devices.find(name)
  return _walk(tree, name)


def restore(tree: Any) -> Any:
  """Undo `prepare`, bit for bit: what files and other methods take.

  Args:
    tree: parameters, or one leaf.

  Returns:
    The tree with `QuantizedTensor` leaves.

  Example:
    >>> restore(jnp.ones(2)).tolist()
    [1.0, 1.0]
  """
  is_prepared = lambda node: isinstance(node, PreparedTensor)
  return jax.tree.map(lambda n: n.restore() if is_prepared(n) else n, tree, is_leaf=is_prepared)


def unsupported(leaf: Any) -> str:
  """Say why no kernel takes a leaf.

  Args:
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes QuantizedTensor, not LowRank'
  """
  if not isinstance(leaf, leaves.QuantizedTensor):
    return f"it takes QuantizedTensor, not {type(leaf).__name__}"
  if leaf.format not in ("int", *LINEAR):
    return f"it takes integers, ternary and sign codes, not format {leaf.format!r}"
  if leaf.group_cols != 1 or base.is_leaf(leaf.scales) or base.is_leaf(leaf.zeros):
    return "it takes groups of rows with plain scales"
  if leaf.group_index is not None:
    return "it takes groups of consecutive rows, not a group_index"
  size = leaf.group_size
  if size < leaf.rows and size % UNIT and (UNIT % size or size % 16):
    return f"it takes groups of 16, 32, 64 or a multiple of {UNIT} rows, not {size}"
  if size < leaf.rows and size // UNIT > MOST_UNITS:
    return f"it takes groups of up to {MOST_UNITS * UNIT} rows or of all, not {size}"
  return ""


def arrangement(rows: int, width: int, group_size: int, target: str) -> tuple[str, int, int]:
  """Choose layout and step: few rows of filling, few steps.

  Args:
    rows: of the matrix.
    width: bits of a code.
    group_size: rows of a group.
    target: name of the device.

  Returns:
    (layout, units of a step, steps).

  Example:
    >>> arrangement(4096, 4, 128, "tpu-v5e"), arrangement(14336, 2, 128, "tpu-v6e")
    (('gs32', 32, 1), ('gs32', 16, 7))
  """
  words = width in (1, 2, 3, 5) or (width == 4 and not devices.find(target).converts)
  units = -(-rows // UNIT)
  whole = 1 if group_size >= rows else max(1, group_size // UNIT)
  multiple = math.lcm(16 // width if words else 1, whole)
  if multiple > MOST_UNITS:  # a long group in words of many fields: as bytes it fits
    words, multiple = False, whole
  sizes = range(multiple, MOST_UNITS + 1, multiple)
  # A step costs about as much as four units, of which the transfers hide half.
  step = min(sizes, key=lambda s: (-(-units // s) * (s + 2), s))
  return "gs32" if words else "native", step, -(-units // step)


def _walk(node: Any, target: str) -> Any:
  if isinstance(node, PreparedTensor):
    return node if node.target == target else _walk(node.restore(), target)
  if isinstance(node, leaves.QuantizedTensor):
    reason = unsupported(node)
    if reason:
      _say(reason)
      return node
    return _prepare(node, target)
  if leaves.is_leaf(node) and not isinstance(node, _COMPOSITE):
    return node
  inner = lambda child: child is not node and leaves.is_leaf(child)
  return jax.tree.map(lambda c: _walk(c, target) if leaves.is_leaf(c) else c, node, is_leaf=inner)


@functools.cache
def _say(reason: str) -> None:
  logging.getLogger(__name__).warning("some kernels stay in plain XLA: %s", reason)


@functools.partial(jax.jit, static_argnames="target")
def _prepare(leaf: leaves.QuantizedTensor, target: str) -> PreparedTensor:
  width = LINEAR[leaf.format][0] if leaf.format in LINEAR else leaf.bits
  layout, step, steps = arrangement(leaf.rows, width, leaf.group_size, target)

  def codes_of(stream: jax.Array) -> jax.Array:
    if leaf.format == "ternary":
      codes = formats.unpack_trits(stream, rows=leaf.rows)
    else:
      codes = packing.unpack(stream, bits=leaf.bits, rows=leaf.rows)
    codes = jnp.pad(codes, [(0, step * steps * UNIT - leaf.rows), (0, 0)])
    return layouts.encode(codes, layout=layout, bits=width, group_size=UNIT)

  def grouped(part: Any) -> Any:
    if part is None:
      return None
    # What kernels can load; uint8 is exact in bfloat16.
    exact = part.dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    part = part.astype(part.dtype if exact else _loadable(part.dtype))
    if leaf.group_size >= leaf.rows:
      return part[..., None, :, :]
    groups = step * UNIT // leaf.group_size
    missing = steps * groups - part.shape[-2]
    part = jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, missing), (0, 0)])
    part = part.reshape(*part.shape[:-2], steps, groups, leaf.cols)
    # Whole tiles of eight rows: others are copied before each product on some chips.
    return jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, -groups % 8), (0, 0)])

  zeros = "" if leaf.zeros is None else jnp.dtype(leaf.zeros.dtype).name
  return PreparedTensor(
    _over_batch(codes_of, leaf.codes), grouped(leaf.scales), grouped(leaf.zeros),
    rows=leaf.rows, cols=leaf.cols, bits=leaf.bits, group_size=leaf.group_size, store=leaf.store,
    format=leaf.format, layout=layout, step=step, target=target,
    dtypes=(jnp.dtype(leaf.scales.dtype).name, zeros),
  )  # fmt: skip


def _loadable(dtype: Any) -> Any:
  return jnp.bfloat16 if dtype == jnp.uint8 else jnp.float32


def _over_batch(fn: Any, array: jax.Array) -> jax.Array:
  """Apply to each matrix of a stack, one after the other: unpacked codes are large."""
  if array.ndim == 2:
    return fn(array)
  flat = array.reshape(-1, *array.shape[-2:])
  out = jax.lax.map(fn, flat)
  return out.reshape(*array.shape[:-2], *out.shape[1:])
