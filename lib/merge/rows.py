# SPDX-License-Identifier: Apache-2.0
"""What a row is: the weights of one output neuron, along one axis of an array.

A kernel of ours is (in, out), so its rows lie along axis -2; every other array, and every tensor
under its Hugging Face name, has them along the last. An array of one axis is one row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

AXIS = ((".*kernel", -2), (".*", -1))  # what a lift gives an array function as `axis`


def over(fn: Callable[..., jax.Array], axis: int, *arrays: jax.Array) -> jax.Array:
  """Apply a function of rows to every row of arrays.

  Args:
    fn: (row of each array) -> row, all of one axis.
    axis: along which a row lies; arrays with fewer axes are one row.
    *arrays: of equal shape.

  Returns:
    The changed rows in place.

  Example:
    >>> over(lambda r: r / r.sum(), -2, jnp.ones((2, 3))).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
  """
  ndim = arrays[0].ndim
  if ndim == 0:
    return fn(*(a[None] for a in arrays))[0]
  at = last(axis, ndim)
  moved = [jnp.moveaxis(a, at, -1) for a in arrays]
  for _ in range(ndim - 1):
    fn = jax.vmap(fn)
  return jnp.moveaxis(fn(*moved), -1, at)


def last(axis: int, ndim: int) -> int:
  """Return the axis of a row in an array that may have fewer axes than a matrix.

  Args:
    axis: negative.
    ndim: number of axes, at least one.

  Returns:
    `axis`, or -1 where the array has no such axis.

  Example:
    >>> last(-2, 3), last(-2, 1)
    (-2, -1)
  """
  return axis if -axis <= ndim else -1
