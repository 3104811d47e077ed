# SPDX-License-Identifier: Apache-2.0
"""HQQ: zero points that give rare large errors up for many small ones, from the weights alone.

Scales are those of the range of each group; zero points z minimise the sum of |W - (Q - z) s|^p,
p < 1, by half-quadratic splitting: E = shrink(W - (Q - z) s), shrink(x) = sign(x) max(|x| -
|x|^(p-1) / beta, 0); then z becomes the group's mean of Q - (W - E) / s, and beta grows by kappa.
As in the published code (mobiusml/hqq) the iteration ends when the mean of |E| over the matrix no
longer falls. Zero points stay floating-point. Everything is computed in float32.

The unit of the shrinkage is that of the weights: for weights as small as those of language models
it shrinks all errors to zero, and z is the mean of Q - W / s, which minimises the squared error for
the codes as they are. Where we differ from the code: groups lie along the inputs (its axis=1), and
4-bit zero points do not start rounded. Fixed point: its own result is left alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, lifting, step


def quantize(
  w: Float[Array, "*batch rows cols"],
  *,
  bits: int,
  group_size: int,
  p: float = 0.7,
  beta: float = 10.0,
  kappa: float = 1.01,
  iterations: int = 20,
  scale_dtype: str | None = None,
) -> tuple[UInt8[Array, "*batch rows cols"], grids.Grid]:
  """Fit zero points to groups of a matrix and round to their grids.

  Args:
    w: weights, input dimension first.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    p: exponent of the errors, up to 1.
    beta: penalty for splitting; what it penalises is in the unit of the weights.
    kappa: growth of beta an iteration.
    iterations: how many; 0 is the min-max grid with a floating-point zero point.
    scale_dtype: dtype of scales and zero points; None is that of `w`.

  Returns:
    (codes, grid).

  Example:
    >>> codes, grid = quantize(jnp.array([[0.0], [0.1], [0.2], [3.0]]), bits=2, group_size=4)
    >>> codes[:, 0].tolist(), grid.scales.tolist()
    ([0, 0, 0, 3], [[1.0]])
  """
  steps, store = 2**bits - 1, jnp.dtype(scale_dtype or w.dtype)
  *batch, rows, cols = w.shape
  widths = [(0, 0)] * len(batch) + [(0, -rows % group_size), (0, 0)]
  parts = jnp.pad(w.astype(jnp.float32), widths).reshape(*batch, -1, group_size, cols)
  valid = jnp.arange(parts.shape[-3] * group_size) < rows
  inside = valid.reshape((1,) * len(batch) + (-1, group_size, 1))
  count = inside.sum(axis=-2, keepdims=True)
  top = jnp.where(inside, parts, -jnp.inf).max(axis=-2, keepdims=True)
  bottom = jnp.where(inside, parts, jnp.inf).min(axis=-2, keepdims=True)
  scales = ((top - bottom) / steps).astype(store)
  stored = jnp.where(scales > 0, scales, jnp.ones((), store))
  scales = stored.astype(jnp.float32)

  def codes_for(zeros: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(parts / scales + zeros), 0, steps)

  def wrong(zeros: jax.Array) -> jax.Array:
    return jnp.where(inside, parts - (codes_for(zeros) - zeros) * scales, 0.0)

  def one(i: jax.Array, state: tuple) -> tuple:
    zeros, least, going = state
    x = wrong(zeros)
    size = jnp.abs(x)
    threshold = jnp.where(size > 0, size, 1.0) ** (p - 1) / (beta * kappa**i)
    shrunk = jnp.sign(x) * jnp.maximum(size - threshold, 0.0)
    moved = jnp.where(inside, codes_for(zeros) - (parts - shrunk) / scales, 0.0)
    zeros = jnp.where(going, moved.sum(axis=-2, keepdims=True) / count, zeros)
    error = size.sum(axis=(-3, -2, -1), keepdims=True)
    return zeros, jnp.minimum(error, least), going & (error < least)

  least = jnp.full((*batch, 1, 1, 1), jnp.inf)
  start = -bottom / scales, least, least > 0
  zeros, _, _ = jax.lax.fori_loop(0, iterations, one, start)
  zeros = zeros.astype(store).astype(jnp.float32)
  codes = codes_for(zeros).astype(jnp.uint8).reshape(*batch, -1, cols)
  grid = grids.Grid(stored[..., 0, :], zeros[..., 0, :].astype(store))
  return jax.lax.slice_in_dim(codes, 0, rows, axis=len(batch)), grid


@step.method("compress.quantize.hqq")
def hqq(
  *,
  bits: int = 4,
  group_size: int = 64,
  p: float = 0.7,
  beta: float = 10.0,
  kappa: float = 1.01,
  iterations: int = 20,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels with zero points fitted by half-quadratic splitting, no data needed.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    p: exponent of the errors whose sum is minimised, up to 1.
    beta: penalty for splitting.
    kappa: growth of beta an iteration.
    iterations: how many.
    scale_dtype: float32, bfloat16 or float16, of zero points too; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> hqq(bits=3)
    (compress.quantize.hqq(bits=3),)

  Reference:
    Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023,
    https://mobiusml.github.io/hqq_blog.
  """
  hyper = {
    "bits": bits, "group_size": group_size, "p": p, "beta": beta, "kappa": kappa,
    "iterations": iterations, "scale_dtype": scale_dtype,
  }  # fmt: skip
  grids.check(bits=bits, group_size=group_size, symmetric=False)
  grids.check_float(scale_dtype)
  if not 0 < p <= 1:
    raise ValueError(f"p={p}: valid is above 0 up to 1, usually 0.7")
  if beta <= 0 or kappa < 1 or iterations < 0:
    raise ValueError(
      f"beta={beta}, kappa={kappa}, iterations={iterations}: beta is positive, kappa is 1 or more, "
      "iterations are not negative"
    )
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, raw=True)


@leaves.keeping_turns
def _leaf(w: Any, *, bits: int, group_size: int, **hyper: Any) -> Any:
  done = grids.already(w, bits=bits, group_size=group_size, symmetric=False)
  if done and jnp.issubdtype(w.zeros.dtype, jnp.floating):
    return w
  w = leaves.dense(w)
  form: dict[str, Any] = {"bits": bits, "group_size": grids.clamp_group(group_size, w.shape[-2])}
  codes, grid = quantize(w, **form, **hyper)
  return grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
