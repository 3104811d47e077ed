# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round one input row at a time and let the rows not yet rounded make up for the error.

For a kernel W (in, out) and inputs with second moment H = sum x xᵀ, the output error is
tr(dWᵀ H dW). With H + d I = R Rᵀ, R upper triangular, it is ||Rᵀ (W - Q)||², and row j, the earlier
ones rounded, is best rounded from w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj: the codes of the paper,
which corrects the rows ahead by the factor of the inverse (Chen et al., arXiv:2507.18553), without
inverting. The result does not depend on the scale of H. Everything is computed in float32, for all
kernels together that the same inputs feed.

Where we differ from the paper's code: grids are fitted beforehand to the original weights, as
llm-compressor does (`scales="static"`; its codes are ours), so that activation order needs no
`group_index`; with "dynamic" they are fitted to the corrected weights when a group starts, from
up-to-date rows also inside a block, where the original reads stale ones. When H is not positive
definite the damping rises tenfold until it is; if that fails the scales are NaN, which the drivers
report with the leaf's address. Inputs that were never active have their weights zeroed, as in the
original, unless no input was seen at all: then the method is rounding to nearest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rounding
from treesurgeon.core import leaves, lifting, needs, step

SCALES = ("static", "dynamic")


class Quantized(NamedTuple):
  """What GPTQ found.

  Attributes:
    codes: unsigned codes, in the order of the rows of W.
    grid: scales and zero points, one row a group.
    group_index: group of each row where groups are not consecutive rows, else None.
  """

  codes: UInt8[Array, "rows cols"]
  grid: grids.Grid
  group_index: Int32[Array, " rows"] | None


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int,
  group_size: int,
  symmetric: bool = True,
  act_order: bool = False,
  scales: str = "static",
  damping: float = 0.01,
  mse: bool = False,
  scale_dtype: str | None = None,
  format: str = "int",
) -> Quantized:
  """Quantize a matrix so that its outputs on the calibration inputs change least.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    symmetric: whether there are no zero points.
    act_order: round the most active inputs first.
    scales: "static" or "dynamic", see above.
    damping: d relative to the mean diagonal of h.
    mse: search for the range that minimises the rounding error, see `grid.fit`.
    scale_dtype: how scales are stored, see `grid`; None is the dtype of `w`.
    format: "int" or a table of `core.formats`.

  Returns:
    The codes and grids; `group_index` only for "dynamic" with `act_order`.

  Example:
    >>> w, h = jnp.array([[1.0], [0.9]]), jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> quantize(w, h, bits=2, group_size=2).codes[:, 0].tolist()
    [3, 3]
  """
  rows = w.shape[0]
  scale_dtype = scale_dtype or w.dtype.name
  fit = {
    "bits": bits, "symmetric": symmetric, "mse": mse, "scale_dtype": scale_dtype, "format": format,
  }  # fmt: skip
  grid = grids.fit(w, group_size=group_size, **fit)
  w, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  order = jnp.arange(rows)
  if act_order:
    order = jnp.argsort(-jnp.diag(h), stable=True)
    w, h = w[order], h[order[:, None], order[None]]
  ratios = rounding.ratios(h, damping)
  form = {"bits": bits, "format": format}
  if scales == "static" or group_size >= rows:
    groups = order // group_size if scales == "static" else jnp.zeros(rows, jnp.int32)
    rule = rounding.by_groups(groups, form)
    codes, _, _ = rounding.in_turn(w, ratios, grids.values(grid), rule)
  else:
    rule = rounding.by_groups(jnp.arange(rows) // group_size, form)
    codes, grid, _ = rounding.in_turn(w, ratios, grid, rule, block=group_size, refit=fit)
  failed = ~jnp.isfinite(ratios).all()
  grid = grids.poisoned(grid, failed)
  group_index = None
  if act_order:
    back = jnp.argsort(order)
    codes = codes[back]
    if scales == "dynamic" and group_size < rows:
      group_index = (back // group_size).astype(jnp.int32)
  return Quantized(codes, grid, group_index)


@step.method("compress.quantize.gptq")
def gptq(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = True,
  act_order: bool | None = None,
  scales: str = "static",
  damping: float = 0.01,
  mse: bool = False,
  scale_dtype: str | None = None,
  format: str = "int",
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by GPTQ, from second moments of their inputs.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    act_order: round the most active inputs first; None does where it costs nothing, that is with
      static scales.
    scales: "static" fits grids to the original weights, as llm-compressor; "dynamic" to the
      corrected ones when a group starts, as GPTQModel: finer where errors have grown, but with
      `act_order` each row then names its group.
    damping: added to the diagonal of the second moment, relative to its mean.
    mse: search for the range that minimises the rounding error.
    scale_dtype: how scales are stored, as for rtn; "dynamic" ones are not quantized themselves.
    format: "int", or a table of `core.formats`, as for rtn.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> gptq(bits=3, act_order=False)
    (compress.quantize.gptq(bits=3, act_order=False),)

  Reference:
    Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, 2022, arXiv:2210.17323.
  """
  ordered = scales == "static" if act_order is None else act_order
  hyper = {
    "bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": ordered,
    "scales": scales, "damping": damping, "mse": mse, "scale_dtype": scale_dtype, "format": format,
  }  # fmt: skip
  grids.check(**hyper)
  if scales == "dynamic" and _nested(scale_dtype):
    raise ValueError(f"scale_dtype={scale_dtype!r} quantizes all scales at once: scales='static'")
  if scales not in SCALES:
    raise ValueError(f"scales={scales!r}: valid are {', '.join(SCALES)}")
  if not 0 <= damping < 1:
    raise ValueError(f"damping={damping}: valid is 0 to 1, usually 0.01")
  wants = {"hessian": needs.Statistic("second_moment")}
  return lifting.over_leaves(
    _leaves, hyper=hyper, select=select, wants=wants, raw=True, shared="hessian", scope="block"
  )


def _leaves(
  kernels: tuple[Any, ...],
  hessian: Any,
  *,
  bits: int,
  group_size: int,
  symmetric: bool,
  format: str,
  scale_dtype: str | None,
  **hyper: Any,
) -> tuple[Any, ...]:
  """Quantize kernels with the same inputs as one, unless they are in this format already."""
  form = {"bits": bits, "group_size": group_size, "format": format}
  hyper |= {"symmetric": symmetric, "scale_dtype": scale_dtype}
  if all(isinstance(w, leaves.Rotated) for w in kernels):
    held = tuple(w.weight for w in kernels)
    return tuple(map(leaves.Rotated, _leaves(held, hessian.turned(), **form, **hyper)))
  done = [grids.already(w, **form, symmetric=symmetric) for w in kernels]
  todo = [leaves.dense(w) for w, fine in zip(kernels, done, strict=True) if not fine]
  if len(todo) > 1 and (_nested(scale_dtype) or len({w.dtype for w in todo}) > 1):
    return tuple(_leaves((w,), hessian, **form, **hyper)[0] for w in kernels)
  if not todo:
    return kernels
  form["group_size"] = grids.clamp_group(group_size, todo[0].shape[-2])
  whole = jnp.concatenate(todo, axis=1)
  codes, grid, index = quantize(whole, hessian.moment, **form, **hyper)
  parts, start = list(kernels), 0
  for i, w in ((i, w) for i, w in enumerate(kernels) if not done[i]):
    cut = functools.partial(
      jax.lax.slice_in_dim, start_index=start, limit_index=start + w.shape[1], axis=1
    )
    own: Any = (codes, grid) if len(todo) == 1 else jax.tree.map(cut, (codes, grid))
    parts[i] = grids.tensor(*own, **form, store=w.dtype, group_index=index)
    start += w.shape[1]
  return tuple(parts)


def _nested(scale_dtype: str | None) -> bool:
  """Tell whether scales are quantized themselves, a kernel's together."""
  return scale_dtype is not None and (scale_dtype == "e4m3fn" or scale_dtype.startswith("int"))
