# SPDX-License-Identifier: Apache-2.0
"""Grids: fit scales and zero points to groups of weights, and round to them.

The rules are those of compressed-tensors and llm-compressor. Symmetric grids have
`s = 2 max|w| / (2^b - 1)`, which is max|w| / 7.5 for 4 bits, and the zero point `2^(b-1)`.
Asymmetric ones have `s = (max - min) / (2^b - 1)` and `z = clip(round(-min / s))`, the range forced
to contain 0. Rounding is half to even. Codes are unsigned (theirs are shifted by `2^(b-1)`).
Formats other than integers (`core.formats`) have `s = max|w| / largest value`. Everything is
computed in float32.

Scales are stored in a floating-point dtype, as powers of two (`float8_e8m0fnu`, the shared
exponents of MX formats), or quantized themselves: `e4m3fn` as in NVFP4, 8-bit floats under one
scale a tensor; `int8`, or another width, integers with a range for every 256 of them, after QLoRA.
What is rounded is rounded with the scale that is stored.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from treesurgeon.core import formats, leaves, packing

STEPS = 20  # mse: shrink factors 1, 0.99, ... 0.81, as llm-compressor's observer
NORM = 2.4
BLOCK = 256  # scales that share a range, where scales are integers
FLOATS = ("float32", "bfloat16", "float16")
STORES = (*FLOATS, "float8_e8m0fnu", "e4m3fn", "int8", "int6", "int4")


class Grid(NamedTuple):
  """Scales and zero points of every group.

  Attributes:
    scales: (..., groups, groups of cols), as they are stored: an array, or a leaf; never zero.
    zeros: likewise uint8, or None for symmetric grids.
  """

  scales: Any
  zeros: Array | None


def fit(
  w: Float[Array, "*batch rows cols"],
  *,
  bits: int,
  group_size: int,
  symmetric: bool,
  mse: bool = False,
  scale_dtype: str | None = None,
  format: str = "int",
  group_cols: int = 1,
) -> Grid:
  """Fit one grid to every tile of `group_size` rows and `group_cols` columns.

  Args:
    w: weights, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    symmetric: whether the grid is centred on 0 and has no zero points.
    mse: try also ranges shrunk by up to 19 % and keep the least sum of |error|^2.4, a group.
    scale_dtype: how scales are stored, see above; None is the dtype of `w`.
    format: "int" or a table of `core.formats`, which is always symmetric.
    group_cols: columns that share a scale.

  Returns:
    The grids.

  Example:
    >>> w = jnp.array([[1.0], [-3.75]])
    >>> fit(w, bits=4, group_size=2, symmetric=True).scales.tolist()
    [[0.5]]
  """
  parts = _tiles(w.astype(jnp.float32), group_size, group_cols)
  store = scale_dtype or w.dtype.name
  symmetric = symmetric or format != "int"
  top = jnp.maximum(parts.max(axis=(-3, -1)), 0.0)
  bottom = jnp.minimum(parts.min(axis=(-3, -1)), 0.0)
  grid = _from_range(bottom, top, bits, symmetric, store, format)
  if not mse:
    return grid

  def loss(g: Grid) -> jax.Array:
    one = jax.tree.map(lambda a: a[..., :, None, :, None], values(g))
    codes = round_to(parts, one, bits=bits, format=format)
    wrong = dequantize(codes, one, bits=bits, format=format) - parts
    return (jnp.abs(wrong) ** NORM).sum(axis=(-3, -1))

  def better(i: jax.Array, state: tuple) -> tuple:
    shrink = 1.0 - i / 100.0
    error = loss(_from_range(bottom * shrink, top * shrink, bits, symmetric, store, format))
    pick = error < state[1]
    return jnp.where(pick, shrink, state[0]), jnp.where(pick, error, state[1])

  start = jnp.ones_like(top), loss(grid)
  best, _ = jax.lax.fori_loop(1, STEPS, better, start)
  return _from_range(bottom * best, top * best, bits, symmetric, store, format)


def round_to(
  w: Float[Array, "..."], grid: Grid, *, bits: int, format: str = "int"
) -> UInt8[Array, "..."]:
  """Round weights to the nearest codes, half to even, clipped to the range.

  Args:
    w: weights.
    grid: scales and zero points that broadcast against `w` (see `spread`).
    bits: width of a code.
    format: "int" or a table of `core.formats`.

  Returns:
    Unsigned codes.

  Example:
    >>> round_to(jnp.array([0.5, -9.0]), Grid(jnp.ones(1), None), bits=4).tolist()
    [8, 0]
  """
  steps = w.astype(jnp.float32) / grid.scales.astype(jnp.float32)
  if format != "int":
    return formats.encode(steps, format, bits)
  zero = 2.0 ** (bits - 1) if grid.zeros is None else grid.zeros.astype(jnp.float32)
  # Symmetric codes are rounded before the shift, as signed ones are; otherwise ties differ.
  codes = jnp.round(steps) + zero if grid.zeros is None else jnp.round(steps + zero)
  return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def dequantize(
  codes: UInt8[Array, "..."], grid: Grid, *, bits: int, format: str = "int"
) -> Float[Array, "..."]:
  """Compute the weights that codes stand for, in float32.

  Args:
    codes: unsigned codes.
    grid: scales and zero points that broadcast against `codes`.
    bits: width of a code.
    format: "int" or a table of `core.formats`.

  Returns:
    Weights in float32.

  Example:
    >>> dequantize(jnp.array([8, 0], jnp.uint8), Grid(jnp.ones(1), None), bits=4).tolist()
    [0.0, -8.0]
  """
  scales = grid.scales.astype(jnp.float32)
  if format != "int":
    return jnp.asarray(formats.levels(format, bits))[codes] * scales
  zero = 2.0 ** (bits - 1) if grid.zeros is None else grid.zeros.astype(jnp.float32)
  return (codes.astype(jnp.float32) - zero) * scales


def values(grid: Grid) -> Grid:
  """Return a grid whose scales are an array, whatever they are stored as.

  Args:
    grid: a grid.

  Returns:
    The same grid; scales of an array are its own.

  Example:
    >>> values(Grid(jnp.ones((1, 2)), None)).scales.shape
    (1, 2)
  """
  return grid._replace(scales=leaves.dense(grid.scales))


def spread(
  grid: Grid, *, group_size: int, rows: int, group_cols: int = 1, cols: int | None = None
) -> Grid:
  """Repeat scales and zero points to one row an input row, and one column a column.

  Args:
    grid: one entry a group.
    group_size: rows that share a scale.
    rows: number of input rows.
    group_cols: columns that share a scale.
    cols: number of columns, where several share a scale.

  Returns:
    A grid of arrays (..., rows, cols), zeros still None if symmetric.

  Example:
    >>> spread(Grid(jnp.ones((2, 5)), None), group_size=3, rows=4).scales.shape
    (4, 5)
  """
  index = jnp.arange(rows) // group_size

  def repeat(a: jax.Array) -> jax.Array:
    wide = jnp.take(a, index, axis=-2)
    return wide if group_cols == 1 else jnp.take(wide, jnp.arange(cols) // group_cols, axis=-1)

  return jax.tree.map(repeat, values(grid))


def tensor(
  codes: UInt8[Array, "*batch rows cols"],
  grid: Grid,
  *,
  bits: int,
  group_size: int,
  store: Any,
  group_index: Int32[Array, "rows"] | None = None,
  format: str = "int",
  group_cols: int = 1,
) -> leaves.QuantizedTensor:
  """Pack codes and grids into a leaf.

  Args:
    codes: unsigned codes.
    grid: one row a group.
    bits: width of a code.
    group_size: rows that share a scale.
    store: dtype of the dense value.
    group_index: group of each row where groups are not consecutive.
    format: "int" or a table of `core.formats`.
    group_cols: columns that share a scale.

  Returns:
    The leaf.

  Example:
    >>> tensor(jnp.zeros((4, 2), jnp.uint8), Grid(jnp.ones((1, 2)), None), bits=4, group_size=4,
    ...        store="float32").nbytes
    12
  """
  *_, rows, cols = codes.shape
  index = None if group_index is None else group_index[None, :]
  packed = formats.pack_trits(codes) if format == "ternary" else packing.pack(codes, bits=bits)
  return leaves.QuantizedTensor(
    packed, grid.scales, grid.zeros, index, rows=rows, cols=cols, bits=bits,
    group_size=group_size, store=jnp.dtype(store).name, format=format, group_cols=group_cols,
  )  # fmt: skip


def clamp_group(group_size: int, rows: int) -> int:
  """Resolve a group size against a matrix: -1, or more rows than there are, is one group.

  Args:
    group_size: as the user gave it.
    rows: input dimension.

  Returns:
    The rows that share a scale.

  Example:
    >>> clamp_group(-1, 64), clamp_group(128, 64), clamp_group(32, 64)
    (64, 64, 32)
  """
  return rows if group_size == -1 or group_size > rows else group_size


def already(
  leaf: Any,
  *,
  bits: int,
  group_size: int,
  symmetric: bool,
  format: str = "int",
  group_cols: int = 1,
) -> bool:
  """Tell whether a leaf is quantized in just this format, so that quantizing it is the identity.

  Args:
    leaf: array or compressed leaf.
    bits, group_size, symmetric, format, group_cols: the format asked for.

  Returns:
    True if it is.

  Example:
    >>> already(jnp.zeros((2, 2)), bits=4, group_size=2, symmetric=True)
    False
  """
  return (
    isinstance(leaf, leaves.QuantizedTensor)
    and (leaf.bits, leaf.format) == (bits, format)
    and leaf.group_size == clamp_group(group_size, leaf.rows)
    and leaf.group_cols == clamp_group(group_cols, leaf.cols)
    and (leaf.zeros is None) == (symmetric or format != "int")
  )


def check(
  *,
  bits: int,
  group_size: int,
  symmetric: bool = True,
  scale_dtype: str | None = None,
  format: str = "int",
  group_cols: int = 1,
  **unused: Any,
) -> None:
  """Refuse hyper-parameters that no grid has.

  Args:
    bits: width of a code.
    group_size: rows that share a scale, or -1.
    symmetric: whether there are no zero points.
    scale_dtype: how scales are stored, or None.
    format: "int" or a table of `core.formats`.
    group_cols: columns that share a scale, or -1.
    **unused: a method's other hyper-parameters.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> check(bits=9, group_size=128)
    Traceback (most recent call last):
    ValueError: bits=9: the width of a code is a whole number from 1 to 8
  """
  del unused
  if bits not in range(1, 9):
    raise ValueError(f"bits={bits}: the width of a code is a whole number from 1 to 8")
  formats.width(format, bits)
  if format != "int" and not symmetric:
    raise ValueError(f"format={format!r} has no zero points; use symmetric=True")
  if bits == 1 and symmetric and format == "int":
    raise ValueError("bits=1: a symmetric grid of one bit holds no weights; use symmetric=False")
  if group_size != -1 and (not isinstance(group_size, int) or group_size < 1):
    raise ValueError(
      f"group_size={group_size}: groups have 1 row or more; -1 is one group a column"
    )
  if group_cols != -1 and (not isinstance(group_cols, int) or group_cols < 1):
    raise ValueError(f"group_cols={group_cols}: tiles have 1 column or more; -1 is all of them")
  if scale_dtype is not None and scale_dtype not in STORES:
    raise ValueError(f"scale_dtype={scale_dtype!r}: valid are {', '.join(STORES)}, None")


def check_float(scale_dtype: str | None) -> None:
  """Refuse what scales that move freely, or zero points beside them, cannot be stored as.

  Args:
    scale_dtype: how they are stored, or None.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> check_float("int8")
    Traceback (most recent call last):
    ValueError: scale_dtype='int8': valid are float32, bfloat16, float16, None
  """
  if scale_dtype not in (None, *FLOATS):
    raise ValueError(f"scale_dtype={scale_dtype!r}: valid are {', '.join(FLOATS)}, None")


def poisoned(grid: Grid, failed: Any) -> Grid:
  """Make scales not a number where a factorization failed, so that the result is refused.

  Args:
    grid: a grid.
    failed: boolean scalar.

  Returns:
    The grid; scales keep how they are stored.

  Example:
    >>> poisoned(Grid(jnp.ones((1, 1)), None), True).scales.item()
    nan
  """

  def poison(a: jax.Array) -> jax.Array:
    real = jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.where(failed, jnp.nan, a).astype(a.dtype) if real else a

  return grid._replace(scales=jax.tree.map(poison, grid.scales))


def _tiles(w: jax.Array, size: int, cols: int) -> jax.Array:
  """Cut into tiles, (..., groups, size, groups, cols); padding is 0, which no fit minds."""
  *batch, rows, columns = w.shape
  widths = [(0, 0)] * len(batch) + [(0, -rows % size), (0, -columns % cols)]
  return jnp.pad(w, widths).reshape(*batch, -(-rows // size), size, -(-columns // cols), cols)


def _from_range(
  bottom: jax.Array, top: jax.Array, bits: int, symmetric: bool, store: str, format: str
) -> Grid:
  steps = 2**bits - 1
  largest = jnp.maximum(-bottom, top)
  if format != "int" and store == "float8_e8m0fnu":  # the rule of OCP MX: exponents are compared
    below = 2.0 ** math.floor(math.log2(formats.divisor(format, bits)))
    scales = jnp.exp2(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, below)))) / below
  elif symmetric:
    scales = largest / formats.divisor(format, bits)
  else:
    scales = (top - bottom) / steps
  stored = _stored(scales, store)
  if symmetric:
    return Grid(stored, None)
  zeros = jnp.clip(jnp.round(-bottom / leaves.dense(stored).astype(jnp.float32)), 0, steps)
  return Grid(stored, zeros.astype(jnp.uint8))


def _stored(scales: jax.Array, store: str) -> Any:
  """Round scales to what is stored. A group of zeros, or one that underflows, takes the scale 1."""
  if store == "e4m3fn":
    largest = scales.max(axis=(-2, -1), keepdims=True) / 448.0
    whole = jnp.where(largest > 0, largest, 1.0)
    codes = formats.encode(scales / whole, store, 8)
    codes = jnp.where(codes == 0, jnp.uint8(1), codes)
    *_, rows, cols = scales.shape
    return leaves.QuantizedTensor(
      codes, whole, None, None, rows=rows, cols=cols, bits=8, group_size=rows,
      format=store, group_cols=cols,
    )  # fmt: skip
  if store.startswith("int"):
    *_, rows, cols = scales.shape
    size = min(rows, BLOCK)
    form: dict[str, Any] = {
      "bits": int(store[3:]),
      "group_size": size,
      "group_cols": min(cols, BLOCK // size),
    }
    grid = fit(scales, **form, symmetric=False, scale_dtype="float32")
    wide = spread(grid, group_size=size, rows=rows, group_cols=form["group_cols"], cols=cols)
    codes = jnp.maximum(round_to(scales, wide, bits=form["bits"]), 1)  # 0 may stand for no scale
    return tensor(codes, grid, **form, store="float32")
  stored = scales.astype(store)
  return jnp.where(stored == 0, jnp.ones((), store), stored)
