# SPDX-License-Identifier: Apache-2.0
"""Chains that have a name: what a paper or a tool calls one scheme is written as one call.

The parser puts the chain in its place, so lineage, `repr` and configs hold the steps themselves.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A named chain.

  Attributes:
    expression: the chain.
    summary: what it does, one line.
    paper: authors, title, year, identifier.
  """

  expression: str
  summary: str
  paper: str


_KURTIC = (
  "Kurtic et al., Give me BF16 or give me death? Accuracy-performance trade-offs in LLM "
  "quantization, 2024, arXiv 2411.02355"
)
RECIPES: dict[str, Recipe] = {
  "compress.quantize.w4a16": Recipe(
    "compress.quantize.gptq(bits=4, group_size=128, mse=True)",
    "4-bit weights in groups of 128 by GPTQ, ranges by least squared error.",
    _KURTIC,
  ),
  "compress.quantize.w8a8_fp": Recipe(
    "compress.quantize.rtn(bits=8, format='e4m3fn', group_size=-1) + "
    "compress.quantize.activations(format='e4m3fn')",
    "8-bit floats: weights rounded, one scale an output; inputs dynamically, one scale a token.",
    _KURTIC,
  ),
  "compress.quantize.w8a8_int": Recipe(
    "compress.quantize.gptq(bits=8, group_size=-1) + compress.quantize.activations()",
    "8-bit integers: weights by GPTQ, one scale an output; inputs dynamically, one scale a token. "
    "For models with large outliers put compress.quantize.smoothquant() before it.",
    _KURTIC,
  ),
}
