# SPDX-License-Identifier: Apache-2.0
r"""N of every M weights as a TPU's kernel reads them: arranged once, the same numbers.

The kept weights of a run of M rows, in order, are values 0 to N - 1. Value j lies in one of
M - N + 1 rows of its run, j to j + M - N, so M - N marks of one bit say where: the i-th that it is
in row j + i, none that it is in the last. 2:4 takes four bits a run, as many as two positions do.

A tile is 128 runs. Its values come value by value, N times 128 rows, each row for row the same run;
so do the rows of the matrix that they are spread to, lane l of the tile being the l-th rows of its
runs. Nothing is interleaved: the activations are arranged lane by lane instead, once a product.
Values are bfloat16, or int8 codes (code minus half) with a scale a column or a group. Marks are as
wide as a value: the N (M - N) bits of each of several tiles, side by side, for the same rows.
Values and marks are therefore read as words that hold the same rows in the same places, two or
four to a word, and a mark is spread over its place by a shift and a subtraction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import layouts, prepared

UNIT = layouts.GROUP
MOST_LANES = 48  # that a step of the kernel unrolls
# Where bfloat16 values with over one mark a row, such as 4:8, take longer than dense weights.
DENSE = ("tpu7x",)


@base.container(("values", "marks", "scales"))
class PreparedSparse(prepared.Prepared):
  """Hold a `SparseTensor` in the layout of the kernel.

  Attributes:
    values: bfloat16 or int8, (..., tiles * n * 128, stored columns).
    marks: int16 or int8, (..., tiles / tiles of a mark * 128, stored columns).
    scales: float32, (..., groups, stored columns), or None of bfloat16 values.
    rows, cols, n, m: as of the SparseTensor.
    step: tiles that one step of the kernel takes.
    target: name of the device.
    bits: of a code, or 0 of bfloat16 values.
    group_size: kept rows that share a scale.
    store: dtype of the dense value.
    scale_dtype: of the scales in the SparseTensor.
  """

  values: base.Part
  marks: base.Part
  scales: base.Part
  rows: int
  cols: int
  n: int
  m: int
  step: int
  target: str
  bits: int = 0
  group_size: int = 0
  store: str = "bfloat16"
  scale_dtype: str = "float32"

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return tuple(self.values.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  @property
  def tiles(self) -> int:
    """Tiles of 128 runs, filled up to whole steps."""
    return self.values.shape[-2] // (self.n * UNIT)

  def restore(self) -> leaves.SparseTensor:
    """Return the SparseTensor, bit for bit."""
    runs, kept = self.rows // self.m, self.rows // self.m * self.n

    def values_of(values: jax.Array) -> jax.Array:
      tiles = values[:, : self.cols].reshape(self.tiles, self.n, UNIT, self.cols)
      flat = jnp.swapaxes(tiles, 1, 2).reshape(-1, self.n, self.cols)[:runs]
      flat = flat.reshape(kept, self.cols)
      if not self.bits:
        return flat
      codes = (flat.astype(jnp.int16) + 2 ** (self.bits - 1)).astype(jnp.uint8)
      return packing.pack(codes, bits=self.bits)

    def places_of(marks: jax.Array) -> jax.Array:
      place = _places(marks[:, : self.cols], self.n, self.m, self.tiles)[:runs]
      bits = max(1, (self.m - 1).bit_length())
      return packing.pack(place.reshape(kept, self.cols), bits=bits)

    values: Any = layouts.over_batch(values_of, self.values)
    if self.bits:
      scales = self.scales[..., : self.cols].astype(self.scale_dtype)
      values = leaves.QuantizedTensor(
        values, scales, None, None, rows=kept, cols=self.cols, bits=self.bits,
        group_size=self.group_size, store=self.store,
      )  # fmt: skip
    places = layouts.over_batch(places_of, self.marks)
    return leaves.SparseTensor(values, places, self.rows, self.cols, self.n, self.m)

  def dense(self) -> jax.Array:
    """Expand in the storage dtype."""
    return self.restore().dense()


@base.container(("weight", "original"))
class Expanded(prepared.Instead):
  """Hold N:M weights, and the dense matrix that is multiplied by in their place.

  Attributes:
    weight: the matrix, all zeros in it.
    original: the SparseTensor.
    target: name of the device.
  """

  weight: base.Part
  original: base.Part
  target: str

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.original.rows

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.original.cols

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.weight.dtype

  def restore(self) -> leaves.SparseTensor:
    """Return the SparseTensor."""
    return self.original


def unsupported(leaf: leaves.SparseTensor, *, target: str | None = None) -> str:
  """Say why no kernel takes a leaf.

  Args:
    leaf: with values or their shapes.
    target: name of a device; None asks for any TPU.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(leaves.SparseTensor(jnp.ones((2, 1)), jnp.ones((1, 1), jnp.uint8), 4, 1, 2, 4))
    'it takes N:M values in bfloat16 or quantized, not float32'
  """
  if target is not None and target not in devices.DEVICES:
    return "it takes N:M weights on a TPU only"
  values, marks = leaf.values, leaf.n * (leaf.m - leaf.n)
  quantized = isinstance(values, leaves.QuantizedTensor)
  if not quantized and (leaves.is_leaf(values) or values.dtype != jnp.bfloat16):
    kind = type(values).__name__ if leaves.is_leaf(values) else jnp.dtype(values.dtype).name
    return f"it takes N:M values in bfloat16 or quantized, not {kind}"
  if not 1 <= marks <= (8 if quantized else 16):
    return f"it takes N:M with N (M - N) up to {8 if quantized else 16}, not {leaf.n}:{leaf.m}"
  if quantized and (not values.plain or values.zeros is not None or values.group_index is not None):
    return "it takes N:M values that are symmetric integers in groups of consecutive rows"
  if quantized and values.group_size < values.rows and values.group_size % (leaf.n * UNIT):
    return (
      f"it takes groups of a multiple of {leaf.n * UNIT} kept rows for {leaf.n}:{leaf.m}, or one, "
      f"not {values.group_size}"
    )
  return ""


@functools.partial(jax.jit, static_argnames=("target",))
def prepare(leaf: leaves.SparseTensor, target: str) -> PreparedSparse | Expanded:
  """Arrange a leaf that `unsupported` accepts.

  Args:
    leaf: the matrix; positions of a run rise.
    target: name of the device.

  Returns:
    The same matrix: PreparedSparse, or Expanded where the kernel would be slower than a dense one.

  Example:
    >>> leaf = leaves.SparseTensor(
    ...   jnp.ones((2, 1), jnp.bfloat16), jnp.full((1, 1), 0b1101, jnp.uint8), 4, 1, 2, 4)
    >>> prepare(leaf, "tpu-v6e").restore().positions.tolist()
    [[13]]
  """
  n, m, values = leaf.n, leaf.m, leaf.values
  if target in DENSE and not leaves.is_leaf(values) and n * (m - n) > m:
    return Expanded(leaf.dense(), leaf, target)
  runs, kept = leaf.rows // m, leaf.rows // m * n
  quantized = isinstance(values, leaves.QuantizedTensor)
  width = 8 if quantized else 16
  each = width // (n * (m - n))  # tiles of a mark
  step = _step(-(-runs // UNIT), each, m)
  lanes = step * UNIT
  tiles = -(-runs // lanes) * step
  fill = [(0, tiles * UNIT - runs), (0, 0), (0, -leaf.cols % UNIT)]

  def values_of(stored: jax.Array) -> jax.Array:
    if quantized:
      codes = packing.unpack(stored, bits=values.bits, rows=kept).astype(jnp.int16)
      stored = (codes - 2 ** (values.bits - 1)).astype(jnp.int8)
    by_run = jnp.pad(stored.reshape(runs, n, leaf.cols), fill)
    return jnp.swapaxes(by_run.reshape(tiles, UNIT, n, -1), 1, 2).reshape(tiles * n * UNIT, -1)

  def marks_of(positions: jax.Array) -> jax.Array:
    place = packing.unpack(positions, bits=max(1, (m - 1).bit_length()), rows=kept)
    place = jnp.pad(place.reshape(runs, n, leaf.cols), fill, constant_values=m)
    return _marks(place, n, m, each, width)

  more: dict[str, Any] = {"store": jnp.dtype(values.dtype).name}
  scales = None
  if quantized:
    part = values.scales.astype(jnp.float32)
    scales = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, -leaf.cols % UNIT)])
    more |= {
      "bits": values.bits,
      "group_size": values.group_size,
      "scale_dtype": jnp.dtype(values.scales.dtype).name,
    }
  stored = values.codes if quantized else values
  return PreparedSparse(
    layouts.over_batch(values_of, stored), layouts.over_batch(marks_of, leaf.positions), scales,
    rows=leaf.rows, cols=leaf.cols, n=n, m=m, step=step, target=target, **more,
  )  # fmt: skip


def _step(tiles: int, each: int, m: int) -> int:
  """Choose the tiles of a step, whole marks: few steps, little filling."""
  sizes = range(each, max(each, MOST_LANES // m) + 1, each)
  return min(sizes, key=lambda s: (-(-tiles // s) * (m * s + 4) + 6 * (tiles % s > 0), s))


def _marks(place: jax.Array, n: int, m: int, each: int, width: int) -> jax.Array:
  """Turn positions (tiles * 128, n, cols) into marks."""
  first = jnp.arange(n, dtype=place.dtype)[None, :, None]
  bits = jnp.zeros((place.shape[0], place.shape[2]), jnp.uint16)
  for i in range(m - n):
    hit = (place == first + i).astype(jnp.uint16)
    for j in range(n):
      bits = bits | hit[:, j] << (j * (m - n) + i)
  sets = bits.reshape(-1, each, UNIT, bits.shape[1])
  word = jnp.zeros((sets.shape[0], *sets.shape[2:]), jnp.uint16)
  for tile in range(each):
    word = word | sets[:, tile] << (tile * n * (m - n))
  word = word.reshape(-1, bits.shape[1])
  if width == 8:
    return jax.lax.bitcast_convert_type(word.astype(jnp.uint8), jnp.int8)
  return jax.lax.bitcast_convert_type(word, jnp.int16)


def _places(marks: jax.Array, n: int, m: int, tiles: int) -> jax.Array:
  """Turn marks into positions, (tiles * 128, n, cols)."""
  count = n * (m - n)
  each = tiles * UNIT // marks.shape[0]
  word = marks.astype(jnp.int32).reshape(-1, 1, UNIT, marks.shape[1])
  shifts = (jnp.arange(each) * count)[None, :, None, None]
  bits = (word >> shifts).reshape(-1, marks.shape[1])
  out = []
  for j in range(n):
    place = jnp.full(bits.shape, j + m - n, jnp.uint8)
    for i in range(m - n):
      place = jnp.where((bits >> (j * (m - n) + i)) & 1 == 1, jnp.uint8(j + i), place)
    out.append(place)
  return jnp.stack(out, axis=1)
