# SPDX-License-Identifier: Apache-2.0
"""DeepShape: move a kernel's weights to levels that an entropy coder needs few bits for.

A generalized Gaussian is fitted to the weights; they are then given, in their order, the levels
that a narrower one of smaller shape has (histogram specification). Few levels, with more weights
each, cost fewer bits when coded. The kernel stays an array, of multiples of 2^-13.

After the paper's published code. It takes a whole model's weights for one population, which mixes
embeddings, norms and kernels, and leaves alone levels that at most 1000 weights have; here a kernel
is the population and all of it moves, to the exact quantiles. Its factors, 0.8 for the shape and
0.6 for the scale, shrink normal weights by a third, and the paper trains on afterwards; a scale
near 1 keeps a model that is not trained on. Normal weights gain bits by shrinking alone, peaked
ones a few hundredths by the shape; by weight error alone a coarser step gains far more.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import lifting, step
from treesurgeon.stats import generalized_gaussian


def specify(
  w: Float[Array, "..."], *, shape: float = 0.8, scale: float = 0.6, fraction_bits: int = 13
) -> Float[Array, "..."]:
  """Give weights the histogram of another generalized Gaussian, in float32.

  Args:
    w: weights, one population.
    shape: factor of the fitted shape.
    scale: factor of the fitted scale.
    fraction_bits: levels are multiples of 2^-fraction_bits, in the dtype of `w`.

  Returns:
    The weights, equally ordered; `w` itself where both factors are 1.

  Example:
    >>> import jax
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> 0.6 < float(specify(w).std() / w.std()) < 0.75
    True
  """
  if shape == 1 and scale == 1:
    return w
  flat = w.astype(jnp.float32).ravel()
  found = generalized_gaussian.fit(flat)
  place = jnp.arange(flat.size) + 0.5
  tail = 2 * jnp.minimum(place, flat.size - place) / flat.size
  size = generalized_gaussian.quantile(tail, found.shape * shape) * (found.scale * scale)
  target = found.mean + jnp.where(place * 2 < flat.size, -size, size)
  step_size = 2.0**-fraction_bits
  levels = jnp.round(target / step_size) * step_size
  moved = jnp.zeros_like(flat).at[jnp.argsort(flat)].set(levels, unique_indices=True)
  return moved.reshape(w.shape).astype(w.dtype)


@step.method("compress.quantize.deepshape")
def deepshape(
  *, shape: float = 0.8, scale: float = 0.6, fraction_bits: int = 13, select: str | None = None
) -> step.Step:
  """Give kernels the histogram of a narrower generalized Gaussian, no data needed.

  Args:
    shape: factor of the fitted shape.
    scale: factor of the fitted scale. The neutral setting is 1 for both.
    fraction_bits: levels are multiples of 2^-fraction_bits.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for factors that are not positive, or bits outside 1 to 24.

  Example:
    >>> deepshape(scale=0.9)
    (compress.quantize.deepshape(scale=0.9),)

  Reference:
    Wu et al., It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for
    Optimized LLMs, 2025, arXiv:2506.00486.
  """
  if not (shape > 0 and scale > 0):
    raise ValueError(f"shape={shape}, scale={scale}: both factors must be positive")
  if fraction_bits not in range(1, 25):
    raise ValueError(f"fraction_bits={fraction_bits} is a whole number from 1 to 24")
  hyper = {"shape": shape, "scale": scale, "fraction_bits": fraction_bits}
  return lifting.over_leaves(specify, hyper=hyper, select=select)
