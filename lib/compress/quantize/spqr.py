# SPDX-License-Identifier: Apache-2.0
"""SpQR: small groups with quantized statistics, and the few weights that groups are hurt by beside.

Every group of 16 inputs of an output has a scale and a zero point, which are 3-bit numbers
themselves, with a range for every 16 outputs. A weight is an outlier if its group's error,
sum (dw_j / U_jj)^2 with (H + d I)^-1 = U' U, falls much when the grid is fitted without it and it
is kept. Outliers stay as they are after the correction for earlier errors; grids are fitted without
them; the rest is rounded by GPTQ.

Where we differ from the published code (Vahe1994/SpQR): outliers are a fixed fraction of a matrix,
those of the highest scores, where the code takes all above a threshold, and again by their
error when their turn comes; scores and grids are those of the original weights. Inputs are rounded
the most active first, as there, but their groups are consecutive inputs in the kernel's order.
Everything is computed in float32. Fixed point: its own result is left alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import outliers as outlying
from treesurgeon.compress.quantize import rounding
from treesurgeon.core import leaves, lifting, linalg, needs, packing, step


def scores(
  w: Float[Array, "rows cols"], weight: Float[Array, " rows"], *, bits: int, group_size: int
) -> Float[Array, "rows cols"]:
  """Compute how much less a group loses if one of its weights is kept and left out of its grid.

  Args:
    w: weights, input dimension first.
    weight: of each input's squared error, 1 / U_jj^2.
    bits: width of a code.
    group_size: rows that share a scale; the last group may be shorter.

  Returns:
    One score a weight; negative where leaving it out does harm.

  Example:
    >>> w = jnp.array([[0.0], [1.0], [2.0], [30.0]])
    >>> int(scores(w, jnp.ones(4), bits=2, group_size=4).argmax())
    3
  """
  rows, cols = w.shape
  more = -rows % group_size
  parts = jnp.pad(w, [(0, more), (0, 0)]).reshape(-1, group_size, cols)
  inside = (jnp.arange(rows + more) < rows).reshape(-1, group_size, 1)
  weight = jnp.pad(weight, (0, more)).reshape(-1, group_size, 1)

  def error(keep: jax.Array) -> jax.Array:
    scales, zeros = _fit(parts, keep, bits)
    codes = jnp.clip(jnp.round(parts / scales + zeros), 0, 2**bits - 1)
    wrong = parts - (codes - zeros) * scales
    return jnp.where(keep, wrong**2 * weight, 0.0).sum(axis=1)

  def without(i: jax.Array) -> jax.Array:
    return error(inside & (jnp.arange(group_size) != i)[None, :, None])

  left = jax.lax.map(without, jnp.arange(group_size))  # (group_size, groups, cols)
  gain = error(inside)[None] - left
  return jnp.moveaxis(gain, 0, 1).reshape(-1, cols)[:rows]


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int = 3,
  group_size: int = 16,
  scale_bits: int = 3,
  scale_group: int = 16,
  outliers: float = 0.01,
  damping: float = 1.0,
) -> Any:
  """Quantize a matrix, all but its outliers.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    scale_bits: width of the scales and zero points.
    scale_group: columns whose scales share a range.
    outliers: fraction of the weights that are kept.
    damping: added to the diagonal of h, relative to its mean.

  Returns:
    A `QuantizedTensor`, or a `Sum` of one and `Outliers`.

  Example:
    >>> w = jnp.arange(64.0).reshape(16, 4).at[5, 1].set(900.0)
    >>> leaf = quantize(w, jnp.eye(16), outliers=1 / 64)
    >>> leaf.parts[1].positions.tolist(), bool(jnp.isclose(leaf.dense()[5, 1], 900.0))
    ([[21]], True)
  """
  rows, cols = w.shape
  exact, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  order = jnp.argsort(-jnp.diag(h), stable=True)
  h = h[order[:, None], order[None]]
  low, _ = linalg.damped_cholesky(h[::-1, ::-1], damping)
  importance = (jnp.diag(low)[::-1] ** 2)[jnp.argsort(order)]  # R_jj = 1 / U_jj
  score = scores(exact, importance, bits=bits, group_size=group_size)
  kept = outlying.pick(score, outliers)
  more = -rows % group_size
  parts = jnp.pad(exact, [(0, more), (0, 0)]).reshape(-1, group_size, cols)
  inside = jnp.pad(~kept, [(0, more), (0, 0)]).reshape(-1, group_size, cols)
  scales, zeros = (
    _numbers(x[:, 0], scale_bits, scale_group, w.dtype) for x in _fit(parts, inside, bits)
  )
  plain = grids.Grid(*(leaves.dense(x).astype(jnp.float32) for x in (scales, zeros)))
  nearest = rounding.by_groups(order // group_size, {"bits": bits})

  def rule(row: jax.Array, wanted: jax.Array, grid: Any) -> tuple[jax.Array, jax.Array]:
    codes, values = nearest(row, wanted, grid)
    return codes, jnp.where(kept[order[row]], wanted, values)

  codes, _, errors = rounding.in_turn(exact[order], rounding.ratios(h, damping), plain, rule)
  back = jnp.argsort(order)
  base = leaves.QuantizedTensor(
    packing.pack(codes[back], bits=bits), scales, zeros, None, rows=rows, cols=cols, bits=bits,
    group_size=group_size, store=w.dtype.name,
  )  # fmt: skip
  if not outlying.count_of(outliers, rows, cols):
    return base
  rest = exact - errors[back] - base.dense().astype(jnp.float32)
  return leaves.Sum((base, outlying.gather(rest.astype(w.dtype), kept, outliers)))


@step.method("compress.quantize.spqr")
def spqr(
  *,
  bits: int = 3,
  group_size: int = 16,
  scale_bits: int = 3,
  scale_group: int = 16,
  outliers: float = 0.01,
  damping: float = 1.0,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels in small groups with quantized scales, keeping outliers.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    scale_bits: width of the scales and zero points.
    scale_group: outputs whose scales share a range.
    outliers: fraction of the weights that are kept.
    damping: added to the diagonal of the second moment, relative to its mean.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> spqr(bits=4)
    (compress.quantize.spqr(bits=4),)

  Reference:
    Dettmers et al., SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
    Compression, 2023, arXiv:2306.03078.
  """
  grids.check(bits=bits, group_size=group_size, symmetric=False)
  outlying.check(outliers)
  if scale_bits not in range(1, 9) or scale_group < 1:
    raise ValueError(
      f"scale_bits={scale_bits}, scale_group={scale_group}: scales have 1 to 8 bits, and a range "
      "for one or more"
    )
  if not 0 <= damping <= 10:
    raise ValueError(f"damping={damping}: valid is 0 to 10, usually 1")
  hyper = {
    "bits": bits, "group_size": group_size, "scale_bits": scale_bits, "scale_group": scale_group,
    "outliers": outliers, "damping": damping,
  }  # fmt: skip
  wants = {"hessian": needs.Statistic("second_moment")}
  return lifting.over_leaves(
    _leaf, hyper=hyper, select=select, wants=wants, raw=True, scope="block"
  )


def _leaf(w: Any, hessian: Any, *, group_size: int, **hyper: Any) -> Any:
  base = w.parts[0] if outlying.is_beside(w, leaves.QuantizedTensor) else w
  own = {"bits": hyper["bits"], "group_size": group_size, "symmetric": False}
  if grids.already(base, **own) and leaves.is_leaf(base.zeros):
    return w
  w = leaves.dense(w)
  size = grids.clamp_group(group_size, w.shape[-2])
  return quantize(w, hessian.moment, group_size=size, **hyper)


def _fit(parts: jax.Array, keep: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  """Fit an asymmetric grid to what is kept of groups (groups, size, cols); zeros are real."""
  top = jnp.where(keep, parts, -jnp.inf).max(axis=1, keepdims=True)
  bottom = jnp.where(keep, parts, jnp.inf).min(axis=1, keepdims=True)
  some = top > bottom  # neither empty nor of one value
  only = jnp.where(jnp.isfinite(bottom), bottom, 0.0)
  scales = jnp.where(some, (top - bottom) / (2**bits - 1), 1.0)
  return scales, -jnp.where(some, bottom, only) / scales


def _numbers(x: jax.Array, bits: int, cols: int, store: Any) -> leaves.QuantizedTensor:
  """Quantize statistics (groups, cols), with a range for `cols` of them in a row."""
  rows, width = x.shape
  cols = min(cols, width)
  more = -width % cols
  parts = jnp.pad(x, [(0, 0), (0, more)], mode="edge").reshape(rows, -1, cols)
  fitted = _fit(jnp.swapaxes(parts, 1, 2), jnp.array(True), bits)
  grid = grids.Grid(*(a[:, 0].astype(store) for a in fitted))
  wide = grids.spread(grid, group_size=1, rows=rows, group_cols=cols, cols=width)
  return grids.tensor(
    grids.round_to(x, wide, bits=bits), grid, bits=bits, group_size=1, group_cols=cols,
    store="float32",
  )  # fmt: skip
