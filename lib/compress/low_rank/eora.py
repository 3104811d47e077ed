# SPDX-License-Identifier: Apache-2.0
"""EoRA: make up for a compression error by factors that are best on the calibration inputs.

The error E = W - Q of a compressed kernel is taken to the eigenspace of the inputs' second moment
H = V L Vᵀ, that is L^1/2 Vᵀ E, cut to a rank there, and taken back (Liu et al., arXiv:2410.21271).
Any square root of H gives the same product of factors, for the output error is what is minimised:
here the Cholesky factor that `svd_llm` whitens by, with its tiny damping where the published code
lifts negative eigenvalues. It works behind any compression, pruning too; the factors stay in the
kernel's dtype. The original model is a donor (`beside`). Neutral at rank 0.
"""

from typing import Any

from treesurgeon.compress.low_rank import beside, svd, svd_llm
from treesurgeon.core import lifting, needs, step


@step.method("compress.low_rank.eora")
def eora(*, rank: int = 64, original: str | None = None, select: str | None = None) -> step.Step:
  """Add low-rank terms to compressed kernels, from second moments of their inputs.

  Args:
    rank: inner dimension; 0 adds nothing, the neutral setting.
    original: the model before compression, by name; None is the donor handed to the driver.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for a negative rank, or, when applied, more than one original.

  Example:
    >>> eora(rank=16, original="big")
    (compress.low_rank.eora(rank=16, original='big'),)

  Reference:
    Liu et al., EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
    Approximation, 2024, arXiv:2410.21271.
  """
  if rank < 0:
    raise ValueError(f"rank={rank} must not be negative")
  wants = {"original": beside.want(original), "inputs": needs.Statistic("second_moment")}
  return lifting.over_leaves(
    _leaf, hyper={"rank": rank}, check=beside.one_donor, select=select, wants=wants, raw=True,
    scope="block",
  )  # fmt: skip


def _leaf(w: Any, original: Any, inputs: Any, *, rank: int) -> Any:
  if not rank:
    return w
  lost = beside.error(w, original)
  a, b = svd_llm.factorize(lost, inputs.moment, rank=min(rank, *lost.shape))
  return beside.put(w, svd.held(w, a, b))
