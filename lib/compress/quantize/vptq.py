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

from treesurgeon.compress.quantize import kmeans, rounding
from treesurgeon.core import leaves, lifting, needs, packing, step

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
  alive, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  vectors = jnp.pad(alive[order][few:], [(0, 0), (0, -cols % length)])
  across = vectors.shape[1] // length
  ratios = rounding.ratios(h[order[few:, None], order[None, few:]], damping)
  weights = jnp.repeat(jnp.where(active.max() > 0, active[order], 1.0)[few:], across)

  def table(x: jax.Array, k: int, salt: int) -> jax.Array:
    points, key_of = x.reshape(-1, length), jax.random.fold_in(key, salt)
    found = kmeans.fit(points, k=k, key=key_of, weights=weights, iterations=iterations)
    return found.centroids.astype(w.dtype)

  tables = (table(vectors, entries or default_entries(len(weights)), 0),)
  (indices, left), _, _ = rounding.in_turn(vectors, ratios, tables, _nearest)
  if residual:
    tables = (*tables, table(left, residual, 1))
    (indices, _), _, _ = rounding.in_turn(vectors, ratios, tables, _nearest)
  back = jnp.argsort(order[few:])
  failed = ~jnp.isfinite(ratios).all()
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
  return lifting.over_leaves(
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


def _nearest(
  row: jax.Array, wanted: jax.Array, tables: tuple[jax.Array, ...]
) -> tuple[tuple[list[jax.Array], jax.Array], jax.Array]:
  """Round a row to sums of vectors: ((the indices into each table, what is left over), values)."""
  del row
  left, indices = wanted.reshape(-1, tables[0].shape[1]), []
  for table in tables:
    indices.append(kmeans.nearest(left, table)[0])
    left = left - table.astype(jnp.float32)[indices[-1]]
  left = left.ravel()
  return (indices, left), wanted - left
