# SPDX-License-Identifier: Apache-2.0
"""ASVD: SVD of weights scaled by how large their inputs are.

With s_j = mean |x_j|^alpha, the truncated SVD of diag(s) W is taken and the scale undone in the
first factor (Yuan et al., arXiv:2312.05821). The diagonal stands for the whole second moment, of
which `svd_llm` takes all. As in the paper's code alpha is 0.5 and 1e-6 is added, here relative to
the mean scale, so that inputs never seen keep a weight. Not here: the search for each kernel's rank
by the perplexity it costs (STRS); give `ratio` rules for that. Float32.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.low_rank import svd
from treesurgeon.core import lifting, needs, step, varied


def factorize(
  w: Float[Array, "rows cols"], sizes: Float[Array, " rows"], *, rank: int, alpha: float
) -> tuple[Float[Array, "rows rank"], Float[Array, "rank cols"]]:
  """Find factors that are truer to weights of large inputs.

  Args:
    w: weights, input dimension first.
    sizes: sum or mean of the magnitudes of each input.
    rank: inner dimension, up to the smaller of the two.
    alpha: how much sizes matter; 0 is the plain SVD.

  Returns:
    (A, B) in float32.

  Example:
    >>> a, b = factorize(jnp.eye(2), jnp.array([1.0, 9.0]), rank=1, alpha=0.5)
    >>> jnp.abs(a @ b).round(3).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
  """
  scale = sizes.astype(jnp.float32) ** alpha
  mean = scale.mean()
  scale = jnp.where(mean > 0, scale / jnp.where(mean > 0, mean, 1.0), 1.0) + 1e-6
  a, b = svd.factorize(scale[:, None] * w.astype(jnp.float32), rank=rank)
  return a / scale[:, None], b


@step.method("compress.low_rank.asvd")
def asvd(
  *,
  rank: int | None = None,
  ratio: varied.Varied = 0.8,
  alpha: float = 0.5,
  select: str | None = None,
) -> step.Step:
  """Replace kernels by two thin factors, from mean magnitudes of their inputs.

  Args:
    rank: inner dimension; one that is full leaves a kernel as it is, the neutral setting.
    ratio: share of a kernel's numbers that its factors hold, where there is no rank.
    alpha: how much the inputs' sizes matter; 0 is the plain SVD.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> asvd(ratio=0.9)
    (compress.low_rank.asvd(ratio=0.9),)

  Reference:
    Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
    Models, 2023, arXiv:2312.05821.
  """
  svd.check(rank=rank, ratio=ratio)
  if alpha < 0:
    raise ValueError(f"alpha={alpha} must not be negative")
  wants = {"inputs": needs.Statistic("sum_magnitudes")}
  hyper = {"rank": rank, "ratio": ratio, "alpha": alpha}
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, wants=wants, scope="block")


def _leaf(w: Any, inputs: Any, *, rank: int | None, ratio: float, alpha: float) -> Any:
  keep = svd.rank_of(*w.shape, rank=rank, ratio=ratio)
  if keep >= min(w.shape):
    return w
  return svd.held(w, *factorize(w, inputs.value, rank=keep, alpha=alpha))
