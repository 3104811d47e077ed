# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: prune input rows one after another and let those that follow make up for the error.

For a kernel W (in, out) and inputs with second moment H = sum x xᵀ, let (H + d I)⁻¹ = Uᵀ U with U
upper triangular, as for GPTQ. Within every block of 128 rows the weights of least (w / U_jj)² are
pruned, as many as the sparsity says; with a pattern the choice falls as each run of m rows is
reached, on the weights as corrected by then. A pruned weight leaves the error e = w / U_jj, and the
rows that follow become W[i] -= U[j, i] e. Optionally what stays is rounded to a grid on the way, so
that each of both errors is made up for together.

Where we differ from the paper's code, and from llm-compressor's: exactly int(sparsity n) weights go
of every block (theirs is one more), so that sparsity 0 is the identity. The weights of inputs that
were never active go first instead of all. If H cannot be factored, the damping rises tenfold until
it can; if that fails the weights are NaN, which drivers report (llm-compressor takes H = I). Runs
of an m that does not divide 128 stay whole. The update is computed when a row is reached, from the
errors before it, not spread ahead: the same sums, and a third of the memory traffic. Float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.prune import masks
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import lifting, linalg, needs, step

BLOCK = 128  # rows among which magnitudes are compared
TILE = 16  # rows corrected together; changes speed and rounding only


def prune(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  sparsity: float,
  pattern: tuple[int, int] | None = None,
  packed: bool = False,
  damping: float = 0.01,
  bits: int | None = None,
  group_size: int = 128,
  symmetric: bool = True,
) -> Any:
  """Prune a matrix so that its outputs on the calibration inputs change least.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    sparsity: fraction of every block of rows to prune, where there is no pattern.
    pattern: (n, m) keeps n of every m consecutive inputs of each output.
    packed: return a `SparseTensor`; needs a pattern.
    damping: d relative to the mean diagonal of h.
    bits: quantize what is kept to so many bits; None leaves it in the dtype of `w`.
    group_size, symmetric: of the grid, as `quantize.gptq.quantize` takes them.

  Returns:
    The pruned weights in the dtype of `w`; with bits, a `QuantizedTensor`.

  Raises:
    ValueError: if the rows are not a multiple of m.

  Example:
    >>> w, h = jnp.array([[1.0], [0.9]]), jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> [round(float(x), 2) for x in prune(w, h, sparsity=0.5, damping=0.0)[:, 0]]
    [0.0, 1.8]
  """
  return _prune(
    w, _factor(h, damping), sparsity=sparsity, pattern=pattern, packed=packed, bits=bits,
    group_size=group_size, symmetric=symmetric,
  )  # fmt: skip


@step.method("compress.prune.sparsegpt")
def sparsegpt(
  *,
  sparsity: float = 0.5,
  pattern: str | None = None,
  packed: bool = False,
  damping: float = 0.01,
  bits: int | None = None,
  group_size: int = 128,
  symmetric: bool = True,
  select: str | None = None,
) -> step.Step:
  """Prune kernels by SparseGPT, from second moments of their inputs; quantize them too if asked.

  Args:
    sparsity: fraction to prune; 0 is the neutral setting. Unused with a pattern.
    pattern: "n:m" keeps n of every m consecutive inputs of each output.
    packed: hold the result as a `SparseTensor`; needs a pattern, and no bits.
    damping: added to the diagonal of the second moment, relative to its mean.
    bits: quantize what is kept to so many bits, 1 to 8; None does not.
    group_size: of the grid: input rows that share a scale; -1 is one a column.
    symmetric: whether the grid has no zero points.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> sparsegpt(pattern="2:4", bits=4)
    (compress.prune.sparsegpt(pattern='2:4', bits=4),)

  Reference:
    Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
    2023, arXiv:2301.00774.
  """
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=packed)
  if not 0 <= damping < 1:
    raise ValueError(f"damping={damping}: valid is 0 to 1, usually 0.01")
  if bits is not None:
    grids.check(bits=bits, group_size=group_size, symmetric=symmetric)
    if packed:
      raise ValueError(f"packed=True stores weights as they are; it does not go with bits={bits}")
  hyper = {
    "sparsity": sparsity, "pattern": n_m, "packed": packed, "damping": damping, "bits": bits,
    "group_size": group_size, "symmetric": symmetric,
  }  # fmt: skip
  wants = {"hessian": needs.Statistic("second_moment")}
  return lifting.over_leaves(
    _leaves, hyper=hyper, select=select, wants=wants, shared="hessian", scope="block"
  )


def _leaves(
  kernels: tuple[Any, ...], hessian: Any, *, damping: float, **hyper: Any
) -> tuple[Any, ...]:
  """Prune kernels with the same inputs, whose factor is computed once."""
  factor = _factor(hessian.moment, damping)
  return tuple(_prune(w, factor, **hyper) for w in kernels)


def _factor(h: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
  """Return U, and 1 / U_jj², which is 0 for inputs never active."""
  h = h.astype(jnp.float32)
  diagonal = jnp.diag(h)
  seen, mean = diagonal > 0, diagonal.mean()
  h = h + jnp.diag(jnp.where(seen, 0.0, jnp.where(mean > 0, mean, 1.0)))
  upper, _ = linalg.inverse_factor(h, damping)
  # Without any input all are alike.
  return upper, jnp.where(seen | ~seen.any(), 1 / jnp.square(jnp.diag(upper)), 0.0)


def _prune(
  w: jax.Array,
  factor: tuple[jax.Array, jax.Array],
  *,
  sparsity: float,
  pattern: tuple[int, int] | None,
  packed: bool,
  bits: int | None,
  group_size: int,
  symmetric: bool,
) -> Any:
  rows = w.shape[0]
  masks.check_rows(rows, pattern)
  if bits is None:
    out = _solve(w, factor, sparsity, pattern).astype(w.dtype)
    return masks.pack_nonzero(out, pattern) if packed and pattern else out
  group_size = grids.clamp_group(group_size, rows)
  grid = grids.fit(w, bits=bits, group_size=group_size, symmetric=symmetric)
  wide = grids.spread(grid, group_size=group_size, rows=rows)
  out = _solve(w, factor, sparsity, pattern, wide, bits)
  failed = ~jnp.isfinite(out).all()
  grid = grid._replace(scales=jnp.where(failed, jnp.nan, grid.scales).astype(grid.scales.dtype))
  codes = grids.round_to(out, wide, bits=bits)
  return grids.tensor(codes, grid, bits=bits, group_size=group_size, store=w.dtype)


def _solve(
  w: jax.Array,
  factor: tuple[jax.Array, jax.Array],
  sparsity: float,
  pattern: tuple[int, int] | None,
  wide: grids.Grid | None = None,
  bits: int = 0,
) -> jax.Array:
  """Go through the blocks of rows, each a loop over tiles, each a loop over rows."""
  upper, scale = factor
  w, rows = w.astype(jnp.float32), w.shape[0]
  block = BLOCK if pattern is None else max(BLOCK // pattern[1], 1) * pattern[1]

  def cut(x: jax.Array, start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=0)

  def put(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=0)

  def corrected(part: jax.Array, u: jax.Array, errors: jax.Array) -> jax.Array:
    return part - jnp.matmul(u.T, errors, precision="highest")

  def one_row(i: jax.Array, state: tuple, u: jax.Array, keep: jax.Array, grid: Any) -> tuple:
    w_t, out, errors = state
    kept = w_t[i]
    if wide is not None:
      mine = jax.tree.map(lambda a: a[i], grid)
      kept = grids.dequantize(grids.round_to(kept, mine, bits=bits), mine, bits=bits)
    q = jnp.where(keep[i], kept, 0.0)
    error = (w_t[i] - q) / u[i, i]
    w_t = w_t - u[i][:, None] * error[None, :]
    return w_t, out.at[i].set(q), errors.at[i].set(error)

  def one_block(start: Any, state: tuple, size: int) -> tuple:
    out, errors = state
    u_b = jax.lax.dynamic_slice_in_dim(cut(upper, start, size), start, size, axis=1)
    w_b = corrected(
      cut(w, start, size), jax.lax.dynamic_slice_in_dim(upper, start, size, axis=1), errors
    )
    scale_b = cut(scale, start, size)[:, None]
    whole = jnp.ones(w_b.shape, bool)
    if pattern is None:
      whole = masks.unstructured(jnp.square(w_b) * scale_b, sparsity=sparsity, per="matrix")
    tile = pattern[1] if pattern is not None else math.gcd(size, TILE)

    def one_tile(t: jax.Array, state: tuple) -> tuple:
      out_b, errors_b = state
      first = t * tile
      w_t = corrected(
        cut(w_b, first, tile), jax.lax.dynamic_slice_in_dim(u_b, first, tile, axis=1), errors_b
      )
      u_t = jax.lax.dynamic_slice_in_dim(cut(u_b, first, tile), first, tile, axis=1)
      keep = cut(whole, first, tile)
      if pattern is not None:
        keep = masks.n_of_m(jnp.square(w_t) * cut(scale_b, first, tile), n=pattern[0], m=tile)
      grid = jax.tree.map(lambda a: cut(a, start + first, tile), wide)
      empty = jnp.zeros_like(w_t)
      _, out_t, errors_t = jax.lax.fori_loop(
        0, tile, lambda i, s: one_row(i, s, u_t, keep, grid), (w_t, empty, empty)
      )
      return put(out_b, out_t, first), put(errors_b, errors_t, first)

    empty = jnp.zeros_like(w_b)
    out_b, errors_b = jax.lax.fori_loop(0, size // tile, one_tile, (empty, empty))
    return put(out, out_b, start), put(errors, errors_b, start)

  state = jnp.zeros_like(w), jnp.zeros_like(w)
  count = rows // block
  if count:
    state = jax.lax.fori_loop(0, count, lambda b, s: one_block(b * block, s, block), state)
  if rows % block:
    state = one_block(count * block, state, rows % block)
  return state[0]
