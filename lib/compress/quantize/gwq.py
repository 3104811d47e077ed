# SPDX-License-Identifier: Apache-2.0
"""GWQ: the weights of steepest loss are kept, the others rounded to nearest.

Shao et al., "GWQ: gradient-aware weight quantization for large language models", 2024 (arXiv
2411.00850). One calibration text, or a few, gives the gradient of the loss; the 1 % of the weights
with the largest |dL/dw| stay as they are beside the others, whose grids are fitted without them.

What is kept is a fraction of every matrix, in the dtype of the weights (float16 in the paper, whose
models are in it). The size of the groups is ours. With several examples the gradient is that of
their mean loss. Float32. Neutral at outliers=1, which keeps every weight.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import outliers as outlying
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, lifting, needs, step


def quantize(
  w: Float[Array, "rows cols"],
  gradient: Float[Array, "rows cols"],
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = False,
  outliers: float = 0.01,
  scale_dtype: str | None = None,
) -> leaves.QuantizedTensor | leaves.Sum:
  """Keep the weights of the largest gradients and round the others.

  Args:
    w: weights, input dimension first.
    gradient: of the loss in each weight.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    symmetric: whether there are no zero points.
    outliers: fraction of the weights that are kept.
    scale_dtype: how scales are stored, see `grid`; None is the dtype of `w`.

  Returns:
    A `QuantizedTensor`, or a `Sum` of one, zero where weights are kept, and `Outliers`.

  Example:
    >>> w = jnp.array([[0.3], [1.4], [-1.0], [0.8]])
    >>> gradient = jnp.array([[0.0], [-9.0], [1.0], [2.0]])
    >>> quantize(w, gradient, bits=2, group_size=4, outliers=0.25).dense()[1].item()
    1.399999976158142
  """
  kept = outlying.pick(jnp.abs(gradient.astype(jnp.float32)), outliers)
  # Zero is on every grid and widens no range, so it leaves no trace of what is kept elsewhere.
  rest = jnp.where(kept, 0, w)
  form: dict[str, Any] = {"bits": bits, "group_size": group_size}
  codes, grid = rtn.quantize(rest, **form, symmetric=symmetric, scale_dtype=scale_dtype)
  base = grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
  if not outlying.count_of(outliers, *w.shape):
    return base
  return leaves.Sum((base, outlying.gather(w, kept, outliers)))


@step.method("compress.quantize.gwq")
def gwq(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = False,
  outliers: float = 0.01,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by rounding to nearest, but for the weights of the largest gradients.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    outliers: fraction of the weights that are kept; 1 is the neutral setting.
    scale_dtype: how scales are stored, as for rtn; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. One text is enough for calibration.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> gwq(bits=3)
    (compress.quantize.gwq(bits=3),)

  Reference:
    Shao et al., GWQ: Gradient-Aware Weight Quantization for Large Language Models, 2024,
    arXiv:2411.00850.
  """
  hyper = {
    "bits": bits, "group_size": group_size, "symmetric": symmetric, "outliers": outliers,
    "scale_dtype": scale_dtype,
  }  # fmt: skip
  grids.check(**hyper)
  outlying.check(outliers)
  wants = {"gradient": needs.Statistic("gradient")}
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, wants=wants)


def _leaf(w: Any, gradient: Any, *, group_size: int, **hyper: Any) -> Any:
  size = grids.clamp_group(group_size, w.shape[-2])
  return quantize(w, gradient, group_size=size, **hyper)
