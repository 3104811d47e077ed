# SPDX-License-Identifier: Apache-2.0
"""RegMean++: RegMean whose inputs come through the blocks that are merged already.

RegMean's statistics are those of each donor's own network, whose deeper layers never see what the
merged layers before them give. Here block after block is merged: donor i's data goes through the
merged blocks, then through donor i's own block, whose kernels' inputs are measured; the block is
merged, and the data goes through the result. Nguyen et al., "RegMean++: Enhancing effectiveness and
generalization of regression mean for model merging", 2025 (arXiv 2508.03121); the official code
takes the inputs within a block from the donor's block, and so do we.

The mathematics is `regmean`'s; the blockwise driver makes the difference. Under the driver `run`,
which measures every donor by itself, it is RegMean. Neutral at lam=0.
"""

from collections.abc import Sequence

from treesurgeon.core import step, varied
from treesurgeon.merge import regmean


@step.method("merge.regmean_pp")
def regmean_pp(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  alpha: varied.Varied = 0.9,
  ridge: varied.Varied = 1e-6,
  lam: varied.Varied = 1.0,
  kernels: str = step.BLOCK_KERNELS,
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors block by block, keeping outputs on inputs that merged blocks give.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, not negative; None means ones.
    alpha: what off-diagonal entries of the second moments are multiplied by, 0 to 1.
    ridge: pull towards the donors' average, relative to the mean diagonal.
    lam: how far to go from the model at hand to the merge; 0 leaves it as it is.
    kernels: which addresses are solved for; all others are averaged.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it needs each donor's data.

  Raises:
    ValueError: for a number out of range.

  Example:
    >>> regmean_pp(alpha=0.95)
    (merge.regmean_pp(alpha=0.95),)

  Reference:
    Nguyen et al., RegMean++, 2025, arXiv 2508.03121.
  """
  return regmean.build(
    tuple(models), weights=weights, alpha=alpha, ridge=ridge, lam=lam, kernels=kernels,
    pattern=select or ".*", scope="block",
  )  # fmt: skip
