# SPDX-License-Identifier: Apache-2.0
"""Draw a network's kernels from a generalized Gaussian, the distribution that trained ones follow.

Wu et al., "It takes a good model to train a good model", 2025, arXiv 2506.00486. As He's
initialization the variance is xi over the number of inputs; the published code divides by the rows
of torch's weights, which are the outputs. Embeddings, norms and biases stay as they are.
"""

import math
import re

import jax
import jax.numpy as jnp

from treesurgeon.core import model, step
from treesurgeon.stats import generalized_gaussian


def redraw(m: model.Model, key: jax.Array, *, shape: float = 2.0, xi: float = 2.0) -> model.Model:
  """Draw every kernel inside the layers anew.

  Args:
    m: model, whose kernels are arrays.
    key: PRNG key; each kernel's depends on its address.
    shape: exponent of the density: 2 is normal, 1 Laplace.
    xi: 1 without activations, 2 before ReLU, 2 / (1 + k^2) before a leaky one of slope k.

  Returns:
    The model.

  Raises:
    ValueError: for values that are not positive.

  Example:
    >>> m = model.Model(None, {"layers": {"0:1": {"up": {"kernel": jnp.zeros((1, 4, 8))}}}})
    >>> redraw(m, jax.random.key(0), shape=1.0).leaf("layers/0/up/kernel").shape
    (4, 8)

  Reference:
    Wu et al., It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for
    Optimized LLMs, 2025, arXiv:2506.00486.
  """
  if not (shape > 0 and xi > 0):
    raise ValueError(f"shape={shape}, xi={xi}: both must be positive")
  changes = {}
  for address in m.addresses():
    if re.fullmatch(step.BLOCK_KERNELS, address):
      old = m.leaf(address)
      std = math.sqrt(xi / old.shape[-2])
      one = step.leaf_key(key, address)
      dims = tuple(old.shape)
      changes[address] = generalized_gaussian.draw(
        one, dims, shape=shape, std=std, dtype=jnp.dtype(old.dtype)
      )
  return m.update(changes)
