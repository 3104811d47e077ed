# SPDX-License-Identifier: Apache-2.0
"""Sums of table entries for vectors of weights: how AQLM finds codes, tables and scales.

Each function lowers the output error tr((W - Q)ᵀ H (W - Q)) in one of them and holds the others.
Babenko and Lempitsky, Additive quantization for extreme vector compression, CVPR 2014; Egiazarian
et al., AQLM, 2024, arXiv:2401.06118. Everything is in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from treesurgeon.compress.quantize import kmeans

CHUNK = 2**22  # candidates of the search held at a time
STEPS = 32  # of conjugate gradients


class State(NamedTuple):
  """A matrix as sums of table entries.

  Attributes:
    codes: the entry of each vector, a run of input rows of one output, in each table.
    tables: the entries.
    scales: multiplier of each output.
  """

  codes: Int32[Array, "tables runs cols"]
  tables: Float[Array, "tables entries length"]
  scales: Float[Array, "1 cols"]


def start(
  w: Float[Array, "rows cols"], *, key: jax.Array, length: int, k: int, tables: int, iterations: int
) -> State:
  """Begin with k-means of the vectors, then of what it leaves over, and so on.

  Args:
    w: weights, input dimension first; rows a multiple of `length`.
    key: draws first centroids.
    length: rows that a vector covers.
    k: entries of a table.
    tables: how many.
    iterations: of k-means, at most.

  Returns:
    The state, scales being the norms of the outputs.

  Example:
    >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> state = start(w, key=jax.random.key(0), length=2, k=2, tables=1, iterations=5)
    >>> state.scales.tolist(), value(state).round(4).tolist()
    ([[5.0, 1.0]], [[3.0, 0.0], [4.0, 1.0]])
  """
  rows, cols = w.shape
  norms = jnp.sqrt(jnp.square(w).sum(axis=0, keepdims=True))
  scales = jnp.where(norms > 0, norms, 1.0)
  left = _vectors(w / scales, length).reshape(-1, length)
  codes, books = [], []
  for i in range(tables):
    found = kmeans.fit(left, k=k, key=jax.random.fold_in(key, i), iterations=iterations)
    left = left - found.centroids[found.index]
    codes.append(found.index.reshape(rows // length, cols))
    books.append(found.centroids)
  return State(jnp.stack(codes), jnp.stack(books), scales)


def value(state: State) -> Float[Array, "rows cols"]:
  """Compute the matrix.

  Args:
    state: codes, tables and scales.

  Returns:
    Weights.
  """
  return _sums(state.tables, state.codes) * state.scales


def error(w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], state: State) -> jax.Array:
  """Compute the output error.

  Args:
    w: weights.
    h: second moment of the inputs.
    state: what stands for them.

  Returns:
    tr((W - Q)ᵀ H (W - Q)).
  """
  wrong = w - value(state)
  return (wrong * jnp.matmul(h, wrong, precision="highest")).sum()


def fit_tables(w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], state: State) -> State:
  """Move the tables towards the least error for their codes, by conjugate gradients.

  Args:
    w: weights.
    h: second moment of the inputs.
    state: where to begin.

  Returns:
    The state with other tables; entries that no code names stay.
  """
  count, k, length = state.tables.shape

  def apply(tables: jax.Array) -> jax.Array:
    return _sums(tables, state.codes) * state.scales

  def gather(x: jax.Array) -> jax.Array:
    """Transpose `apply`: add up, for every entry, the vectors that name it."""
    vectors = _vectors(x * state.scales, length).reshape(-1, length)
    add = lambda code: jnp.zeros((k, length)).at[code.ravel()].add(vectors)
    return jax.vmap(add)(state.codes)

  def normal(tables: jax.Array) -> jax.Array:
    return gather(jnp.matmul(h, apply(tables), precision="highest"))

  def one(_: jax.Array, carry: tuple) -> tuple:
    tables, residual, direction, power = carry
    image = normal(direction)
    curve = (direction * image).sum()
    rate = jnp.where(curve > 0, power / jnp.where(curve > 0, curve, 1.0), 0.0)
    residual = residual - rate * image
    new = jnp.square(residual).sum()
    turn = jnp.where(power > 0, new / jnp.where(power > 0, power, 1.0), 0.0)
    return tables + rate * direction, residual, residual + turn * direction, new

  residual = gather(jnp.matmul(h, w - value(state), precision="highest"))
  carry = (state.tables, residual, residual, jnp.square(residual).sum())
  tables, *_ = jax.lax.fori_loop(0, min(STEPS, count * k * length), one, carry)
  moved = state._replace(tables=tables)
  # Rounding may undo what the last steps gained, once there is next to nothing left to gain.
  worse = ~(error(w, h, moved) <= error(w, h, state))
  return state._replace(tables=jnp.where(worse, state.tables, tables))


def fit_scales(w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], state: State) -> State:
  """Set each output's scale to the one of least error.

  Args:
    w: weights.
    h: second moment of the inputs.
    state: where to begin.

  Returns:
    The state with other scales.
  """
  q = _sums(state.tables, state.codes)
  image = jnp.matmul(h, q, precision="highest")
  above, below = (jnp.sum(x * image, axis=0, keepdims=True) for x in (w, q))
  fine = (below > 0) & (above != 0)
  return state._replace(scales=jnp.where(fine, above / jnp.where(fine, below, 1.0), state.scales))


def search(
  w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], state: State, *, beam: int
) -> State:
  """Try every entry for every vector and table in turn, keeping the best hypotheses of an output.

  Args:
    w: weights.
    h: second moment of the inputs.
    state: where to begin.
    beam: hypotheses kept for each output.

  Returns:
    The state with other codes.
  """
  cols = w.shape[1]
  chunk = max(1, min(cols, CHUNK // (beam * state.tables.shape[1])))
  more = -cols % chunk

  def cut(a: jax.Array) -> jax.Array:
    """Move parts of the last axis to the front."""
    wide = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
    return jnp.moveaxis(wide.reshape(*a.shape[:-1], -1, chunk), -2, 0)

  def some(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    w, codes, scales = part
    return _search(w, h, State(codes, state.tables, scales), beam)

  found = jax.lax.map(some, (cut(w), cut(state.codes), cut(state.scales)))
  codes = jnp.moveaxis(found, 0, -2).reshape(*state.codes.shape[:-1], cols + more)
  return state._replace(codes=codes[..., :cols])


def _search(w: jax.Array, h: jax.Array, state: State, beam: int) -> jax.Array:
  """Search the codes of some outputs. Axes: hypothesis b, table m, run r, entry k, output c."""
  count, runs, cols = state.codes.shape
  _, k, length = state.tables.shape
  scales = state.scales[None]

  def one(t: jax.Array, carry: tuple) -> tuple:
    codes, wrong, losses = carry
    r, m = t // count, t % count
    table, begin = state.tables[m], r * length
    rows = jax.lax.dynamic_slice_in_dim(h, begin, length, axis=0)
    own = jax.lax.dynamic_slice_in_dim(rows, begin, length, axis=1)
    old = codes[:, m, r]
    # How the output errs without this entry, seen from this vector's inputs.
    slope = jnp.einsum("lr,brc->blc", rows, wrong, precision="highest")
    slope = slope + scales * jnp.einsum("lj,bcj->blc", own, table[old], precision="highest")
    weight = jnp.einsum("kl,lj,kj->k", table, own, table, precision="highest")
    gain = jnp.einsum("kl,blc->bkc", table, slope, precision="highest")
    change = jnp.square(scales) * weight[None, :, None] - 2 * scales * gain
    here = jnp.take_along_axis(change, old[:, None, :], axis=1)
    tried = (losses[:, None, :] + change - here).reshape(beam * k, cols)
    if beam == 1:
      best = jnp.argmin(tried, axis=0)[None]
    else:
      best = jax.lax.top_k(-tried.T, beam)[1].T
    source, new = best // k, best % k
    losses = jnp.take_along_axis(tried, best, axis=0)
    codes = jnp.take_along_axis(codes, source[:, None, None, :], axis=0).at[:, m, r].set(new)
    moved = table[jnp.take_along_axis(old, source, axis=0)] - table[new]
    wrong = jnp.take_along_axis(wrong, source[:, None, :], axis=0)
    part = jax.lax.dynamic_slice_in_dim(wrong, begin, length, axis=1)
    part = part + jnp.swapaxes(moved, 1, 2) * scales
    return codes, jax.lax.dynamic_update_slice_in_dim(wrong, part, begin, axis=1), losses

  wrong = w - value(state)
  loss = (wrong * jnp.matmul(h, wrong, precision="highest")).sum(axis=0)
  spread = lambda a: jnp.broadcast_to(a, (beam, *a.shape))
  first = (jnp.arange(beam) == 0)[:, None]  # at the start there is but one hypothesis
  carry = (spread(state.codes), spread(wrong), jnp.where(first, loss[None], jnp.inf))
  codes, _, losses = jax.lax.fori_loop(0, runs * count, one, carry)
  best = jnp.argmin(losses, axis=0)
  return jnp.take_along_axis(codes, best[None, None, None, :], axis=0)[0]


def _vectors(w: jax.Array, length: int) -> jax.Array:
  """Cut a matrix into vectors, (runs, cols, length)."""
  return jnp.swapaxes(w.reshape(-1, length, w.shape[1]), 1, 2)


def _sums(tables: jax.Array, codes: jax.Array) -> jax.Array:
  """Add the entries up, (rows, cols)."""
  found = jax.vmap(lambda table, code: table[code])(tables, codes).sum(axis=0)
  return jnp.swapaxes(found, 1, 2).reshape(-1, codes.shape[-1])
