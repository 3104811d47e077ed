# SPDX-License-Identifier: Apache-2.0
"""AdaDim: groups of weights within outputs or within inputs, whichever serves a kernel better.

A group usually lies within one output (per OC): `group_size` inputs share a scale. If few inputs
are much larger than the others, or have unusual weights, each such group holds some of them; groups
within one input (per IC), of as many outputs, keep them apart. For every kernel both are tried by
rounding to nearest, and the one with the smaller output error tr(dW' H dW) is kept, H the second
moment of the inputs; then the kernel is rounded to nearest or by GPTQ.

As in the published code (johnheo/adadim-llm) grids are asymmetric and GPTQ does not take part in
the choice. Where we differ: the error is that of the kernel's own output, not of the attention or
MLP around it; GPTQ's grids are fitted beforehand for both kinds of groups, and its inputs stay in
their order. Float32. Fixed point: its own result, of either kind, is left alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rounding, rtn
from treesurgeon.core import leaves, lifting, needs, step

OVER = ("rtn", "gptq")
DIMENSIONS = ("output", "input")


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int,
  group_size: int,
  dimension: str,
  over: str = "rtn",
  damping: float = 0.01,
  scale_dtype: str | None = None,
) -> tuple[UInt8[Array, "rows cols"], grids.Grid]:
  """Quantize a matrix in groups within outputs, or within inputs.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    bits: width of a code, 1 to 8.
    group_size: weights that share a scale; the last group may be smaller.
    dimension: what a group lies within, "output" or "input".
    over: "rtn" or "gptq".
    damping: of GPTQ, see there.
    scale_dtype: how scales are stored, see `grid`; None is the dtype of `w`.

  Returns:
    (codes, grid), the grid in tiles of (group_size, 1) or (1, group_size).

  Example:
    >>> w, h = jnp.array([[9.0, 3.0], [0.0, 0.1]]), jnp.eye(2)
    >>> quantize(w, h, bits=2, group_size=2, dimension="input")[1].scales.tolist()
    [[3.0], [0.03333333507180214]]
  """
  rows, cols = w.shape
  tile = _tile(group_size, dimension, w.shape)
  codes, grid = rtn.quantize(w, bits=bits, symmetric=False, scale_dtype=scale_dtype, **tile)
  if over == "rtn":
    return codes, grid
  exact, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  ratios = rounding.ratios(h, damping)
  wide = grids.spread(grid, rows=rows, cols=cols, **tile)
  rule = rounding.by_groups(jnp.arange(rows), {"bits": bits})
  codes, _, _ = rounding.in_turn(exact, ratios, wide, rule)
  return codes, grids.poisoned(grid, ~jnp.isfinite(ratios).all())


def error(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int,
  group_size: int,
  dimension: str,
  scale_dtype: str | None = None,
) -> Float[Array, ""]:
  """Compute the output error of rounding to nearest in one kind of groups.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs.
    bits: width of a code.
    group_size: weights that share a scale.
    dimension: what a group lies within.
    scale_dtype: how scales are stored.

  Returns:
    tr(dW' H dW).

  Example:
    >>> w = jnp.array([[9.0, 3.0], [0.0, 0.1]])
    >>> [round(float(error(w, jnp.eye(2), bits=2, group_size=2, dimension=d)), 4)
    ...  for d in ("output", "input")]
    [0.01, 0.0]
  """
  tile = _tile(group_size, dimension, w.shape)
  codes, grid = rtn.quantize(w, bits=bits, symmetric=False, scale_dtype=scale_dtype, **tile)
  wide = grids.spread(grid, rows=w.shape[0], cols=w.shape[1], **tile)
  wrong = grids.dequantize(codes, wide, bits=bits) - w.astype(jnp.float32)
  return (jnp.matmul(h.astype(jnp.float32), wrong, precision="highest") * wrong).sum()


@step.method("compress.quantize.adadim")
def adadim(
  *,
  bits: int = 4,
  group_size: int = 128,
  over: str = "rtn",
  damping: float = 0.01,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize each kernel in groups along the dimension that serves it better.

  Args:
    bits: width of a code, 1 to 8.
    group_size: weights that share a scale; -1, or more than there are, is a whole column or row.
    over: how to round, "rtn" or "gptq".
    damping: of GPTQ: added to the diagonal of the second moment, relative to its mean.
    scale_dtype: how scales are stored, as for rtn; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing. Shapes alone
    do not tell what it stores: `jax.eval_shape` takes groups within outputs.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> adadim(bits=3, over="gptq")
    (compress.quantize.adadim(bits=3, over='gptq'),)

  Reference:
    Heo et al., Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of
    Large Language Models, ICLR 2024, arXiv:2309.15531.
  """
  grids.check(bits=bits, group_size=group_size, symmetric=False, scale_dtype=scale_dtype)
  if over not in OVER:
    raise ValueError(f"over={over!r}: valid are {', '.join(OVER)}")
  if not 0 <= damping < 1:
    raise ValueError(f"damping={damping}: valid is 0 to 1, usually 0.01")
  hyper = {
    "bits": bits, "group_size": group_size, "over": over, "damping": damping,
    "scale_dtype": scale_dtype,
  }  # fmt: skip
  return lifting.over_leaves(
    _leaf, hyper=hyper, select=select, wants={"hessian": needs.Statistic("second_moment")},
    raw=True, options=[{"dimension": d} for d in DIMENSIONS], choose=_choose, scope="block",
  )  # fmt: skip


def _tile(group_size: int, dimension: str, shape: tuple[int, ...]) -> dict[str, Any]:
  if dimension == "output":
    return {"group_size": grids.clamp_group(group_size, shape[0]), "group_cols": 1}
  return {"group_size": 1, "group_cols": grids.clamp_group(group_size, shape[1])}


def _choose(
  w: Any,
  hessian: Any,
  *,
  options: Any,
  bits: int,
  group_size: int,
  scale_dtype: str | None,
  **hyper: Any,
) -> jax.Array:
  del hyper
  how = {"bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
  w = leaves.dense(w)
  return jnp.argmin(jnp.stack([error(w, hessian.moment, **how, **dict(o)) for o in options]))


def _leaf(w: Any, hessian: Any, *, bits: int, group_size: int, dimension: str, **hyper: Any) -> Any:
  for d in DIMENSIONS:
    if grids.already(w, bits=bits, symmetric=False, **_tile(group_size, d, w.shape)):
      return w
  w = leaves.dense(w)
  how: dict[str, Any] = {"bits": bits, "group_size": group_size, "dimension": dimension, **hyper}
  codes, grid = quantize(w, hessian.moment, **how)
  tile = _tile(group_size, dimension, w.shape)
  return grids.tensor(codes, grid, bits=bits, store=jnp.dtype(w.dtype), **tile)
