# SPDX-License-Identifier: Apache-2.0
"""Make compressed leaves dense again, in their storage dtype: the values stay, the size does not.

The drivers refuse to quantize what is quantized already in another format, for that rounds twice
without anyone asking for it. `dequantize() + gptq(bits=3)` asks for it.
"""

from typing import Any

from treesurgeon.core import leaves, lifting, step


@step.method("compress.quantize.dequantize")
def dequantize(*, select: str | None = None) -> step.Step:
  """Make compressed leaves dense.

  Args:
    select: which addresses; None is all.

  Returns:
    The transform. It changes no value, and dense leaves not at all.

  Example:
    >>> dequantize(select="layers/0/.*")
    (compress.quantize.dequantize(select='layers/0/.*'),)

  Reference:
    Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv:2106.08295.
  """
  return lifting.over_leaves(_leaf, hyper={}, select=select, default=".*", domain=".*", raw=True)


def _leaf(w: Any) -> Any:
  return leaves.dense(w)
