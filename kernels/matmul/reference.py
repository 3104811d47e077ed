# SPDX-License-Identifier: Apache-2.0
"""The reference: make the leaf dense, multiply with float32 accumulation.

Every other implementation is tested against this one, and this one against float64 numpy. It
materialises the matrix, so it serves correctness and backward passes, not speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from treesurgeon.core import leaves


def matmul(x: Num[Array, "*batch rows"], leaf: Any) -> Float[Array, "*batch cols"]:
  """Multiply by the dense value of any leaf.

  Args:
    x: activations; integers and 8-bit floats count as float32.
    leaf: array or compressed leaf, logical shape (rows, cols).

  Returns:
    The product in float32; the operands are rounded to the dtype of `x` first.

  Example:
    >>> matmul(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))).tolist()
    [[2.0, 2.0, 2.0]]
  """
  wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
  x = x if wide else x.astype(jnp.float32)
  return dot(x, leaves.dense(leaf).astype(x.dtype))


def dot(
  x: Float[Array, "*batch rows"], w: Float[Array, "rows cols"]
) -> Float[Array, "*batch cols"]:
  """Multiply two arrays of one dtype, accumulating and returning float32.

  Args:
    x: left operand.
    w: right operand.

  Returns:
    The product in float32.

  Example:
    >>> dot(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16)).dtype.name
    'float32'
  """
  contract = (((x.ndim - 1,), (0,)), ((), ()))
  return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)
