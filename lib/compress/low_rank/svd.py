# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD: the nearest matrix of a rank, held as two thin factors.

The baseline of all factorization, no data needed: of all matrices of rank r none is nearer to W in
the Frobenius norm (Eckart and Young, 1936). Factors share the singular values evenly, U S^1/2 and
S^1/2 Vᵀ, as in Guo et al., PELA (arXiv:2310.10700). A rank that is full leaves a kernel as it is:
that is the neutral setting. The SVD runs in float32, over all leading axes at once.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves, lifting, step, varied


def factorize(
  w: Float[Array, "*batch rows cols"], *, rank: int
) -> tuple[Float[Array, "*batch rows rank"], Float[Array, "*batch rank cols"]]:
  """Find the nearest product of thin factors.

  Args:
    w: weights, input dimension first.
    rank: inner dimension, up to the smaller of the two.

  Returns:
    (A, B) in float32; A B is nearest to `w`.

  Example:
    >>> a, b = factorize(jnp.array([[2.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> jnp.abs(a @ b).round(5).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
  """
  u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
  root = jnp.sqrt(s[..., :rank])
  return u[..., :, :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def rank_of(rows: int, cols: int, *, rank: int | None, ratio: float) -> int:
  """Find the rank that a kernel is cut to.

  Args:
    rows, cols: of the kernel.
    rank: the rank itself, or None.
    ratio: share of the kernel's numbers that the factors may hold, where there is no rank.

  Returns:
    The rank, at least 1.

  Example:
    >>> rank_of(64, 64, rank=None, ratio=0.5), rank_of(64, 64, rank=8, ratio=0.5)
    (16, 8)
  """
  return max(1, int(ratio * rows * cols / (rows + cols))) if rank is None else rank


def held(w: Any, a: Any, b: Any) -> leaves.LowRank:
  """Make a leaf of factors.

  Args:
    w: the kernel they stand for, which says the dtype.
    a, b: factors.

  Returns:
    The leaf.

  Example:
    >>> held(jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2))).shape
    (3, 2)
  """
  return leaves.LowRank(a.astype(w.dtype), b.astype(w.dtype))


def check(*, rank: int | None, ratio: varied.Varied) -> None:
  """Refuse a rank or a share that no factors have.

  Args:
    rank: inner dimension, or None.
    ratio: share of a kernel's numbers.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> check(rank=None, ratio=0.5)
  """
  if rank is not None and rank < 1:
    raise ValueError(f"rank={rank} must be at least 1")
  for share in varied.values(ratio):
    if not 0 < share <= 1:
      raise ValueError(f"ratio={share}: factors hold more than 0 and up to 1 of a kernel's numbers")


@step.method("compress.low_rank.svd")
def svd(
  *, rank: int | None = None, ratio: varied.Varied = 0.8, select: str | None = None
) -> step.Step:
  """Replace kernels by two thin factors, of the nearest product.

  Args:
    rank: inner dimension; one that is full leaves a kernel as it is, the neutral setting.
    ratio: share of a kernel's numbers that its factors hold, where there is no rank.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> svd(ratio=0.5)
    (compress.low_rank.svd(ratio=0.5),)

  Reference:
    Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
  """
  check(rank=rank, ratio=ratio)
  return lifting.over_leaves(_leaf, hyper={"rank": rank, "ratio": ratio}, select=select)


def _leaf(w: Any, *, rank: int | None, ratio: float) -> Any:
  keep = rank_of(*w.shape[-2:], rank=rank, ratio=ratio)
  return w if keep >= min(w.shape[-2:]) else held(w, *factorize(w, rank=keep))
