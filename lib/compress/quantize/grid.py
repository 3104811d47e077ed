# SPDX-License-Identifier: Apache-2.0
"""Uniform grids: fit scales and zero points to groups of weights, and round to them.

The rules are those of compressed-tensors and llm-compressor. Symmetric grids have
`s = 2 max|w| / (2^b - 1)`, which is max|w| / 7.5 for 4 bits, and the zero point `2^(b-1)`.
Asymmetric ones have `s = (max - min) / (2^b - 1)` and `z = clip(round(-min / s))`, the range forced
to contain 0. Rounding is half to even. Codes are unsigned (theirs are shifted by `2^(b-1)`).
Everything is computed in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from treesurgeon.core import leaves, packing

STEPS = 20  # mse: shrink factors 1, 0.99, ... 0.81, as llm-compressor's observer
NORM = 2.4


class Grid(NamedTuple):
  """Scales and zero points of every group.

  Attributes:
    scales: (..., groups, cols), the dtype they are stored in; never zero.
    zeros: (..., groups, cols) uint8, or None for symmetric grids.
  """

  scales: Array
  zeros: Array | None


def fit(
  w: Float[Array, "*batch rows cols"],
  *,
  bits: int,
  group_size: int,
  symmetric: bool,
  mse: bool = False,
  scale_dtype: str | None = None,
) -> Grid:
  """Fit one grid to every run of `group_size` rows of every column.

  Args:
    w: weights, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    symmetric: whether the grid is centred on 0 and has no zero points.
    mse: try also ranges shrunk by up to 19 % and keep the least sum of |error|^2.4, a group.
    scale_dtype: dtype scales are rounded to before anything uses them; None is that of `w`.

  Returns:
    The grids.

  Example:
    >>> w = jnp.array([[1.0], [-3.75]])
    >>> fit(w, bits=4, group_size=2, symmetric=True).scales.tolist()
    [[0.5]]
  """
  parts = _groups(w.astype(jnp.float32), group_size)
  store = jnp.dtype(scale_dtype or w.dtype)
  top = jnp.maximum(parts.max(axis=-2), 0.0)
  bottom = jnp.minimum(parts.min(axis=-2), 0.0)
  grid = _from_range(bottom, top, bits, symmetric, store)
  if not mse:
    return grid

  def loss(g: Grid) -> jax.Array:
    zeros = None if g.zeros is None else g.zeros[..., None, :]
    one = Grid(g.scales[..., None, :], zeros)
    wrong = dequantize(round_to(parts, one, bits=bits), one, bits=bits) - parts
    return (jnp.abs(wrong) ** NORM).sum(axis=-2)

  def better(i: jax.Array, state: tuple[Grid, jax.Array]) -> tuple[Grid, jax.Array]:
    shrink = 1.0 - i / 100.0
    tried = _from_range(bottom * shrink, top * shrink, bits, symmetric, store)
    error = loss(tried)
    pick = error < state[1]
    best = jax.tree.map(lambda new, old: jnp.where(pick, new, old), tried, state[0])
    return best, jnp.where(pick, error, state[1])

  return jax.lax.fori_loop(1, STEPS, better, (grid, loss(grid)))[0]


def round_to(w: Float[Array, "..."], grid: Grid, *, bits: int) -> UInt8[Array, "..."]:
  """Round weights to the nearest codes, half to even, clipped to the range.

  Args:
    w: weights.
    grid: scales and zero points that broadcast against `w` (see `spread`).
    bits: width of a code.

  Returns:
    Unsigned codes.

  Example:
    >>> round_to(jnp.array([0.5, -9.0]), Grid(jnp.ones(1), None), bits=4).tolist()
    [8, 0]
  """
  zero = 2.0 ** (bits - 1) if grid.zeros is None else grid.zeros.astype(jnp.float32)
  steps = w.astype(jnp.float32) / grid.scales.astype(jnp.float32)
  # Symmetric codes are rounded before the shift, as signed ones are; otherwise ties differ.
  codes = jnp.round(steps) + zero if grid.zeros is None else jnp.round(steps + zero)
  return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def dequantize(codes: UInt8[Array, "..."], grid: Grid, *, bits: int) -> Float[Array, "..."]:
  """Compute the weights that codes stand for, in float32.

  Args:
    codes: unsigned codes.
    grid: scales and zero points that broadcast against `codes`.
    bits: width of a code.

  Returns:
    Weights in float32.

  Example:
    >>> dequantize(jnp.array([8, 0], jnp.uint8), Grid(jnp.ones(1), None), bits=4).tolist()
    [0.0, -8.0]
  """
  zero = 2.0 ** (bits - 1) if grid.zeros is None else grid.zeros.astype(jnp.float32)
  return (codes.astype(jnp.float32) - zero) * grid.scales.astype(jnp.float32)


def spread(grid: Grid, *, group_size: int, rows: int) -> Grid:
  """Repeat scales and zero points to one row an input row.

  Args:
    grid: one row a group.
    group_size: rows that share a scale.
    rows: number of input rows.

  Returns:
    A grid of shape (..., rows, cols), zeros still None if symmetric.

  Example:
    >>> spread(Grid(jnp.ones((2, 5)), None), group_size=3, rows=4).scales.shape
    (4, 5)
  """
  index = jnp.arange(rows) // group_size
  return jax.tree.map(lambda a: jnp.take(a, index, axis=-2), grid)


def tensor(
  codes: UInt8[Array, "*batch rows cols"],
  grid: Grid,
  *,
  bits: int,
  group_size: int,
  store: Any,
  group_index: Int32[Array, "rows"] | None = None,
) -> leaves.QuantizedTensor:
  """Pack codes and grids into a leaf.

  Args:
    codes: unsigned codes.
    grid: one row a group.
    bits: width of a code.
    group_size: rows that share a scale.
    store: dtype of the dense value.
    group_index: group of each row where groups are not consecutive.

  Returns:
    The leaf.

  Example:
    >>> tensor(jnp.zeros((4, 2), jnp.uint8), Grid(jnp.ones((1, 2)), None), bits=4, group_size=4,
    ...        store="float32").nbytes
    12
  """
  *_, rows, cols = codes.shape
  index = None if group_index is None else group_index[None, :]
  return leaves.QuantizedTensor(
    packing.pack(codes, bits=bits), grid.scales, grid.zeros, index, rows=rows, cols=cols,
    bits=bits, group_size=group_size, store=jnp.dtype(store).name,
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


def already(leaf: Any, *, bits: int, group_size: int, symmetric: bool) -> bool:
  """Tell whether a leaf is quantized in just this format, so that quantizing it is the identity.

  Args:
    leaf: array or compressed leaf.
    bits, group_size, symmetric: the format asked for.

  Returns:
    True if it is.

  Example:
    >>> already(jnp.zeros((2, 2)), bits=4, group_size=2, symmetric=True)
    False
  """
  return (
    isinstance(leaf, leaves.QuantizedTensor)
    and leaf.bits == bits
    and leaf.group_size == clamp_group(group_size, leaf.rows)
    and (leaf.zeros is None) == symmetric
  )


def check(
  *,
  bits: int,
  group_size: int,
  symmetric: bool = True,
  scale_dtype: str | None = None,
  **unused: Any,
) -> None:
  """Refuse hyper-parameters that no grid has.

  Args:
    bits: width of a code.
    group_size: rows that share a scale, or -1.
    symmetric: whether there are no zero points.
    scale_dtype: name of a floating-point dtype, or None.
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
  if bits == 1 and symmetric:
    raise ValueError("bits=1: a symmetric grid of one bit holds no weights; use symmetric=False")
  if group_size != -1 and (not isinstance(group_size, int) or group_size < 1):
    raise ValueError(
      f"group_size={group_size}: groups have 1 row or more; -1 is one group a column"
    )
  if scale_dtype is not None and scale_dtype not in ("float32", "bfloat16", "float16"):
    raise ValueError(f"scale_dtype={scale_dtype!r}: valid are float32, bfloat16, float16, None")


def _groups(w: jax.Array, group_size: int) -> jax.Array:
  """Cut rows into groups, (..., groups, group_size, cols); padding is 0, which no fit minds."""
  *batch, rows, cols = w.shape
  widths = [(0, 0)] * len(batch) + [(0, -rows % group_size), (0, 0)]
  return jnp.pad(w, widths).reshape(*batch, -1, group_size, cols)


def _from_range(bottom: jax.Array, top: jax.Array, bits: int, symmetric: bool, store: Any) -> Grid:
  steps = 2**bits - 1
  scales = jnp.maximum(-bottom, top) / (steps / 2) if symmetric else (top - bottom) / steps
  stored = scales.astype(store)
  # A group of zeros, or one whose scale underflows: every weight takes the code of 0.
  stored = jnp.where(stored == 0, jnp.ones((), store), stored)
  if symmetric:
    return Grid(stored, None)
  zeros = jnp.clip(jnp.round(-bottom / stored.astype(jnp.float32)), 0, steps)
  return Grid(stored, zeros.astype(jnp.uint8))
