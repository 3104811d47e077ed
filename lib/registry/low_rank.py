# SPDX-License-Identifier: Apache-2.0
"""Methods that factorize. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.low_rank.asvd": entries.Entry(
    factory="treesurgeon.compress.low_rank.asvd:asvd",
    paper="Yuan et al., ASVD: Activation-aware singular value decomposition for compressing large "
    "language models, 2023, arXiv 2312.05821",
    oracle="tests/compress/low_rank/low_rank_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than SVD in three seeds, by less than 0.01 nats; without the search for each "
    "kernel's rank",
  ),
  "compress.low_rank.eora": entries.Entry(
    factory="treesurgeon.compress.low_rank.eora:eora",
    paper="Liu et al., EoRA: Fine-tuning-free compensation for compressed LLM with eigenspace "
    "low-rank approximation, 2024, arXiv 2410.21271",
    oracle="tests/compress/low_rank/low_rank_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than LoRC at 3 and 2 bits in three seeds; behind any compression; the original "
    "model is a donor",
  ),
  "compress.low_rank.lorc": entries.Entry(
    factory="treesurgeon.compress.low_rank.lorc:lorc",
    paper="Yao et al., ZeroQuant-V2: Exploring post-training quantization in LLMs from "
    "comprehensive study to low rank compensation, 2023, arXiv 2303.08302",
    oracle="tests/compress/low_rank/low_rank_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than rounding alone at 3 and 2 bits in three seeds; behind any quantizer; the "
    "original model is a donor",
  ),
  "compress.low_rank.lq_lora": entries.Entry(
    factory="treesurgeon.compress.low_rank.lq_lora:lq_lora",
    paper="Guo et al., LQ-LoRA: Low-rank plus quantized matrix decomposition for efficient "
    "language model finetuning, 2023, arXiv 2311.12023",
    oracle="tests/compress/low_rank/lq_lora_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="better than its codes alone in three seeds, at 4.8 against 3.3 bits at width 64; Fisher "
    "information helps in one of three; apply --budget chooses each kernel's configuration",
  ),
  "compress.low_rank.pela": entries.Entry(
    factory="treesurgeon.compress.low_rank.pela:pela",
    paper="Guo et al., PELA: Learning parameter-efficient models with low-rank approximation, "
    "2023, arXiv 2310.10700",
    oracle="tests/compress/low_rank/pela_test.py",
    note="a constant rate; the task loss is the batches' cross entropy",
  ),
  "compress.low_rank.svd": entries.Entry(
    factory="treesurgeon.compress.low_rank.svd:svd",
    paper="Eckart and Young, The approximation of one matrix by another of lower rank, 1936, "
    "Psychometrika 1",
    oracle="tests/compress/low_rank/low_rank_test.py",
  ),
  "compress.low_rank.svd_llm": entries.Entry(
    factory="treesurgeon.compress.low_rank.svd_llm:svd_llm",
    paper="Wang et al., SVD-LLM: Truncation-aware singular value decomposition for large language "
    "model compression, 2024, arXiv 2403.07378",
    oracle="tests/compress/low_rank/low_rank_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than ASVD in three seeds",
  ),
}
