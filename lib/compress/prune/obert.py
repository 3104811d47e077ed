# SPDX-License-Identifier: Apache-2.0
"""oBERT: prune by second order, with the inverse of a block-diagonal Fisher matrix.

Kurtic et al., "The Optimal BERT Surgeon", 2022 (arXiv 2203.07259). Around trained weights the loss
grows by half d' F d, F being the mean outer product of per-example gradients, damped, in blocks of
weights. Removing the set Q costs rho = half w_Q' ((F^-1)_QQ)^-1 w_Q once the other weights of its
blocks make up for it. Single weights are ranked over the whole model by w^2 / 2 (F^-1)_qq; with an
N:M pattern, of each run of m the set of m - n weights of least joint rho goes.

Where we differ from the paper's code (SparseML): all weights pruned of a block are made up for
together, at the exact minimum F_KK d_K = F_KQ w_Q over those kept, where the code adds up what each
would need alone. F is summed and factored, which is what the Woodbury recursion arrives at, in any
order of examples. Blocks are runs of inputs of one output, the last of an output shorter, where the
code's go on into the next output. Where float32 cannot factor a block, its damping rises tenfold.
One shot, without the paper's schedule and distillation. Blocks of 50 are 50 numbers a weight in
memory. Computed in float32, returned in the storage dtype.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from treesurgeon.compress.prune import masks, ranking
from treesurgeon.core import lifting, linalg, needs, step

PER = ("model", "matrix")
SETS = 100  # ways to prune a run that are tried at most: those of 4:8 are 70


def score(
  w: Float[Array, "rows cols"],
  fisher: Float[Array, "blocks cols block block"],
  *,
  damping: float,
) -> Float[Array, "rows cols"]:
  """Compute what removing each weight alone would cost.

  Args:
    w: weights, input dimension first.
    fisher: mean outer product of gradients, in blocks of rows of each column.
    damping: added to the diagonal.

  Returns:
    rho of each weight, float32.

  Example:
    >>> f = jnp.array([[[[1.0, 0.5], [0.5, 1.0]]]])
    >>> [round(float(x), 3) for x in score(jnp.array([[2.0], [1.0]]), f, damping=1e-7)[:, 0]]
    [1.5, 0.375]
  """

  def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    inverse = _inverse(part[1], damping)
    return jnp.square(part[0]) / (2 * jnp.diagonal(inverse, axis1=-2, axis2=-1).T)

  return _joined(jax.lax.map(one, (_cut(w, fisher.shape[-1]), fisher)), w.shape[0])


def choose(
  w: Float[Array, "rows cols"],
  fisher: Float[Array, "blocks cols block block"],
  *,
  pattern: tuple[int, int],
  damping: float,
) -> Bool[Array, "rows cols"]:
  """Keep those n of every m inputs whose others cost least to remove together.

  Args:
    w: weights, input dimension first.
    fisher: as for `score`; the block is a multiple of m.
    pattern: (n, m).
    damping: added to the diagonal.

  Returns:
    True where a weight is kept.

  Example:
    >>> f = jnp.array([[[[1.0, 0.5], [0.5, 1.0]]]])
    >>> choose(jnp.array([[2.0], [1.0]]), f, pattern=(1, 2), damping=1e-7).tolist()
    [[True], [False]]
  """
  n, m = pattern
  sets = np.array(list(itertools.combinations(range(m), m - n)), np.int32)
  runs = fisher.shape[-1] // m

  def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    cols = part[1].shape[0]
    index = jnp.arange(runs)
    inverse = _inverse(part[1], damping).reshape(cols, runs, m, runs, m)[:, index, :, index, :]
    w = part[0].reshape(runs, m, cols).swapaxes(1, 2)

    def attempt(best: tuple, gone: jax.Array) -> tuple[tuple, None]:
      inside, w_q = inverse[..., gone[:, None], gone[None, :]], w[..., gone]
      rho = (w_q * jnp.linalg.solve(inside, w_q[..., None])[..., 0]).sum(axis=-1)
      keep = (jnp.arange(m)[:, None] != gone[None, :]).all(axis=1)
      better = rho < best[0]
      mask = jnp.where(better[..., None], keep.reshape(1, 1, m), best[1])
      return (jnp.where(better, rho, best[0]), mask), None

    start = jnp.full(w.shape[:2], jnp.inf), jnp.ones(w.shape, bool)
    (_, keep), _ = jax.lax.scan(attempt, start, jnp.asarray(sets))
    return keep.swapaxes(1, 2).reshape(runs * m, cols)

  if n == m:
    return jnp.ones(w.shape, bool)
  return _joined(jax.lax.map(one, (_cut(w, runs * m), fisher)), w.shape[0])


def update(
  w: Float[Array, "rows cols"],
  fisher: Float[Array, "blocks cols block block"],
  keep: Bool[Array, "rows cols"],
  *,
  damping: float,
) -> Float[Array, "rows cols"]:
  """Remove weights and let those kept of each block make up for it.

  Args:
    w: weights, input dimension first.
    fisher: as for `score`.
    keep: True where a weight is kept.
    damping: added to the diagonal.

  Returns:
    The pruned weights, in the dtype of `w`.

  Example:
    >>> f, keep = jnp.array([[[[1.0, 0.5], [0.5, 1.0]]]]), jnp.array([[True], [False]])
    >>> update(jnp.array([[2.0], [1.0]]), f, keep, damping=1e-7).tolist()
    [[2.5], [0.0]]
  """
  block = fisher.shape[-1]

  def column(w: jax.Array, h: jax.Array, keep: jax.Array) -> jax.Array:
    need = jnp.matmul(h, jnp.where(keep, 0.0, w), precision="highest")
    inside = jnp.where(keep[:, None] & keep[None, :], h, jnp.eye(block))
    low = jnp.linalg.cholesky(inside)
    more = jax.scipy.linalg.cho_solve((low, True), jnp.where(keep, need, 0.0))
    return jnp.where(keep, w + more, 0.0)

  def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    h, _ = _damped(part[1], damping)
    return jax.vmap(column, in_axes=(1, 0, 1), out_axes=1)(part[0], h, part[2])

  whole = _cut(keep, block)
  return _joined(jax.lax.map(one, (_cut(w, block), fisher, whole)), w.shape[0]).astype(w.dtype)


@step.method("compress.prune.obert")
def obert(
  *,
  sparsity: float = 0.5,
  pattern: str | None = None,
  packed: bool = False,
  per: str = "model",
  block: int = 50,
  damping: float = 1e-7,
  select: str | None = None,
) -> step.Step:
  """Prune kernels by what their removal costs to second order, and adjust the weights that stay.

  Args:
    sparsity: fraction to prune; 0 is the neutral setting. Unused with a pattern.
    pattern: "n:m" keeps n of every m consecutive inputs of each output.
    packed: hold the result as a `SparseTensor`; needs a pattern.
    per: "model" or "matrix": within what weights are ranked where there is no pattern.
    block: consecutive inputs of an output whose weights are taken together, rounded down to a
      multiple of m.
    damping: added to the diagonal of the Fisher matrix, above 0.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. It needs calibration text, best of about 1000 sequences.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> obert(sparsity=0.7)
    (compress.prune.obert(sparsity=0.7),)

  Reference:
    Kurtic et al., The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large
    Language Models, 2022, arXiv:2203.07259.
  """
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=packed)
  if per not in PER:
    raise ValueError(f"per={per!r}: valid are {', '.join(PER)}")
  if block < 1 or not damping > 0:
    raise ValueError(f"block={block} must be at least 1 and damping={damping} above 0")
  if n_m is not None:
    n, m = n_m
    if block < m or math.comb(m, n) > SETS:
      raise ValueError(
        f"pattern={pattern!r}: every set of {m - n} of {m} weights is tried, of which there are "
        f"{math.comb(m, n)}; valid are up to {SETS}, and m up to block={block}"
      )
    block = block // m * m
  wants = {"fisher": needs.Statistic("fisher", block=block)}
  if n_m is None and per == "model":
    return ranking.over_model(
      score, update, hyper={"damping": damping}, sparsity=sparsity, select=select, wants=wants
    )
  hyper = {"sparsity": sparsity, "pattern": n_m, "packed": packed, "damping": damping}
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, wants=wants)


def _leaf(
  w: Any,
  fisher: Any,
  *,
  sparsity: float,
  pattern: tuple[int, int] | None,
  packed: bool,
  damping: float,
) -> Any:
  masks.check_rows(w.shape[0], pattern)
  if pattern is None:
    keep = masks.unstructured(score(w, fisher, damping=damping), sparsity=sparsity, per="matrix")
  else:
    keep = choose(w, fisher, pattern=pattern, damping=damping)
  out = update(w, fisher, keep, damping=damping)
  return masks.pack_n_of_m(out, keep, n=pattern[0], m=pattern[1]) if packed and pattern else out


def _damped(fisher: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
  """Return blocks (cols, block, block) with damping, and their lower factors."""

  def one(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = jnp.maximum(jnp.diag(h).mean(), jnp.finfo(jnp.float32).tiny)
    low, used = linalg.damped_cholesky(h, damping / scale)
    return h + used * scale * jnp.eye(h.shape[0]), low

  return jax.vmap(one)(fisher.astype(jnp.float32))


def _inverse(fisher: jax.Array, damping: float) -> jax.Array:
  return jax.vmap(linalg.inverse_from_cholesky)(_damped(fisher, damping)[1])


def _cut(x: jax.Array, block: int) -> jax.Array:
  """Cut rows into blocks, (blocks, block, cols); the last is filled with zeros."""
  x = x if x.dtype == bool else x.astype(jnp.float32)
  x = jnp.pad(x, [(0, -x.shape[0] % block), (0, 0)])
  return x.reshape(-1, block, x.shape[1])


def _joined(parts: jax.Array, rows: int) -> jax.Array:
  return parts.reshape(-1, parts.shape[-1])[:rows]
