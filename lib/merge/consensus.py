# SPDX-License-Identifier: Apache-2.0
"""Put sparsified task vectors together: by a weighted sum, or by electing a sign for every entry.

The last half of TIES (Yadav et al., 2023, arXiv 2306.01708), which DARE, DELLA and Model
Breadcrumbs share in their `_ties` spellings, and the plain sum of their linear ones. The elected
sign is that of the weighted sum, zero counted as plus; entries of that sign are added, and
`normalize` divides by the weights of those that agree. Arithmetic is float32, rounded after every
product: compilers may contract a product and a sum into one rounding, which `times` prevents, so
that the results are those of a program that rounds each (mergekit's) to the bit.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def add(
  base: Float[Array, "*shape"],
  deltas: Sequence[Float[Array, "*shape"]],
  *,
  weights: Sequence[ArrayLike],
  lam: ArrayLike = 1.0,
  normalize: bool = False,
) -> Float[Array, "*shape"]:
  """Add the weighted sum of sparsified changes to an array.

  Args:
    base: the array θ₀, float32.
    deltas: the donors' changes, float32.
    weights: one number a donor.
    lam: λ, multiplies the sum.
    normalize: whether to divide the sum by Σ w_i, or by 1 where that is zero.

  Returns:
    The float32 result.

  Example:
    >>> add(jnp.zeros(2), [jnp.ones(2), jnp.full(2, 3.0)], weights=(1.0, 0.5)).tolist()
    [2.5, 2.5]
  """
  total = jnp.asarray(sum(times(c, d) for c, d in zip(weights, deltas, strict=True)))
  if normalize:
    divisor = jnp.asarray(sum(weights), jnp.float32)
    # An array, for compilers turn division by a scalar into a product with its reciprocal.
    total = total / jnp.where((total == 0) | (jnp.abs(divisor) < 1e-8), 1.0, divisor)
  return base + times(lam, total)


def elect(
  base: Float[Array, "*shape"],
  deltas: Sequence[Float[Array, "*shape"]],
  *,
  weights: Sequence[ArrayLike],
  lam: ArrayLike = 1.0,
  normalize: bool = True,
) -> Float[Array, "*shape"]:
  """Elect a sign for every entry and add what agrees with it to an array.

  Args:
    base: the array θ₀, float32.
    deltas: the donors' sparsified changes, float32.
    weights: one number a donor.
    lam: λ, multiplies the merged change.
    normalize: whether to divide by the summed weights of the agreeing entries.

  Returns:
    The float32 result.

  Example:
    >>> changes = [jnp.array([3.0, 0.0]), jnp.array([-1.0, 2.0])]
    >>> elect(jnp.zeros(2), changes, weights=(1.0, 1.0)).tolist()
    [3.0, 2.0]
  """
  weighted = [times(c, d) for c, d in zip(weights, deltas, strict=True)]
  elected = jnp.where(jnp.asarray(sum(weighted)) >= 0, 1.0, -1.0)
  total = jnp.zeros_like(base)
  divisor = jnp.zeros_like(base)
  for c, delta in zip(weights, weighted, strict=True):
    agrees = jnp.sign(delta) == elected
    total += jnp.where(agrees, delta, 0.0)
    divisor += jnp.where(agrees, c, 0.0)
  if normalize:
    total = total / jnp.where(divisor == 0, 1.0, divisor)
  return base + times(lam, total)


def rescale_l1(
  delta: Float[Array, "*shape"], kept: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Scale what is kept of a change to the change's sum of magnitudes, as mergekit does.

  Args:
    delta: the change, float32.
    kept: the change with entries dropped.

  Returns:
    `kept` times ‖delta‖₁ / ‖kept‖₁; as it is where either norm is below 1e-7.

  Example:
    >>> rescale_l1(jnp.ones(4), jnp.array([1.0, 0.0, 0.0, 1.0])).tolist()
    [2.0, 0.0, 0.0, 2.0]
  """
  before, after = jnp.sum(jnp.abs(delta)), jnp.sum(jnp.abs(kept))
  void = (before < 1e-7) | (after < 1e-7)
  return kept * jnp.where(void, 1.0, before / jnp.where(void, 1.0, after))


def times(c: ArrayLike, x: jax.Array) -> jax.Array:
  """Multiply and round, whatever is done with the product.

  A select stands between the product and a sum that it goes into, so that no fused multiply-add
  can take both.

  Args:
    c: finite number.
    x: array.

  Returns:
    c x.

  Example:
    >>> times(0.5, jnp.array([2.0, 0.0])).tolist()
    [1.0, 0.0]
  """
  return jnp.where(x == 0, 0.0, c * x)
