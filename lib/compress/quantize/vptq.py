# SPDX-License-Identifier: Apache-2.0
"""VPTQ: GPTQ whose grid is a table of vectors, each for several outputs of one input.

The rows of a kernel (in, out) are cut into vectors of `length` outputs. A table comes from k-means
in which a vector counts by its input's entry on the diagonal of H, the second moment of the inputs.
Then the inputs are rounded one after another, the most active first, each to the nearest vectors of
what it should be given the errors of those before it (`gptq` has the formula). With `residual` a
second table is fitted to what the first leaves over, and the inputs are rounded again to sums of
two vectors. The most active inputs are kept as they are. All in float32; the tables are stored in
the dtype of the kernel, and what is stored is what is rounded to.

Where we differ from the published code: outliers are not quantized (its option `-1`; otherwise
they take a table of their own); tables grow with the kernel until they have the paper's 65536
vectors, lest they outweigh the indices; there is no normalization of the inputs, and no fine-tuning
of the tables over layers, which the code has dropped too. Inputs that were never active have their
weights zeroed, as there, unless no input was seen at all.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import kmeans
from treesurgeon.core import leaves, linalg, needs, packing, step

BLOCK = 128  # rows whose corrections are computed at once; matter to speed only
LARGEST, SHARE = 2**16, 32  # entries of a table; vectors that must share one on average


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  key: jax.Array,
  length: int = 8,
  entries: int | None = None,
  residual: int = 0,
  outliers: float = 0.01,
  damping: float = 0.01,
  iterations: int = 100,
) -> Any:
  """Quantize vectors of a matrix so that its outputs on the calibration inputs change least.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    key: draws first centroids.
    length: outputs that a vector covers.
    entries: vectors in the table; None is a power of two that grows with the matrix.
    residual: vectors in the second table; 0 is none.
    outliers: fraction of the inputs, rounded up, that keep their weights.
    damping: added to the diagonal of h, relative to its mean.
    iterations: of k-means, at most.

  Returns:
    A `Codebook`; a `Sum` of two with `residual`; with outliers either within `SplitRows`.

  Example:
    >>> w = jnp.array([[1.0, -1.0, 3.0, 3.0], [1.0, -1.0, 3.0, 3.0]])
    >>> leaf = quantize(w, jnp.eye(2), key=jax.random.key(0), length=2, entries=2, outliers=0.0)
    >>> leaf.dense().tolist()
    [[1.0, -1.0, 3.0, 3.0], [1.0, -1.0, 3.0, 3.0]]
  """
  rows, cols = w.shape
  few = min(math.ceil(outliers * rows), rows - 1)
  active = jnp.diag(h).astype(jnp.float32)
  order = jnp.argsort(-active, stable=True)
  h, dead = h.astype(jnp.float32)[order][:, order], (active == 0)[order]
  vectors = w[order].astype(jnp.float32)
  vectors = jnp.where(dead[:, None] & ~dead.all(), 0.0, vectors)[few:]
  vectors = jnp.pad(vectors, [(0, 0), (0, -cols % length)]).reshape(rows - few, -1, length)
  h = (h + jnp.diag(jnp.where(dead, jnp.where(dead.all(), 1.0, active.mean()), 0.0)))[few:, few:]
  weights = jnp.where(dead.all(), 1.0, active[order])[few:]
  low, _ = linalg.damped_cholesky(h[::-1, ::-1], damping)
  ratios = jnp.tril(low.T[::-1, ::-1] / jnp.diag(low)[::-1, None], -1)

  def table(x: jax.Array, k: int, salt: int) -> jax.Array:
    found = kmeans.fit(
      x.reshape(-1, length), k=k, key=jax.random.fold_in(key, salt), iterations=iterations,
      weights=jnp.repeat(weights, x.shape[1]),
    )  # fmt: skip
    return found.centroids.astype(w.dtype)

  count = vectors.shape[0] * vectors.shape[1]
  tables = (table(vectors, entries or default_entries(count), 0),)
  indices, left = _in_turn(vectors, ratios, tables)
  if residual:
    tables = (*tables, table(left, residual, 1))
    indices, _ = _in_turn(vectors, ratios, tables)
  back = jnp.argsort(order[few:])
  failed = ~jnp.isfinite(low).all()
  parts = [
    _leaf(index[back], jnp.where(failed, jnp.nan, t), cols)
    for index, t in zip(indices, tables, strict=True)
  ]
  body = leaves.Sum(tuple(parts)) if residual else parts[0]
  if not few:
    return body
  mask = jnp.zeros((rows, 1), jnp.uint8).at[order[:few]].set(1)
  return leaves.SplitRows(w[jnp.sort(order[:few])], body, packing.pack(mask, bits=1))


def default_entries(count: int) -> int:
  """Choose the size of a table for so many vectors.

  Args:
    count: how many vectors there are.

  Returns:
    The largest power of two that gives an entry 32 vectors on average, from 2 to 65536.

  Example:
    >>> default_entries(4096 * 4096 // 8), default_entries(1000)
    (65536, 16)
  """
  return min(LARGEST, 2 ** max(1, int(math.log2(max(1, count / SHARE)))))


@step.method("compress.quantize.vptq")
def vptq(
  *,
  length: int = 8,
  entries: int | None = None,
  residual: int = 0,
  outliers: float = 0.01,
  damping: float = 0.01,
  iterations: int = 100,
  select: str | None = None,
) -> step.Step:
  """Quantize vectors of kernels, from second moments of their inputs.

  Args:
    length: outputs that a vector covers; the last vector of an input may be shorter.
    entries: vectors in a kernel's table, at most 65536; None grows with the kernel until then.
    residual: vectors in the second table; 0 is none.
    outliers: fraction of the inputs, rounded up, that keep their weights.
    damping: added to the diagonal of the second moment, relative to its mean.
    iterations: of k-means, at most.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> vptq(residual=256)
    (compress.quantize.vptq(residual=256),)

  Reference:
    Liu et al., VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models,
    2024, arXiv:2409.17066.
  """
  check(length=length, entries=entries)
  if residual and not 2 <= residual <= LARGEST:
    raise ValueError(f"residual={residual}: valid is 0 (no second table) and 2 to {LARGEST}")
  if not 0 <= outliers < 1:
    raise ValueError(f"outliers={outliers}: valid is 0 (none) to below 1, a fraction of the inputs")
  if not 0 <= damping < 1:
    raise ValueError(f"damping={damping}: valid is 0 to 1, usually 0.01")
  hyper = {
    "length": length, "entries": entries, "residual": residual, "outliers": outliers,
    "damping": damping, "iterations": iterations,
  }  # fmt: skip
  return step.over_leaves(
    _kernel, hyper=hyper, select=select, wants={"hessian": needs.Statistic("second_moment")},
    raw=True, random=True, scope="block",
  )  # fmt: skip


def check(*, length: int, entries: int | None) -> None:
  """Refuse a table that cannot be.

  Args:
    length: weights that a vector covers.
    entries: vectors in the table, or None.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> check(length=8, entries=256)
  """
  if length < 1:
    raise ValueError(f"length={length}: a vector covers 1 weight or more")
  if entries is not None and not 2 <= entries <= LARGEST:
    raise ValueError(f"entries={entries}: a table has 2 to {LARGEST} vectors; None chooses")


def _kernel(w: Any, hessian: Any, key: jax.Array, **hyper: Any) -> Any:
  body = w.rest if isinstance(w, leaves.SplitRows) else w
  body = body.parts[0] if isinstance(body, leaves.Sum) else body
  if isinstance(body, leaves.Codebook) and (body.length, body.width) == (1, hyper["length"]):
    return w
  return quantize(leaves.dense(w), hessian.moment, key=key, **hyper)


def _leaf(index: jax.Array, table: jax.Array, cols: int) -> leaves.Codebook:
  bits = max(1, (len(table) - 1).bit_length())
  codes = packing.pack(index.astype(jnp.uint8 if bits <= 8 else jnp.uint16), bits=bits)
  return leaves.Codebook(codes, table, len(index), cols, bits, 1, width=table.shape[1])


def _in_turn(
  w: jax.Array, ratios: jax.Array, tables: tuple[jax.Array, ...]
) -> tuple[list[jax.Array], jax.Array]:
  """Round the rows of vectors one after another.

  Returns:
    (the indices into each table, what was to be rounded minus what it was rounded to).
  """
  rows, across, length = w.shape
  block = min(BLOCK, rows)
  more = -rows % block
  w = jnp.pad(w.reshape(rows, -1), [(0, more), (0, 0)])
  ratios = jnp.pad(ratios, [(0, more), (0, more)])

  def cut(a: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, block, axis=0)

  def put(a: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, new, start, axis=0)

  def empty(count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    indices = jnp.zeros((count, len(tables), across), jnp.int32)
    return jnp.zeros((count, across * length)), jnp.zeros((count, across * length)), indices

  def one_block(b: jax.Array, state: tuple) -> tuple:
    start = b * block
    c, own = cut(ratios, start), cut(w, start)
    wanted = own + jnp.matmul(c, state[0], precision="highest")
    c = jax.lax.dynamic_slice(c, (jnp.zeros_like(start), start), (block, block))

    def one_row(i: jax.Array, state: tuple) -> tuple:
      errors, left, indices = state
      x = wanted[i] + jnp.matmul(c[i], errors, precision="highest")
      rest, found = x.reshape(across, length), []
      for t in tables:
        found.append(kmeans.nearest(rest, t)[0])
        rest = rest - t.astype(jnp.float32)[found[-1]]
      rest = rest.ravel()
      at = jnp.stack(found)
      return errors.at[i].set(own[i] - (x - rest)), left.at[i].set(rest), indices.at[i].set(at)

    new = jax.lax.fori_loop(0, block, one_row, empty(block))
    return tuple(put(a, x, start) for a, x in zip(state, new, strict=True))

  count = rows + more
  _, left, indices = jax.lax.fori_loop(0, count // block, one_block, empty(count))
  return [indices[:rows, i] for i in range(len(tables))], left[:rows].reshape(rows, across, length)
