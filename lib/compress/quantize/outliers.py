# SPDX-License-Identifier: Apache-2.0
"""Single weights of a matrix that are kept beside its quantized rest: which, and how.

Their number is a fraction of the matrix, so that shapes do not depend on the weights.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from treesurgeon.compress.prune import masks
from treesurgeon.core import leaves


def count_of(fraction: float, rows: int, cols: int) -> int:
  """Count how many weights a fraction of a matrix is.

  Args:
    fraction: 0 to 1.
    rows: input dimension.
    cols: output dimension.

  Returns:
    The nearest whole number.

  Example:
    >>> count_of(0.01, 100, 20)
    20
  """
  return round(fraction * rows * cols)


def pick(score: Float[Array, "rows cols"], fraction: float) -> Bool[Array, "rows cols"]:
  """Find the weights of the highest scores.

  Args:
    score: of each weight; what is not positive counts alike.
    fraction: of the weights, see `count_of`.

  Returns:
    True where a weight is kept.

  Example:
    >>> pick(jnp.array([[3.0, 1.0], [2.0, 5.0]]), 0.5).tolist()
    [[True, False], [False, True]]
  """
  (mask,) = masks.largest((jnp.maximum(score, 0.0),), count_of(fraction, *score.shape))
  return mask


def gather(
  w: Float[Array, "rows cols"], mask: Bool[Array, "rows cols"], fraction: float
) -> leaves.Outliers:
  """Store single weights.

  Args:
    w: weights.
    mask: which of them, from `pick`.
    fraction: as for `pick`.

  Returns:
    The leaf.

  Example:
    >>> gather(jnp.ones((2, 2)), jnp.array([[False, True], [False, False]]), 0.25).dense().tolist()
    [[0.0, 1.0], [0.0, 0.0]]
  """
  rows, cols = w.shape
  at = jnp.nonzero(mask.ravel(), size=count_of(fraction, rows, cols))[0].astype(jnp.int32)
  return leaves.Outliers(jnp.take(w.ravel(), at)[None], at[None], rows, cols)


def check(fraction: float) -> None:
  """Refuse what is no fraction.

  Args:
    fraction: of the weights.

  Raises:
    ValueError: naming it.

  Example:
    >>> check(1.5)
    Traceback (most recent call last):
    ValueError: outliers=1.5: valid is a fraction of the weights, 0 to 1, usually 0.01
  """
  if not 0 <= fraction <= 1:
    raise ValueError(
      f"outliers={fraction}: valid is a fraction of the weights, 0 to 1, usually 0.01"
    )


def is_beside(leaf: object, base: type) -> bool:
  """Tell whether a leaf is a base of some type with single weights beside it.

  Args:
    leaf: array or compressed leaf.
    base: type of leaf.

  Returns:
    True for a `Sum` of such a base and outliers.

  Example:
    >>> is_beside(jnp.ones((2, 2)), leaves.QuantizedTensor)
    False
  """
  return isinstance(leaf, leaves.Sum) and [type(p) for p in leaf.parts] == [base, leaves.Outliers]
