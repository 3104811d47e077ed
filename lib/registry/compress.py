# SPDX-License-Identifier: Apache-2.0
"""Methods that compress: pruning and quantization. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.prune.magnitude": entries.Entry(
    factory="treesurgeon.compress.prune.magnitude:magnitude",
    paper="Han et al., Learning both weights and connections, 2015, arXiv 1506.02626",
    oracle="tests/compress/prune/prune_test.py",
    note="one shot, no retraining",
  ),
  "compress.prune.wanda": entries.Entry(
    factory="treesurgeon.compress.prune.wanda:wanda",
    paper="Sun et al., A simple and effective pruning approach (Wanda), 2023, arXiv 2306.11695",
    oracle="tests/compress/prune/prune_test.py",
    verdict="not reproduced",
    command=entries.DIRECTIONS,
    note="at width 32, which has no outlier features, magnitude pruning by tensor is better at "
    "50 % in every seed",
  ),
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
