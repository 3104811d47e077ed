# SPDX-License-Identifier: Apache-2.0
"""Angles between weights: what the merges on spheres share.

An angle is taken over a whole array, or for each output neuron apart. The weights that feed one
neuron lie along the rows of a kernel here, which is (in, out), and along the last axis of an
embedding or of a matrix in a Hugging Face file, which is (out, in): `WITHIN` is that axis by
address, `ACROSS` the other one. Sums are float32; none of them reshapes, so sharded arrays stay so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

WITHIN = ((".*kernel", -2), (".*", -1))
ACROSS = ((".*kernel", -1), (".*", 0))


def axes(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
  """Resolve the axis along which vectors lie.

  Args:
    shape: of the array.
    axis: one axis, or None for the whole array; an array of rank 0 or 1 is always one vector.

  Returns:
    The axes to sum over.

  Example:
    >>> axes((2, 3), -2), axes((2, 3), None), axes((3,), -2)
    ((-2,), (0, 1), (0,))
  """
  return tuple(range(len(shape))) if axis is None or len(shape) < 2 else (axis,)


def dot(
  a: Float[Array, "*shape"], b: Float[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*one"]:
  """Multiply vectors, keeping the rank.

  Args:
    a: float32 array.
    b: float32 array.
    axis: where the vectors lie, as in `axes`.

  Returns:
    The inner products.

  Example:
    >>> dot(jnp.ones((2, 3)), jnp.ones((2, 3)), axis=-1).tolist()
    [[3.0], [3.0]]
  """
  return jnp.sum(a * b, axis=axes(a.shape, axis), keepdims=True)


def arc(
  cos: Float[Array, "*one"], t: ArrayLike
) -> tuple[Float[Array, "*one"], Float[Array, "*one"]]:
  """Weigh the two ends of an arc: sin((1-t)θ) / sin θ and sin(tθ) / sin θ.

  Args:
    cos: cosine of the angle θ, strictly between -1 and 1.
    t: position, 0 at the first end; there the weights are exactly 1 and 0.

  Returns:
    The weights of the first and of the second end.

  Example:
    >>> [round(float(x), 4) for x in arc(jnp.zeros(()), 0.5)]
    [0.7071, 0.7071]
  """
  theta = jnp.arccos(cos)
  sine = jnp.sin(theta)
  return jnp.sin((1 - t) * theta) / sine, jnp.sin(t * theta) / sine


def exactly(count: int, *, of: str = "donor") -> Callable[..., None]:
  """Make the check of a merge that takes a fixed number of donors; for `lifting.over_leaves`.

  Args:
    count: how many.
    of: what a donor is to the method, for the message.

  Returns:
    A function of the number of donors, which raises ValueError for any other.

  Example:
    >>> exactly(1)(1, t=0.5)
  """

  def check(donors: int, **rest: Any) -> None:
    del rest
    if donors != count:
      raise ValueError(f"it takes exactly {count} {of}{'' if count == 1 else 's'}; got {donors}")

  return check
