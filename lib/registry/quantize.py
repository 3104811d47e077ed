# SPDX-License-Identifier: Apache-2.0
"""Methods that quantize. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.quantize.gptq": entries.Entry(
    factory="treesurgeon.compress.quantize.gptq:gptq",
    paper="Frantar et al., GPTQ, 2022, arXiv 2210.17323",
    oracle="tests/compress/quantize/gptq_test.py",
    verdict="reproduced",
    command=entries.DIRECTIONS,
    note="better than RTN at 4, 3 and 2 bits in three seeds; codes agree with llm-compressor's, "
    "tests/peers/gptq_test.py",
  ),
  "compress.quantize.rtn": entries.Entry(
    factory="treesurgeon.compress.quantize.rtn:rtn",
    paper="Nagel et al., A white paper on neural network quantization, 2021, arXiv 2106.08295",
    oracle="tests/compress/quantize/rtn_test.py",
    note="scales by the rule of compressed-tensors",
  ),
}
