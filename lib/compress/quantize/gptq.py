# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round one input row at a time and let the rows not yet rounded make up for the error.

For a kernel W (in, out) and inputs with second moment H = sum x xᵀ, the output error is
tr(dWᵀ H dW). With (H + d I)⁻¹ = Uᵀ U, U upper triangular, row j is rounded to q_j and the rest
takes W[j:] -= U[j, j:]ᵀ (w_j - q_j) / U_jj; updates beyond a block of rows are applied once a
block. The result does not depend on the scale of H. Everything is computed in float32.

Where we differ from the paper's code: grids are fitted beforehand to the original weights, as
llm-compressor does (`scales="static"`; its codes are ours), so that activation order needs no
`group_index`; with "dynamic" they are fitted to the corrected weights when a group starts, from
up-to-date rows also inside a block, where the original reads stale ones. U comes from one
factorization of the reversed H instead of inverting and factoring again. When H is not positive
definite the damping rises tenfold until it is; if that fails the scales are NaN, which the drivers
report with the leaf's address. Inputs that were never active have their weights zeroed, as in the
original, unless no input was seen at all: then the method is rounding to nearest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, linalg, needs, step

BLOCK = 128  # rows between updates of the whole matrix; changes speed and rounding only
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
    scale_dtype: dtype of the scales; None is that of `w`.

  Returns:
    The codes and grids; `group_index` only for "dynamic" with `act_order`.

  Example:
    >>> w, h = jnp.array([[1.0], [0.9]]), jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> quantize(w, h, bits=2, group_size=2).codes[:, 0].tolist()
    [3, 3]
  """
  rows = w.shape[0]
  scale_dtype = scale_dtype or w.dtype.name
  fit = {"bits": bits, "symmetric": symmetric, "mse": mse, "scale_dtype": scale_dtype}
  grid = grids.fit(w, group_size=group_size, **fit)
  w, h = _without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  order = jnp.arange(rows)
  if act_order:
    order = jnp.argsort(-jnp.diag(h), stable=True)
    w, h = w[order], h[order][:, order]
  upper, _ = linalg.inverse_factor(h, damping)
  if scales == "static":
    codes, grid = _rows_in_turn(w, upper, grid, order // group_size, bits, block=BLOCK)
  else:
    block = BLOCK if group_size % BLOCK == 0 or BLOCK % group_size == 0 else group_size
    block = BLOCK if group_size >= rows else block
    codes, grid = _rows_in_turn(
      w, upper, grid, jnp.arange(rows) // group_size, bits, block=block,
      refit=None if group_size >= rows else (group_size, fit),
    )  # fmt: skip
  failed = ~jnp.isfinite(upper).all()
  grid = grid._replace(scales=jnp.where(failed, jnp.nan, grid.scales).astype(grid.scales.dtype))
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
  act_order: bool = False,
  scales: str = "static",
  damping: float = 0.01,
  mse: bool = False,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by GPTQ, from second moments of their inputs.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    act_order: round the most active inputs first.
    scales: "static" fits grids to the original weights, "dynamic" to the corrected ones.
    damping: added to the diagonal of the second moment, relative to its mean.
    mse: search for the range that minimises the rounding error.
    scale_dtype: float32, bfloat16 or float16; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> gptq(bits=3, act_order=True)
    (compress.quantize.gptq(bits=3, act_order=True),)

  Reference:
    Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, 2022, arXiv:2210.17323.
  """
  hyper = {
    "bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": act_order,
    "scales": scales, "damping": damping, "mse": mse, "scale_dtype": scale_dtype,
  }  # fmt: skip
  grids.check(**hyper)
  if scales not in SCALES:
    raise ValueError(f"scales={scales!r}: valid are {', '.join(SCALES)}")
  if not 0 <= damping < 1:
    raise ValueError(f"damping={damping}: valid is 0 to 1, usually 0.01")
  wants = {"hessian": needs.Statistic("second_moment")}
  return step.over_leaves(_leaf, hyper=hyper, select=select, wants=wants, raw=True, scope="block")


def _leaf(
  w: Any, hessian: Any, *, bits: int, group_size: int, symmetric: bool, **hyper: Any
) -> Any:
  if grids.already(w, bits=bits, group_size=group_size, symmetric=symmetric):
    return w
  w = leaves.dense(w)
  form = {"bits": bits, "group_size": grids.clamp_group(group_size, w.shape[-2])}
  codes, grid, index = quantize(w, hessian.moment, **form, symmetric=symmetric, **hyper)
  return grids.tensor(codes, grid, **form, store=w.dtype, group_index=index)


def _without_dead(w: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Zero the weights of inputs that were never active and make H invertible there."""
  diag = jnp.diag(h)
  dead, mean = diag == 0, diag.mean()
  fill = jnp.where(mean > 0, mean, 1.0)
  w = jnp.where(dead[:, None] & ~dead.all(), 0.0, w)
  return w, h + jnp.diag(jnp.where(dead, fill, 0.0))


def _rows_in_turn(
  w: jax.Array,
  upper: jax.Array,
  grid: grids.Grid,
  groups: jax.Array,
  bits: int,
  *,
  block: int,
  refit: tuple[int, dict[str, Any]] | None = None,
) -> tuple[jax.Array, grids.Grid]:
  """Round the rows one after another, blocks within a fori_loop within a fori_loop."""
  rows, cols = w.shape
  more = -rows % block if refit is None else -rows % max(block, refit[0])
  w = jnp.pad(w, [(0, more), (0, 0)])
  groups = jnp.pad(groups, (0, more))
  upper = jnp.pad(upper, [(0, more), (0, more)]) + jnp.diag(jnp.arange(rows + more) >= rows)
  columns = jnp.arange(rows + more)

  def fit_again(first: jax.Array, part: jax.Array, grid: grids.Grid) -> grids.Grid:
    size, how = refit  # pyright: ignore[reportGeneralTypeIssues]
    run = jax.lax.dynamic_slice_in_dim(part, first, size, axis=0)
    return grids.fit(run, group_size=size, **how)

  def one_row(
    i: jax.Array, state: tuple, start: jax.Array, u: jax.Array, all_w: jax.Array
  ) -> tuple:
    w_b, codes_b, errors_b, grid = state
    group = groups[start + i]
    if refit is not None:
      # A group lies within the block, or begins where a block does.
      part, first = (w_b, i) if refit[0] <= block else (all_w, start)

      def renew(grid: grids.Grid) -> grids.Grid:
        new = fit_again(first, part, grid)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (group, 0)), grid, new)

      starts = ((start + i) % refit[0] == 0) & (start + i < rows)
      grid = jax.lax.cond(starts, renew, lambda grid: grid, grid)
    mine = jax.tree.map(lambda a: a[group], grid)
    q = grids.round_to(w_b[i], mine, bits=bits)
    error = (w_b[i] - grids.dequantize(q, mine, bits=bits)) / u[i, start + i]
    ahead = jax.lax.dynamic_slice_in_dim(u[i], start, block)
    w_b = w_b - ahead[:, None] * error[None, :]
    return w_b, codes_b.at[i].set(q), errors_b.at[i].set(error), grid

  def one_block(b: jax.Array, state: tuple) -> tuple:
    w, codes, grid = state
    start = b * block
    u = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=0)
    w_b = jax.lax.dynamic_slice_in_dim(w, start, block, axis=0)
    empty = jnp.zeros((block, cols), jnp.uint8), jnp.zeros((block, cols), jnp.float32)
    _, codes_b, errors_b, grid = jax.lax.fori_loop(
      0, block, lambda i, s: one_row(i, s, start, u, w), (w_b, *empty, grid)
    )
    later = jnp.where(columns[None, :] >= start + block, u, 0.0)
    w = w - jnp.matmul(later.T, errors_b, precision="highest")
    return w, jax.lax.dynamic_update_slice_in_dim(codes, codes_b, start, axis=0), grid

  codes = jnp.zeros(w.shape, jnp.uint8)
  _, codes, grid = jax.lax.fori_loop(0, w.shape[0] // block, one_block, (w, codes, grid))
  return codes[:rows], grid
