# SPDX-License-Identifier: Apache-2.0
"""SVD of whitened weights: the factors whose outputs on the calibration inputs change least.

With the second moment H = sum x xᵀ = L Lᵀ of a kernel's inputs, the output error of a change D is
||Lᵀ D||², so the best rank-r kernel is L⁻ᵀ times the truncated SVD of Lᵀ W, and the error is the
sum of the squared singular values left out (Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1).
No other kernel of that rank has a smaller one.

H + 1e-6 mean(diag H) I is factored, and ten times that while it fails; the paper's code adds to the
diagonal only where the factorization fails. The paper then fits one factor again to the
inputs that the compressed layers before it give; here the driver `blockwise` takes H from those.
Everything in float32. A rank that is full leaves a kernel as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.low_rank import svd
from treesurgeon.core import lifting, linalg, needs, step, varied

DAMPING = 1e-6


def factorize(
  w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], *, rank: int
) -> tuple[Float[Array, "rows rank"], Float[Array, "rank cols"]]:
  """Find the product of thin factors whose outputs are nearest to those of a matrix.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    rank: inner dimension, up to the smaller of the two.

  Returns:
    (A, B) in float32. Without any input seen they are nearest to `w` itself.

  Example:
    >>> a, b = factorize(jnp.eye(2), jnp.diag(jnp.array([1.0, 9.0])), rank=1)
    >>> jnp.abs(a @ b).round(3).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
  """
  h = h.astype(jnp.float32)
  h = jnp.where(jnp.trace(h) > 0, h, jnp.eye(h.shape[0], dtype=jnp.float32))
  low, _ = linalg.damped_cholesky(h, DAMPING)
  white = jnp.matmul(low.T, w.astype(jnp.float32), precision="highest")
  a, b = svd.factorize(white, rank=rank)
  return jax.scipy.linalg.solve_triangular(low.T, a, lower=False), b


@step.method("compress.low_rank.svd_llm")
def svd_llm(
  *, rank: int | None = None, ratio: varied.Varied = 0.8, select: str | None = None
) -> step.Step:
  """Replace kernels by two thin factors, from second moments of their inputs.

  Args:
    rank: inner dimension; one that is full leaves a kernel as it is, the neutral setting.
    ratio: share of a kernel's numbers that its factors hold, where there is no rank.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> svd_llm(ratio=0.6)
    (compress.low_rank.svd_llm(ratio=0.6),)

  Reference:
    Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
    Compression, 2024, arXiv:2403.07378.
  """
  svd.check(rank=rank, ratio=ratio)
  wants = {"inputs": needs.Statistic("second_moment")}
  hyper = {"rank": rank, "ratio": ratio}
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, wants=wants, scope="block")


def _leaf(w: Any, inputs: Any, *, rank: int | None, ratio: float) -> Any:
  keep = svd.rank_of(*w.shape, rank=rank, ratio=ratio)
  return w if keep >= min(w.shape) else svd.held(w, *factorize(w, inputs.moment, rank=keep))
