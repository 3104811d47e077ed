# SPDX-License-Identifier: Apache-2.0
"""`matmul(x, leaf)`: one call for every kind of leaf."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves
from treesurgeon.kernels.matmul import reference


def matmul(
  x: Float[Array, "*batch rows"], leaf: Any, *, implementation: str | None = None
) -> Float[Array, "*batch cols"]:
  """Multiply activations by a kernel matrix, dense or compressed.

  Args:
    x: activations, floating point.
    leaf: array or compressed leaf of logical shape (rows, cols).
    implementation: "reference", or None to choose.

  Returns:
    `x @ leaf` in the dtype of `x`.

  Example:
    >>> matmul(jnp.ones((1, 2)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
  """
  del implementation
  if not leaves.is_leaf(leaf):
    return jnp.matmul(x, jnp.asarray(leaf).astype(x.dtype))
  return reference.matmul(x, leaf)
