# SPDX-License-Identifier: Apache-2.0
"""Wanda: prune the weights of smallest |w| * ||x||, compared within each output.

The score of weight (i, j) of a kernel (in, out) is |w_ij| times the 2-norm of input i over the
calibration tokens; weights are not updated. The paper's rows are our columns. As in its code
`int(in * sparsity)` weights an output go, and N:M patterns run along the inputs. Where no input was
ever active, as for an expert that no token reached, magnitudes alone decide.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.prune import masks
from treesurgeon.core import lifting, needs, step


def influence(
  w: Float[Array, "rows cols"], squares: Float[Array, " rows"]
) -> Float[Array, "rows cols"]:
  """Compute how much each weight matters to its output.

  Args:
    w: weights, input dimension first.
    squares: sum of squares of each input, up to a factor; all zero counts as all alike.

  Returns:
    |w_ij| ||x_i||, float32.

  Example:
    >>> influence(jnp.array([[3.0], [-1.0]]), jnp.array([0.25, 1.0])).tolist()
    [[1.5], [1.0]]
  """
  norms = jnp.sqrt(squares.astype(jnp.float32))
  norms = jnp.where((norms > 0).any(), norms, 1.0)
  return jnp.abs(w.astype(jnp.float32)) * norms[:, None]


def prune(
  w: Float[Array, "rows cols"],
  squares: Float[Array, " rows"],
  *,
  sparsity: float,
  pattern: tuple[int, int] | None = None,
  packed: bool = False,
) -> Any:
  """Set the weights with the least influence on each output to zero.

  Args:
    w: weights, input dimension first.
    squares: sum of squares of each input, up to a factor.
    sparsity: fraction of each output's weights to prune, where there is no pattern.
    pattern: (n, m) keeps n of every m consecutive inputs of each output.
    packed: return a `SparseTensor`; needs a pattern.

  Returns:
    The pruned weights, in the dtype of `w`.

  Example:
    >>> prune(jnp.array([[3.0], [1.0]]), jnp.array([0.01, 1.0]), sparsity=0.5).tolist()
    [[0.0], [1.0]]
  """
  score = influence(w, squares)
  return masks.apply(w, score, sparsity=sparsity, pattern=pattern, packed=packed, per="column")


@step.method("compress.prune.wanda")
def wanda(
  *,
  sparsity: float = 0.5,
  pattern: str | None = None,
  packed: bool = False,
  select: str | None = None,
) -> step.Step:
  """Prune kernels by weight magnitude times input norm.

  Args:
    sparsity: fraction of each output's weights to prune; 0 is the neutral setting. Unused with
      a pattern.
    pattern: "n:m" keeps n of every m consecutive inputs of each output.
    packed: hold the result as a `SparseTensor`; needs a pattern.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> wanda(sparsity=0.6)
    (compress.prune.wanda(sparsity=0.6),)

  Reference:
    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023,
    arXiv:2306.11695.
  """
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=packed)
  return lifting.over_leaves(
    _leaf,
    hyper={"sparsity": sparsity, "pattern": n_m, "packed": packed},
    select=select,
    wants={"inputs": needs.Statistic("sum_squares")},
    scope="block",
  )


def _leaf(w: Any, inputs: Any, **hyper: Any) -> Any:
  return prune(w, inputs.value, **hyper)
