# SPDX-License-Identifier: Apache-2.0
"""Rounding rows in turn, so that later rows make up for the errors of earlier ones: GPTQ's core.

Inputs with second moment H = R Rᵀ, R upper triangular, turn an error W - Q of the weights into an
output error of ||Rᵀ (W - Q)||². Once rows i < j are rounded, row j of it vanishes for the weights
w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj, which are the ones to round. These are the weights that the
paper's code holds when it comes to row j, having corrected all rows ahead by the factor of the
inverse of H (Chen et al., arXiv:2507.18553); nothing need be inverted, and no matrix of weights is
rewritten a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import linalg

BLOCK, PART = 128, 16  # rows whose corrections are computed at once; matter to speed only
# (number of a row, the row to round, grid) -> (codes or a tree of them, the values they stand for)
Rule = Callable[[jax.Array, jax.Array, Any], tuple[Any, jax.Array]]


def ratios(h: Float[Array, "rows rows"], damping: float) -> Float[Array, "rows rows"]:
  """Compute how much of each earlier row's error a row makes up for.

  Args:
    h: second moment of the inputs, in the order of rounding, up to a factor.
    damping: added to its diagonal, relative to the mean; raised while the factorization fails.

  Returns:
    R_ij / R_jj in row j and column i < j, zeros elsewhere; NaN if nothing helped.

  Example:
    >>> ratios(jnp.array([[1.0, 0.5], [0.5, 1.0]]), 0.0).tolist()
    [[0.0, 0.0], [0.5, 0.0]]
  """
  low, _ = linalg.damped_cholesky(h[::-1, ::-1], damping)
  return jnp.tril(low.T[::-1, ::-1] / jnp.diag(low)[::-1, None], -1)


def without_dead(
  w: Float[Array, "rows cols"], h: Float[Array, "rows rows"]
) -> tuple[Float[Array, "rows cols"], Float[Array, "rows rows"]]:
  """Zero the weights of inputs that were never active and make H invertible there.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs.

  Returns:
    (w, h); w as it was if no input was ever active.

  Example:
    >>> w, h = without_dead(jnp.ones((2, 1)), jnp.diag(jnp.array([0.0, 2.0])))
    >>> w.ravel().tolist(), jnp.diag(h).tolist()
    ([0.0, 1.0], [1.0, 2.0])
  """
  diag = jnp.diag(h)
  dead, mean = diag == 0, diag.mean()
  fill = jnp.where(mean > 0, mean, 1.0)
  w = jnp.where(dead[:, None] & ~dead.all(), 0.0, w)
  return w, h + jnp.diag(jnp.where(dead, fill, 0.0))


def by_groups(groups: Int32[Array, " rows"], form: Mapping[str, Any]) -> Rule:
  """Round every row to the grid of its group.

  Args:
    groups: group of each row.
    form: bits and format.

  Returns:
    The rule.

  Example:
    >>> rule = by_groups(jnp.zeros(2, jnp.int32), {"bits": 4})
    >>> codes, values = rule(jnp.int32(0), jnp.array([0.9]), grids.Grid(jnp.ones((1, 1)), None))
    >>> codes.tolist(), values.tolist()
    ([9], [1.0])
  """

  def rule(row: jax.Array, wanted: jax.Array, grid: Any) -> tuple[jax.Array, jax.Array]:
    mine = jax.tree.map(lambda a: a[groups[row]], grid)
    codes = grids.round_to(wanted, mine, **form)
    return codes, grids.dequantize(codes, mine, **form)

  return rule


def in_turn(
  w: Float[Array, "rows cols"],
  ratios: Float[Array, "rows rows"],
  grid: Any,
  rule: Rule,
  *,
  block: int | None = None,
  refit: dict[str, Any] | None = None,
) -> tuple[Any, Any, Float[Array, "rows cols"]]:
  """Round rows one after another, each corrected for the errors of those before it.

  What earlier errors ask for is added first to a whole block of rows, then to a part of it, then to
  the row: few sums are long, and those are products of matrices. With `refit` a block is a group,
  and its grid is fitted to the rows as they would be if none of them were rounded.

  Args:
    w: weights in float32, in the order of rounding.
    ratios: see `ratios`.
    grid: what the rule rounds to; with `refit` scales and zero points, arrays, one row a group.
    rule: how to round a row; it is asked for rows of zeros beyond the last one too.
    block: rows corrected at once, which matters to speed only; None is `BLOCK`.
    refit: arguments of `grid.fit`; None keeps the grids.

  Returns:
    (codes, grid, errors): what the rule returned, stacked; the grid; the weights less what the
    codes stand for.

  Example:
    >>> w, h = jnp.array([[1.0], [0.9]]), jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> grid, rule = grids.Grid(jnp.ones((1, 1)), None), by_groups(jnp.zeros(2, int), {"bits": 4})
    >>> in_turn(w, ratios(h, 0.0), grid, rule)[0].ravel().tolist()
    [9, 9]
  """
  rows, cols = w.shape
  block = min(BLOCK, rows) if block is None else block
  more = -rows % block
  w = jnp.pad(w, [(0, more), (0, 0)])
  ratios = jnp.pad(ratios, [(0, more), (0, more)])
  part = max(n for n in range(1, PART + 1) if block % n == 0)
  code, _ = jax.eval_shape(rule, jnp.int32(0), w[0], grid)

  def cut(a: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, count, axis=0)

  def put(a: Any, start: jax.Array, new: Any) -> Any:
    one = lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, start, axis=0)
    return jax.tree.map(one, a, new)

  def empty(count: int) -> tuple[jax.Array, Any]:
    codes = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), code)
    return jnp.zeros((count, cols), jnp.float32), codes

  def within(c: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice(c, (jnp.zeros_like(start), start), (count, count))

  def add(c: jax.Array, errors: jax.Array) -> jax.Array:
    return jnp.matmul(c, errors, precision="highest")

  def one_block(b: jax.Array, state: tuple) -> tuple:
    errors, codes, grid = state
    start = b * block
    c, own = cut(ratios, start, block), cut(w, start, block)
    ahead = add(c, errors)
    inner = within(c, start, block)
    if refit is not None:
      free = jax.scipy.linalg.solve_triangular(inner, ahead, lower=True, unit_diagonal=True)
      new = grids.fit(own + free, group_size=block, **refit)
      grid = jax.tree.map(lambda a, x: put(a, b, x.astype(a.dtype)), grid, new)

    def one_part(p: jax.Array, state: tuple) -> tuple:
      errors, codes = state
      first = p * part
      c = cut(inner, first, part)
      wanted = cut(own + ahead, first, part) + add(c, errors)
      c = within(c, first, part)

      def one_row(i: jax.Array, state: tuple) -> tuple:
        errors, codes = state
        q, value = rule(start + first + i, wanted[i] + add(c[i], errors), grid)
        codes = jax.tree.map(lambda a, x: a.at[i].set(x), codes, q)
        return errors.at[i].set(own[first + i] - value), codes

      new = jax.lax.fori_loop(0, part, one_row, empty(part))
      return put(errors, first, new[0]), put(codes, first, new[1])

    new = jax.lax.fori_loop(0, block // part, one_part, empty(block))
    return put(errors, start, new[0]), put(codes, start, new[1]), grid

  state = (*empty(rows + more), grid)
  errors, codes, grid = jax.lax.fori_loop(0, (rows + more) // block, one_block, state)
  return jax.tree.map(lambda a: a[:rows], codes), grid, errors[:rows]
