# SPDX-License-Identifier: Apache-2.0
"""LoRC, the low-rank compensation of ZeroQuant-V2: an 8-bit low-rank term for the rounding error.

The error E = W - Q of a quantized kernel is replaced by its truncated SVD of rank 8, factors
U S^1/2 and S^1/2 Vᵀ stored as 8-bit integers (Yao et al., arXiv:2303.08302, section 5). No data is
needed, so it streams. A scale belongs to each of the rank's components, one a column of the first
factor and one a row of the second; the paper does not say. What rounding loses is at most about
n / 65000 of what a component of n numbers gains, so the term always lowers the error. The original
model is a donor (`beside`). Neutral at rank 0.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from treesurgeon.compress.low_rank import beside, svd
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, lifting, step

BITS = 8


def compensate(lost: Float[Array, "*batch rows cols"], *, rank: int, store: Any) -> leaves.LowRank:
  """Approximate an error by a product of thin 8-bit factors.

  Args:
    lost: the error.
    rank: inner dimension, up to the smaller of the two.
    store: dtype of the dense value.

  Returns:
    The term.

  Example:
    >>> term = compensate(jax.numpy.ones((4, 4)), rank=1, store="float32")
    >>> term.a.bits, bool(jax.numpy.allclose(term.dense(), 1.0, atol=0.02))
    (8, True)
  """
  a, b = svd.factorize(lost, rank=rank)
  left = _rounded(a, a.shape[-2], 1, store)
  right = _rounded(b, 1, b.shape[-1], store)
  return leaves.LowRank(left, right)


@step.method("compress.low_rank.lorc")
def lorc(*, rank: int = 8, original: str | None = None, select: str | None = None) -> step.Step:
  """Add 8-bit low-rank terms to quantized kernels, no data needed.

  Args:
    rank: inner dimension; 0 adds nothing, the neutral setting.
    original: the model before quantization, by name; None is the donor handed to the driver.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for a negative rank, or, when applied, more than one original.

  Example:
    >>> lorc(original="big")
    (compress.low_rank.lorc(original='big'),)

  Reference:
    Yao et al., ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study
    to Low Rank Compensation, 2023, arXiv:2303.08302.
  """
  if rank < 0:
    raise ValueError(f"rank={rank} must not be negative")
  return lifting.over_leaves(
    _leaf, hyper={"rank": rank}, check=beside.one_donor, select=select,
    wants={"original": beside.want(original)}, raw=True,
  )  # fmt: skip


def _rounded(x: jax.Array, group_size: int, group_cols: int, store: Any) -> leaves.QuantizedTensor:
  tile: dict[str, Any] = {"group_size": group_size, "group_cols": group_cols}
  grid = grids.fit(x, bits=BITS, symmetric=True, scale_dtype="float32", **tile)
  wide = grids.spread(grid, rows=x.shape[-2], cols=x.shape[-1], **tile)
  codes = grids.round_to(x, wide, bits=BITS)
  return grids.tensor(codes, grid, bits=BITS, store=store, **tile)


def _leaf(w: Any, original: Any, *, rank: int) -> Any:
  if not rank:
    return w
  lost = beside.error(w, original)
  return beside.put(w, compensate(lost, rank=min(rank, *lost.shape[-2:]), store=w.dtype))
