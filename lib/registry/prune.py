# SPDX-License-Identifier: Apache-2.0
"""Methods that prune. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.prune.d_pruner": entries.Entry(
    factory="treesurgeon.compress.prune.d_pruner:d_pruner",
    paper="Zhang et al., Pruning as a domain-specific LLM extractor, 2024, arXiv 2405.06275",
    oracle="tests/compress/prune/d_pruner_test.py",
    verdict="not reproduced",
    command=entries.PRUNE,
    note="two texts are better than one on both in half of nine cells, by less than they vary, and "
    "plain Wanda is far better; general importance is Fisher information, so both texts count "
    "in nats; the authors' code takes SparseGPT's error, which at its learning rate changes "
    "next to nothing",
  ),
  "compress.prune.ecoflap": entries.Entry(
    factory="treesurgeon.compress.prune.ecoflap:ecoflap",
    paper="Sung et al., ECoFLaP: Efficient coarse-to-fine layer-wise pruning for vision-language "
    "models, 2024, arXiv 2310.02998",
    oracle="tests/compress/prune/ecoflap_test.py",
    verdict="reproduced",
    command=entries.PRUNE,
    note="better than Wanda with one ratio at 50 % in three seeds, by 0.01 nats or less; not at 80 "
    "%; the mean sparsity is exact, which the authors' rounding is not",
  ),
  "compress.prune.gradual": entries.Entry(
    factory="treesurgeon.compress.prune.gradual:gradual",
    paper="Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for model "
    "compression, 2017, arXiv 1710.01878",
    oracle="tests/compress/prune/gradual_test.py",
    verdict="not reproduced",
    command=entries.PRUNE,
    note="worse than pruning at once and training as long, in all nine cells, where training is "
    "short; masks by jaxpruner's rule; with a pattern the runs thin out along the same curve",
  ),
  "compress.prune.layer_drop": entries.Entry(
    factory="treesurgeon.compress.prune.layer_drop:layer_drop",
    paper="Sajjad et al., On the effect of dropping layers of pre-trained Transformer models, "
    "2020, arXiv 2004.03844",
    oracle="tests/compress/prune/structure_test.py",
  ),
  "compress.prune.magnitude": entries.Entry(
    factory="treesurgeon.compress.prune.magnitude:magnitude",
    paper="Han et al., Learning both weights and connections, 2015, arXiv 1506.02626",
    oracle="tests/compress/prune/prune_test.py",
    verdict="reproduced",
    command=entries.PRUNE,
    note="far better than random weights in three seeds; one shot; per='model' compares over all "
    "selected leaves, which is worse here",
  ),
  "compress.prune.minitron": entries.Entry(
    factory="treesurgeon.compress.prune.minitron:minitron",
    paper="Muralidharan et al., Compact language models via pruning and knowledge distillation, "
    "2024, arXiv 2407.14679",
    oracle="tests/compress/prune/structure_test.py",
    verdict="not reproduced",
    command=entries.STRUCTURE,
    note="distilled it is worse than trained on labels for as long, by 0.02 nats in three seeds; "
    "one shape for all layers; retraining is compress.distill.logits",
  ),
  "compress.prune.obert": entries.Entry(
    factory="treesurgeon.compress.prune.obert:obert",
    paper="Kurtic et al., The optimal BERT surgeon: scalable and accurate second-order pruning for "
    "large language models, 2022, arXiv 2203.07259",
    oracle="tests/compress/prune/obert_test.py",
    verdict="reproduced",
    command=entries.PRUNE,
    note="better than magnitudes, over the model at 50 % and by matrix at 2:4, in three seeds, at "
    "80 % in two; weights kept are at the exact minimum for all those pruned of a block, where the "
    "authors' code adds up single updates; one shot",
  ),
  "compress.prune.shortgpt": entries.Entry(
    factory="treesurgeon.compress.prune.shortgpt:shortgpt",
    paper="Men et al., ShortGPT: Layers in large language models are more redundant than you "
    "expect, 2024, arXiv 2403.03853",
    oracle="tests/compress/prune/structure_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than dropping random layers in three seeds",
  ),
  "compress.prune.slicegpt": entries.Entry(
    factory="treesurgeon.compress.prune.slicegpt:slicegpt",
    paper="Ashkboos et al., SliceGPT: Compress large language models by deleting rows and columns, "
    "2024, arXiv 2401.15024",
    oracle="tests/compress/prune/slicegpt_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than a random turn, and a turn a branch than one, in three seeds; without "
    "shortcuts one turn serves all blocks and the family's config holds the result",
  ),
  "compress.prune.sparsegpt": entries.Entry(
    factory="treesurgeon.compress.prune.sparsegpt:sparsegpt",
    paper="Frantar and Alistarh, SparseGPT: Massive language models can be accurately pruned in "
    "one-shot, 2023, arXiv 2301.00774",
    oracle="tests/compress/prune/sparsegpt_test.py",
    verdict="reproduced",
    command=entries.PRUNE,
    note="better than Wanda at 50 %, 2:4 and 80 % in three seeds; keeps what llm-compressor 0.14 "
    "keeps, tests/peers/prune_test.py; bits=4 quantizes what stays on the way",
  ),
  "compress.prune.wanda": entries.Entry(
    factory="treesurgeon.compress.prune.wanda:wanda",
    paper="Sun et al., A simple and effective pruning approach (Wanda), 2023, arXiv 2306.11695",
    oracle="tests/compress/prune/prune_test.py",
    verdict="not reproduced",
    command=entries.PRUNE,
    note="better than magnitudes at 2:4 in three seeds, worse at 50 %",
  ),
  "compress.prune.ziplm": entries.Entry(
    factory="treesurgeon.compress.prune.ziplm:ziplm",
    paper="Kurtic et al., ZipLM: Inference-aware structured pruning of language models, 2023, "
    "arXiv 2302.04089",
    oracle="tests/compress/prune/ziplm_test.py",
    verdict="reproduced",
    command=entries.STRUCTURE,
    note="better than Minitron's importances at twice the speed in three seeds; a unit of every "
    "block stays; costs are weights, milliseconds measured, or a file",
  ),
}
