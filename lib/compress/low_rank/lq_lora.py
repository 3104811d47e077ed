# SPDX-License-Identifier: Apache-2.0
"""LQ-LoRA: split a kernel into quantized codes and a low-rank term, each made for the other.

Guo et al., "LQ-LoRA: Low-rank plus quantized matrix decomposition" (arXiv 2311.12023). From Q = 0,
L = SVD_r(W - Q) and Q = NF(W - L) take turns until ||W - Q - L|| no longer falls, 100 times at
most. Codes are quantiles of a normal distribution, in blocks of 64 whose scales are 8-bit integers
in blocks of 256 (QLoRA's, arXiv 2305.14314). The low-rank term is what is fine-tuned afterwards.

With `fisher` an entry's error is weighted by its diagonal Fisher information F: the SVD is taken of
diag(r) (W - Q) diag(c) with r and c the roots of the means of F over rows and columns, for a
weighted SVD has no closed form, and the error that must fall is ||sqrt(F) (W - Q - L)||.

What the last turn made worse is dropped (the published code keeps it), and the SVD is exact where
theirs is randomized. A configuration for each kernel within a budget of bytes is an integer program
over steps of this method, `run.budget.plan`; the paper's 432 vary the scales' blocks and dtype too,
which here are fixed. Fixed point: a kernel in this form already is left alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from treesurgeon.compress.low_rank import svd
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, lifting, needs, step

ITERATIONS = 100
FORMAT = "nf"


class Parts(NamedTuple):
  """A matrix in two parts.

  Attributes:
    codes: of the quantized part.
    grid: its scales.
    a, b: factors of the other part.
    error: weighted norm of what is left.
  """

  codes: UInt8[Array, "rows cols"]
  grid: grids.Grid
  a: Float[Array, "rows rank"]
  b: Float[Array, "rank cols"]
  error: Float[Array, ""]


def decompose(
  w: Float[Array, "rows cols"],
  fisher: Float[Array, "rows cols"] | None = None,
  *,
  rank: int,
  bits: int,
  group_size: int,
  scale_dtype: str | None = None,
  iterations: int = ITERATIONS,
) -> Parts:
  """Split a matrix into a quantized and a low-rank part.

  Args:
    w: weights, input dimension first.
    fisher: how much each entry's squared error matters; None is all alike.
    rank: inner dimension of the low-rank part.
    bits: width of a code, 2 to 8.
    group_size: rows that share a scale.
    scale_dtype: how scales are stored, see `quantize.grid`; None is the dtype of `w`.
    iterations: turns at most.

  Returns:
    The parts, factors in float32.

  Example:
    >>> w = jnp.arange(16.0).reshape(4, 4)
    >>> parts = decompose(w, rank=2, bits=4, group_size=4)
    >>> bool(parts.error < 0.01 * jnp.linalg.norm(w))
    True
  """
  store = w.dtype.name if scale_dtype is None else scale_dtype
  wide = w.astype(jnp.float32)
  form: dict[str, Any] = {"bits": bits, "group_size": group_size, "format": FORMAT}
  weights = jnp.ones_like(wide) if fisher is None else jnp.maximum(fisher.astype(jnp.float32), 0)
  weights = jnp.where(weights.sum() > 0, weights, 1.0)
  r, c = (_scale(weights.mean(axis=i, keepdims=True)) for i in (1, 0))

  def turn(quantized: jax.Array) -> tuple[Parts, jax.Array]:
    a, b = svd.factorize(r * (wide - quantized) * c, rank=rank)
    a, b = a / r, b / c
    low = jnp.matmul(a, b, precision="highest")
    codes, grid = rtn.quantize(wide - low, **form, scale_dtype=store)
    spread = grids.spread(grid, group_size=group_size, rows=w.shape[0])
    quantized = grids.dequantize(codes, spread, bits=bits, format=FORMAT)
    error = jnp.linalg.norm(jnp.sqrt(weights) * (wide - low - quantized))
    return Parts(codes, grid, a, b, error), quantized

  def falling(state: tuple) -> jax.Array:
    _, _, better, i = state
    return better & (i < iterations)

  def again(state: tuple) -> tuple:
    best, quantized, _, i = state
    new, next_quantized = turn(quantized)
    better = new.error < best.error
    best = jax.tree.map(lambda x, y: jnp.where(better, x, y), new, best)
    return best, next_quantized, better, i + 1

  first = (*turn(jnp.zeros_like(wide)), jnp.bool_(True), 1)
  return jax.lax.while_loop(falling, again, first)[0]


@step.method("compress.low_rank.lq_lora")
def lq_lora(
  *,
  rank: int = 64,
  bits: int = 4,
  group_size: int = 64,
  scale_dtype: str | None = "int8",
  fisher: bool = False,
  select: str | None = None,
) -> step.Step:
  """Split kernels into quantized and low-rank parts, made for each other.

  Args:
    rank: inner dimension of the low-rank part.
    bits: width of a code, 2 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    scale_dtype: how scales are stored, see `quantize.rtn`.
    fisher: weight errors by Fisher information, from calibration.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> lq_lora(bits=3, fisher=True)
    (compress.low_rank.lq_lora(bits=3, fisher=True),)

  Reference:
    Guo et al., LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model
    Finetuning, 2023, arXiv:2311.12023.
  """
  svd.check(rank=rank, ratio=1.0)
  hyper = {"rank": rank, "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
  grids.check(bits=bits, group_size=group_size, scale_dtype=scale_dtype, format=FORMAT)
  wants = {"fisher": needs.Statistic("fisher")} if fisher else {}
  return lifting.over_leaves(
    _leaf, hyper=hyper, select=select, wants=wants, raw=True, scope="block" if fisher else "leaf"
  )


def _leaf(
  w: Any, fisher: Any = None, *, rank: int, bits: int, group_size: int, scale_dtype: str | None
) -> Any:
  form: dict[str, Any] = {"bits": bits, "group_size": grids.clamp_group(group_size, w.shape[-2])}
  keep = min(rank, *w.shape[-2:])
  if isinstance(w, leaves.Sum) and isinstance(w.parts[-1], leaves.LowRank):
    codes = grids.already(w.parts[0], **form, symmetric=True, format=FORMAT)
    if codes and w.parts[-1].rank == keep:
      return w
  w = leaves.dense(w)
  parts = decompose(w, fisher, rank=keep, scale_dtype=scale_dtype, **form)
  base = grids.tensor(parts.codes, parts.grid, **form, store=w.dtype, format=FORMAT)
  return leaves.Sum((base, svd.held(w, parts.a, parts.b)))


def _scale(mean: jax.Array) -> jax.Array:
  """Take the root of means, none of them zero, for the scale is undone by division."""
  root = jnp.sqrt(mean)
  return jnp.maximum(root, 1e-6 * root.max())
