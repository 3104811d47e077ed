# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight to the closest point of its group's grid, no data needed.

The baseline of all weight quantization. Grids follow llm-compressor (see `grid`), so the codes
equal those that compressed-tensors writes. Fixed point: a leaf that is already quantized in the
same format is left alone; and an asymmetric grid fitted to its own values is itself. (A
symmetric one is not: max|w| / 7.5 of values up to 7 s is smaller than s.)
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, lifting, step


def quantize(
  w: Float[Array, "*batch rows cols"],
  *,
  bits: int,
  group_size: int,
  symmetric: bool = True,
  mse: bool = False,
  scale_dtype: str | None = None,
  format: str = "int",
  group_cols: int = 1,
) -> tuple[UInt8[Array, "*batch rows cols"], grids.Grid]:
  """Fit a grid to every group of a matrix and round to it, in float32.

  Args:
    w: weights, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    symmetric: whether there are no zero points.
    mse: search for the range that minimises the error, see `grid.fit`.
    scale_dtype: how scales are stored, see `grid`; None is the dtype of `w`.
    format: "int" or a table of `core.formats`.
    group_cols: columns that share a scale.

  Returns:
    (codes, grid).

  Example:
    >>> codes, grid = quantize(jnp.array([[7.5], [-2.0]]), bits=4, group_size=2)
    >>> codes.tolist(), grid.scales.item()
    ([[15], [6]], 1.0)
  """
  grid = grids.fit(
    w, bits=bits, group_size=group_size, symmetric=symmetric, mse=mse, scale_dtype=scale_dtype,
    format=format, group_cols=group_cols,
  )  # fmt: skip
  *_, rows, cols = w.shape
  wide = grids.spread(grid, group_size=group_size, rows=rows, group_cols=group_cols, cols=cols)
  return grids.round_to(w, wide, bits=bits, format=format), grid


@step.method("compress.quantize.rtn")
def rtn(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = True,
  mse: bool = False,
  scale_dtype: str | None = None,
  format: str = "int",
  group_cols: int = 1,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by rounding to nearest.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    mse: search for the range that minimises the error.
    scale_dtype: how scales are stored: a floating-point dtype, float8_e8m0fnu (powers of two),
      e4m3fn or int8, int6, int4 (quantized in turn); None is the weight's dtype.
    format: "int", or a table of `core.formats`: e2m1, e4m3fn, nf, ternary, sign, shift, ...
    group_cols: columns that share a scale; -1 is all.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> rtn(bits=3)
    (compress.quantize.rtn(bits=3),)
    >>> mxfp4 = rtn(bits=4, format="e2m1", group_size=32, scale_dtype="float8_e8m0fnu")
    >>> nvfp4 = rtn(bits=4, format="e2m1", group_size=16, scale_dtype="e4m3fn")

  Reference:
    Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv:2106.08295.
  """
  hyper = {
    "bits": bits, "group_size": group_size, "symmetric": symmetric, "mse": mse,
    "scale_dtype": scale_dtype, "format": format, "group_cols": group_cols,
  }  # fmt: skip
  grids.check(**hyper)
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, raw=True)


@leaves.keeping_turns
def _leaf(
  w: Any, *, group_size: int, bits: int, symmetric: bool, format: str, group_cols: int, **hyper: Any
) -> Any:
  form = {"bits": bits, "group_size": group_size, "format": format, "group_cols": group_cols}
  if grids.already(w, **form, symmetric=symmetric):
    return w
  w = leaves.dense(w)
  form["group_size"] = grids.clamp_group(group_size, w.shape[-2])
  form["group_cols"] = grids.clamp_group(group_cols, w.shape[-1])
  codes, grid = quantize(w, **form, symmetric=symmetric, **hyper)
  return grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
