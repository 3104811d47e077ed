# SPDX-License-Identifier: Apache-2.0
"""Grids to learn on: rounding that passes gradients, and what a method that learns it must say.

The grids are those of `grid.fit`, so that what is learned begins at rounding to nearest and is
stored like it. Rounding passes gradients straight through [1], clipping stops them. float32.

[1] Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves

Learned = Any  # tree of float32 arrays


class Form(NamedTuple):
  """The grids to round to.

  Attributes:
    bits: width of a code.
    group_size: rows that share a scale, resolved.
    symmetric: whether there are no zero points.
    store: dtype of the scales.
  """

  bits: int
  group_size: int
  symmetric: bool
  store: str


class Rounding(NamedTuple):
  """A way to round that has something to learn.

  Attributes:
    start: (w, form) -> what is learned, where it makes the codes of rounding to nearest.
    codes: (w, learned, form, hard) -> (codes as floats (..., rows, cols), scales, zeros (...,
      groups, cols)), differentiable; `hard` is how it rounds when it is done.
    project: learned -> learned, after a step.
    penalty: (learned, share of the steps done) -> scalar added to the loss.
  """

  start: Callable[[jax.Array, Form], Learned]
  codes: Callable[[jax.Array, Learned, Form, bool], tuple[jax.Array, jax.Array, jax.Array]]
  project: Callable[[Learned], Learned] = lambda learned: learned
  penalty: Callable[[Learned, jax.Array], Any] = lambda learned, done: 0.0


def through(x: jax.Array) -> jax.Array:
  """Round half to even; the gradient passes as if nothing were rounded.

  Args:
    x: numbers.

  Returns:
    Whole numbers.

  Example:
    >>> [x.item() for x in jax.value_and_grad(through)(1.6)]
    [2.0, 1.0]
  """
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


def rounded(steps: jax.Array, zeros: jax.Array, form: Form) -> jax.Array:
  """Round to codes as `grid.round_to` does, gradients straight through inside the range.

  Args:
    steps: weights in units of their scale.
    zeros: zero points that broadcast against them.
    form: the grids.

  Returns:
    Codes as floats; the gradient of what is clipped is zero.

  Example:
    >>> zero, form = jnp.array(2.0), Form(2, 1, True, "float32")
    >>> [rounded(jnp.array(x), zero, form).item() for x in (1.2, 1.7)]
    [3.0, 3.0]
    >>> [jax.grad(rounded)(x, zero, form).item() for x in (1.2, 1.7)]
    [1.0, 0.0]
  """
  return _clip(through(steps) + zeros if form.symmetric else through(steps + zeros), form)


def stored(scales: jax.Array, form: Form) -> jax.Array:
  """Round scales to how they are stored, gradients straight through; zero becomes 1.

  Args:
    scales: any shape, float32.
    form: names the dtype.

  Returns:
    Scales in float32.

  Example:
    >>> stored(jnp.array([0.0, 0.1]), Form(4, 1, True, "bfloat16")).tolist()
    [1.0, 0.10009765625]
  """
  kept = scales.astype(form.store).astype(jnp.float32)
  kept = jnp.where(kept == 0, 1.0, kept)
  return scales + jax.lax.stop_gradient(kept - scales)


def ranges(w: Float[Array, "*batch rows cols"], form: Form) -> tuple[jax.Array, jax.Array]:
  """Find the range of every group, forced to contain 0.

  Args:
    w: weights.
    form: the grids.

  Returns:
    (lowest, highest), (..., groups, cols) float32.

  Example:
    >>> [x.tolist() for x in ranges(jnp.array([[1.0], [-2.0]]), Form(4, 2, True, "float32"))]
    [[[-2.0]], [[1.0]]]
  """
  *batch, rows, cols = w.shape
  widths = [(0, 0)] * len(batch) + [(0, -rows % form.group_size), (0, 0)]
  parts = jnp.pad(w.astype(jnp.float32), widths).reshape(*batch, -1, form.group_size, cols)
  return jnp.minimum(parts.min(axis=-2), 0.0), jnp.maximum(parts.max(axis=-2), 0.0)


def affine(low: jax.Array, high: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
  """Make scales and zero points of ranges, as `grid.fit` does, differentiably.

  Args:
    low: lowest weight of every group, at most 0.
    high: highest, at least 0.
    form: the grids.

  Returns:
    (scales, zeros), float32.

  Example:
    >>> low, high = jnp.array([[-3.0]]), jnp.array([[12.0]])
    >>> [x.item() for x in affine(low, high, Form(4, 1, False, "float32"))]
    [1.0, 3.0]
  """
  top = 2**form.bits - 1
  if form.symmetric:
    scales = stored(jnp.maximum(-low, high) / (top / 2), form)
    return scales, jnp.full_like(scales, 2.0 ** (form.bits - 1))
  scales = stored((high - low) / top, form)
  return scales, _clip(through(-low / scales), form)


def spread(x: jax.Array, rows: int, form: Form) -> jax.Array:
  """Repeat one entry a group to one a row.

  Args:
    x: (..., groups, cols).
    rows: input rows.
    form: the grids.

  Returns:
    (..., rows, cols).

  Example:
    >>> spread(jnp.ones((2, 3)), 5, Form(4, 4, True, "float32")).shape
    (5, 3)
  """
  return jnp.take(x, jnp.arange(rows) // form.group_size, axis=-2)


def form_of(w: Any, bits: int, group_size: int, symmetric: bool, scale_dtype: str | None) -> Form:
  """Resolve the grids for a leaf.

  Args:
    w: (..., rows, cols).
    bits, group_size, symmetric: see `grid.fit`.
    scale_dtype: dtype of the scales; None is that of `w`.

  Returns:
    The form.

  Example:
    >>> form_of(jnp.ones((8, 2)), 4, -1, True, None)
    Form(bits=4, group_size=8, symmetric=True, store='float32')
  """
  store = scale_dtype or jnp.dtype(w.dtype).name
  return Form(bits, grids.clamp_group(group_size, w.shape[-2]), symmetric, store)


def weights(
  rounding: Rounding, w: jax.Array, learned: Learned, form: Form, *, hard: bool
) -> Float[Array, "*batch rows cols"]:
  """Compute the weights that the codes stand for.

  Args:
    rounding: how.
    w: (..., rows, cols).
    learned: as its `start` made it.
    form: the grids.
    hard: as when done.

  Returns:
    float32.
  """
  codes, scales, zeros = rounding.codes(w.astype(jnp.float32), learned, form, hard)
  rows = w.shape[-2]
  return (codes - spread(zeros, rows, form)) * spread(scales, rows, form)


def tensor(rounding: Rounding, w: jax.Array, learned: Learned, form: Form) -> leaves.Leaf:
  """Make the quantized leaf.

  Args:
    rounding: how.
    w: (..., rows, cols).
    learned: what was learned.
    form: the grids.

  Returns:
    A `QuantizedTensor`.
  """
  codes, scales, zeros = rounding.codes(w.astype(jnp.float32), learned, form, True)
  grid = grids.Grid(scales.astype(form.store), None if form.symmetric else zeros.astype(jnp.uint8))
  return grids.tensor(
    codes.astype(jnp.uint8), grid, bits=form.bits, group_size=form.group_size, store=w.dtype
  )


def _clip(codes: jax.Array, form: Form) -> jax.Array:
  """Clip to the range; the gradient passes at its ends, where `jnp.clip` would halve it."""
  clipped = jnp.clip(codes, 0, 2**form.bits - 1)
  return jnp.where(clipped == codes, codes, jax.lax.stop_gradient(clipped))
