# SPDX-License-Identifier: Apache-2.0
"""What works on models but is no transform."""

from treesurgeon.registry import entries

PROCEDURES: dict[str, entries.Procedure] = {
  "evolutionary search of a merge": entries.Procedure(
    "lib/run/evolve.py",
    "Akiba et al., Evolutionary optimization of model merging recipes, 2024, arXiv 2403.13187",
    "tests/run/evolve_test.py",
    command="treesurgeon evolve --help",
    note="CMA-ES over the numbers of any merge, by the package cmaes",
  ),
  "extraction of a LoRA": entries.Procedure(
    "lib/adapt/extract.py",
    "Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    "tests/adapt/extract_test.py",
    command="treesurgeon extract-lora --help",
    note="equals mergekit 0.1.5's factors up to sign; tests/peers/mergekit_extras_test.py",
  ),
  "fusion of models with other vocabularies": entries.Procedure(
    "lib/merge/fuse.py",
    "Zhang et al., Unconstrained model merging, 2024, arXiv 2410.13699",
    "tests/merge/fuse_test.py",
    note="the heterogeneous half; the homogeneous one is merge.unconstrained",
  ),
  "generalized Gaussian initialization": entries.Procedure(
    "lib/models/gg_init.py",
    "Wu et al., It takes a good model to train a good model, 2025, arXiv 2506.00486",
    "tests/stats/generalized_gaussian_test.py",
    note="variance over the number of inputs; the published code divides by that of outputs",
  ),
  "linear mode connectivity": entries.Procedure(
    "lib/evaluate/connectivity.py",
    "Ito et al., Analysis of linear mode connectivity via permutation-based weight matching, "
    "2024, arXiv 2402.04051",
    "tests/evaluate/connectivity_test.py",
    command=entries.CONNECTIVITY,
    note="barrier, distance and alignment of singular vectors before and after matching",
  ),
  "merge benchmark": entries.Procedure(
    "lib/evaluate/merge_bench.py",
    "He et al., MergeBench, 2025, arXiv 2505.10833; Yadav et al., What matters for model merging "
    "at scale?, 2024, arXiv 2410.03617",
    "tests/evaluate/merge_bench_test.py",
    command=entries.MERGE_BENCH,
    note="results and what held of the expected orders: docs/merge_bench.md",
  ),
  "mixture of experts from dense models": entries.Procedure(
    "lib/merge/moe.py",
    "Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    "tests/merge/moe_test.py",
    command="treesurgeon moe --help",
    note="Mixtral, Qwen2-MoE and Qwen3-MoE; tensors equal mergekit-moe's",
  ),
  "quantized cache of keys and values": entries.Procedure(
    "kernels/attention_lowbit/cache.py",
    "Liu et al., KIVI: a tuning-free asymmetric 2bit quantization for KV cache, 2024, arXiv "
    "2402.02750",
    "tests/kernels/attention_lowbit/cache_test.py",
    "not reproduced",
    "python -P -m treesurgeon.experiments.cache_directions --config=configs/cache.py --workdir=DIR",
    "exact; keys per channel are better than per token only where they have large channels, which "
    "a small decoder has not: with such planted, which changes no output, 2 bits cost 0.01 nats "
    "against 0.8; models.generate(..., cache_bits=2)",
  ),
  "table lookup of bit planes": entries.Procedure(
    "kernels/lut_matmul/xla.py",
    "Wei et al., T-MAC: CPU renaissance via table lookup for low-bit LLM deployment on edge, 2024, "
    "arXiv 2407.00088",
    "tests/kernels/lut_matmul/xla_test.py",
    "not reproduced",
    "python -P -m treesurgeon.experiments.bench_cpu_matmul",
    "exact; XLA has no byte shuffle, so that it takes 6 to 25 times as long as decoding; chosen by "
    "implementation='lut' only",
  ),
}
