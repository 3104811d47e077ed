# SPDX-License-Identifier: Apache-2.0
"""Methods that quantize. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.quantize.activations": entries.Entry(
    factory="treesurgeon.compress.quantize.activations:activations",
    paper="Yao et al., ZeroQuant, 2022, arXiv 2206.01861",
    oracle="tests/compress/quantize/activations_test.py",
    note="int or floats, by token or tensor, dynamic or static; recipes w8a8_int, w8a8_fp",
  ),
  "compress.quantize.adadim": entries.Entry(
    factory="treesurgeon.compress.quantize.adadim:adadim",
    paper="Heo et al., Rethinking channel dimensions to isolate outliers, ICLR 2024, "
    "arXiv 2309.15531",
    oracle="tests/compress/quantize/adadim_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="better than RTN in two seeds of three at 3 bits, and at 2; chooses by the output of each "
    "kernel by itself",
  ),
  "compress.quantize.agile_quant": entries.Entry(
    factory="treesurgeon.compress.quantize.agile_quant:agile_quant",
    paper="Shen et al., Agile-Quant, 2023, arXiv 2312.05693",
    oracle="tests/compress/quantize/outliertune_test.py",
    note="what lives in kernels: TRIP factors, W4, A8 or A4; no token pruning, no log2 softmax",
  ),
  "compress.quantize.aligned": entries.Entry(
    factory="treesurgeon.compress.quantize.aligned:aligned",
    paper="Li et al., Enabling fast 2-bit LLM on GPUs: memory alignment, sparse outlier, and "
    "asynchronous dequantization, 2023, arXiv 2311.16442",
    oracle="tests/compress/quantize/aligned_test.py",
    verdict="reproduced",
    command=entries.QUANTIZE,
    note="the widest groups better than random ones in three seeds, both at 3.8 bits in all; by "
    "the abstract: sizes and shares are ours; rounded to nearest; no kernel of its own",
  ),
  "compress.quantize.aqlm": entries.Entry(
    factory="treesurgeon.compress.quantize.aqlm:aqlm",
    paper="Egiazarian et al., AQLM, 2024, arXiv 2401.06118",
    oracle="tests/compress/quantize/aqlm_test.py",
    verdict="reproduced",
    command=entries.VECTORS,
    note="better than GPTQ at 2.2 bits in three seeds, and better for tuning blocks; tables by "
    "least squares, not Adam",
  ),
  "compress.quantize.autoround": entries.Entry(
    factory="treesurgeon.compress.quantize.autoround:autoround",
    paper="Cheng et al., Optimize weight rounding via signed gradient descent, 2023, "
    "arXiv 2309.05516",
    oracle="tests/compress/quantize/autoround_test.py",
    verdict="reproduced",
    command=entries.STUDY,
    note="better than rounding at 3 bits and than GPTQ at 2, in the loss of a decoder and of an "
    "encoder, one of each; symmetric grids are those of compressed-tensors",
  ),
  "compress.quantize.awq": entries.Entry(
    factory="treesurgeon.compress.quantize.awq:awq",
    paper="Lin et al., AWQ, 2023, arXiv 2306.00978",
    oracle="tests/compress/quantize/awq_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="better than RTN in three seeds at 2 bits, in two of three at 3; searches by exact output "
    "errors of the kernels, from second moments",
  ),
  "compress.quantize.bias_correction": entries.Entry(
    factory="treesurgeon.compress.quantize.bias_correction:bias_correction",
    paper="Nagel et al., Data-free quantization through weight equalization and bias correction, "
    "2019, arXiv 1906.04721",
    oracle="tests/compress/quantize/bias_correction_test.py",
  ),
  "compress.quantize.bitstack": entries.Entry(
    factory="treesurgeon.compress.quantize.bitstack:bitstack",
    paper="Wang et al., BitStack, 2024, arXiv 2410.23918",
    oracle="tests/compress/quantize/bitstack_test.py",
    verdict="reproduced",
    command=entries.VECTORS,
    note="every block lowers the loss in three seeds; norms of inputs are divided out of the "
    "left factors, so every kernel is scaled",
  ),
  "compress.quantize.bitstack_cut": entries.Entry(
    factory="treesurgeon.compress.quantize.bitstack_cut:bitstack_cut",
    paper="Wang et al., BitStack, 2024, arXiv 2410.23918",
    oracle="tests/compress/quantize/bitstack_test.py",
    verdict="reproduced",
    command=entries.VECTORS,
    note="any prefix of the order loads, and a larger budget is better in three seeds",
  ),
  "compress.quantize.bitstack_sort": entries.Entry(
    factory="treesurgeon.compress.quantize.bitstack_sort:bitstack_sort",
    paper="Wang et al., BitStack, 2024, arXiv 2410.23918",
    oracle="tests/compress/quantize/bitstack_test.py",
    note="one pass over the batches for every block but the first ones",
  ),
  "compress.quantize.cptquant": entries.Entry(
    factory="treesurgeon.compress.quantize.cptquant:cptquant",
    paper="Nanda et al., CPTQuant, 2024, arXiv 2412.03599",
    oracle="tests/compress/quantize/cptquant_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="at 3 bits all measures give all of four layers one width, but pruning in one seed of "
    "three, and that is worse by 0.05; widths meet a budget, by the shared solver, where the "
    "code clusters layers; measures repaired, see the module",
  ),
  "compress.quantize.decoupleq": entries.Entry(
    factory="treesurgeon.compress.quantize.decoupleq:decoupleq",
    paper="Guo et al., decoupleQ, 2024, arXiv 2404.12759",
    oracle="tests/compress/quantize/decoupleq_test.py",
    verdict="reproduced",
    command=entries.QUANTIZE,
    note="better than GPTQ at 2 bits in three seeds, at 3.0 against 2.75 bits with scales; norms "
    "are not tuned",
  ),
  "compress.quantize.deepshape": entries.Entry(
    factory="treesurgeon.compress.quantize.deepshape:deepshape",
    paper="Wu et al., It takes a good model to train a good model, 2025, arXiv 2506.00486",
    oracle="tests/compress/quantize/deepshape_test.py",
    note="a kernel's own histogram, at exact quantiles; by weight error alone a coarser step gains "
    "more bits",
  ),
  "compress.quantize.dequantize": entries.Entry(
    factory="treesurgeon.compress.quantize.dequantize:dequantize",
    paper="Nagel et al., A white paper on neural network quantization, 2021, arXiv 2106.08295",
    oracle="tests/compress/quantize/dequantize_test.py",
  ),
  "compress.quantize.equalize": entries.Entry(
    factory="treesurgeon.compress.quantize.equalize:equalize",
    paper="Nagel et al., Data-free quantization through weight equalization and bias correction, "
    "2019, arXiv 1906.04721",
    oracle="tests/compress/quantize/smoothquant_test.py",
    note="kind='log' after Li et al., FPTQ, 2023, arXiv 2308.15987",
  ),
  "compress.quantize.finequant": entries.Entry(
    factory="treesurgeon.compress.quantize.finequant:finequant",
    paper="Kim et al., FineQuant, 2023, arXiv 2308.09723",
    oracle="tests/compress/quantize/finequant_test.py",
    note="the rule that ends the halving of groups is ours, the paper's was not to be had; on the "
    "model of configs/quantize.py it halves none, so that nothing is shown",
  ),
  "compress.quantize.flexround": entries.Entry(
    factory="treesurgeon.compress.quantize.flexround:flexround",
    paper="Lee et al., FlexRound, ICML 2023, arXiv 2306.00317",
    oracle="tests/compress/quantize/flexround_test.py",
    verdict="reproduced",
    command=entries.STUDY,
    note="better than rounding at 3 bits in the loss of a decoder and of an encoder, one of each; "
    "not told apart from AutoRound; hidden states are all of the quantized prefix, not mixed",
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
  "compress.quantize.gqsa": entries.Entry(
    factory="treesurgeon.compress.quantize.gqsa:gqsa",
    paper="Zeng et al., GQSA, 2024, arXiv 2412.17560",
    oracle="tests/compress/quantize/gqsa_test.py",
    verdict="not reproduced",
    command=entries.VECTORS,
    note="W4S50 at 2.6 bits is worse than GPTQ's W2 at 3.0 and at 2.25 bits, though both "
    "stages of tuning help; as many groups of every output",
  ),
  "compress.quantize.gradient_ptq": entries.Entry(
    factory="treesurgeon.compress.quantize.gradient_ptq:gradient_ptq",
    paper="Yvinec et al., Gradient-based post-training quantization, 2023, arXiv 2308.07662",
    oracle="tests/compress/quantize/gradient_ptq_test.py",
    verdict="reproduced",
    command=entries.STUDY,
    note="on one decoder dividing beats shifting and sigmoids, MSE beats MAE, Adam AdaMax and SGD, "
    "and keeping 1 % helps; scales, cosine and signs make no difference that can be told",
  ),
  "compress.quantize.gwq": entries.Entry(
    factory="treesurgeon.compress.quantize.gwq:gwq",
    paper="Shao et al., GWQ, 2024, arXiv 2411.00850",
    oracle="tests/compress/quantize/gwq_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="better than RTN, half a bit smaller, and than random weights kept, in three seeds at 2 "
    "bits, in two of three at 3; a fraction of every matrix is kept, in the weights' dtype",
  ),
  "compress.quantize.hqq": entries.Entry(
    factory="treesurgeon.compress.quantize.hqq:hqq",
    paper="Badri and Shaji, Half-quadratic quantization of large machine learning models, 2023",
    oracle="tests/compress/quantize/hqq_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="better than RTN in three seeds at 2 bits, in two of three at 3 and at 4, a quarter of a "
    "bit larger; gains over min-max what the package does; groups along the inputs",
  ),
  "compress.quantize.minifloat": entries.Entry(
    factory="treesurgeon.compress.quantize.minifloat:minifloat",
    paper="Aggarwal et al., Post-training quantization with low-precision minifloats and integers "
    "on FPGAs, 2023, arXiv 2311.12359",
    oracle="tests/compress/quantize/minifloat_test.py",
    verdict="reproduced",
    command=entries.MINIFLOATS,
    note="on one decoder minifloats lose less at 3 to 8 bits where inputs share a static scale, "
    "not with a scale a token; integers hold the front of estimated hardware. A format a kernel, "
    "which is ours, gains nothing",
  ),
  "compress.quantize.olive": entries.Entry(
    factory="treesurgeon.compress.quantize.olive:olive",
    paper="Guo et al., OliVe, ISCA 2023, arXiv 2304.07493",
    oracle="tests/compress/quantize/olive_test.py",
    note="weights only; the search and its range are those of the published code",
  ),
  "compress.quantize.outliertune": entries.Entry(
    factory="treesurgeon.compress.quantize.outliertune:outliertune",
    paper="Wang et al., OutlierTune, 2024, arXiv 2406.18832",
    oracle="tests/compress/quantize/outliertune_test.py",
    note="scaled about zero where there are no biases",
  ),
  "compress.quantize.ptq161": entries.Entry(
    factory="treesurgeon.compress.quantize.ptq161:ptq161",
    paper="Zhao et al., PTQ1.61, 2025, arXiv 2502.13179",
    oracle="tests/compress/quantize/ptq161_test.py",
    verdict="reproduced",
    command=entries.VECTORS,
    note="learned scales better than analytic ones in three seeds, and than signs alone, which "
    "take half the bits at width 128; without the preprocessing, which trains adapters first",
  ),
  "compress.quantize.quarot": entries.Entry(
    factory="treesurgeon.compress.quantize.quarot:quarot",
    paper="Ashkboos et al., QuaRot, 2024, arXiv 2404.00456",
    oracle="tests/compress/quantize/quarot_test.py",
    note="stream and heads, and down on request; not across heads, nor queries and keys; no gain "
    "on the study's decoder, and 30 to 50 % less error on a model with planted outliers",
  ),
  "compress.quantize.rtn": entries.Entry(
    factory="treesurgeon.compress.quantize.rtn:rtn",
    paper="Nagel et al., A white paper on neural network quantization, 2021, arXiv 2106.08295",
    oracle="tests/compress/quantize/rtn_test.py",
    note="scales by the rule of compressed-tensors",
  ),
  "compress.quantize.smoothquant": entries.Entry(
    factory="treesurgeon.compress.quantize.smoothquant:smoothquant",
    paper="Xiao et al., SmoothQuant, 2022, arXiv 2211.10438",
    oracle="tests/compress/quantize/smoothquant_test.py",
    note="keeps outputs to rounding; what follows it must quantize activations too; nothing to "
    "gain on the study's decoder",
  ),
  "compress.quantize.spinquant": entries.Entry(
    factory="treesurgeon.compress.quantize.spinquant:spinquant",
    paper="Liu et al., SpinQuant, 2024, arXiv 2405.16406",
    oracle="tests/compress/quantize/quarot_test.py",
    note="turns of stream and heads; Cayley steps are solved for, not iterated; not told apart "
    "from QuaRot on the study's decoder",
  ),
  "compress.quantize.spqr": entries.Entry(
    factory="treesurgeon.compress.quantize.spqr:spqr",
    paper="Dettmers et al., SpQR, 2023, arXiv 2306.03078",
    oracle="tests/compress/quantize/spqr_test.py",
    verdict="not reproduced",
    command=entries.QUANTIZE,
    note="at 4.2 bits better by 0.0007 than GPTQ at 4.5, in groups of 16, in two seeds of three, "
    "and as good in the third; a fixed fraction of outliers, those of the highest leave-one-out "
    "scores",
  ),
  "compress.quantize.tune_scales": entries.Entry(
    factory="treesurgeon.compress.quantize.tune_scales:tune_scales",
    paper="Zeng et al., GQSA, 2024, arXiv 2412.17560",
    oracle="tests/compress/quantize/tune_scales_test.py",
    verdict="reproduced",
    command=entries.VECTORS,
    note="lowers the loss of GQSA in three seeds; for any compressed leaf: scales, tables, "
    "thin factors",
  ),
  "compress.quantize.untie": entries.Entry(
    factory="treesurgeon.compress.quantize.untie:untie",
    paper="Press and Wolf, Using the output embedding to improve language models, 2017, "
    "arXiv 1608.05859",
    oracle="tests/compress/quantize/untie_test.py",
  ),
  "compress.quantize.vptq": entries.Entry(
    factory="treesurgeon.compress.quantize.vptq:vptq",
    paper="Liu et al., VPTQ, 2024, arXiv 2409.17066",
    oracle="tests/compress/quantize/vptq_test.py",
    verdict="not reproduced",
    command=entries.VECTORS,
    note="worse than GPTQ at 2.1 against 2.25 bits at width 128, where tables are small; "
    "residual tables and outliers help; outliers are kept as they are; no fine-tuning of "
    "tables over layers",
  ),
  "compress.quantize.vq4dit": entries.Entry(
    factory="treesurgeon.compress.quantize.vq4dit:vq4dit",
    paper="Deng et al., VQ4DiT, 2024, arXiv 2408.17131",
    oracle="tests/compress/quantize/vq4dit_test.py",
    verdict="not reproduced",
    command=entries.VECTORS,
    note="candidates beat fixed assignments in one seed of three, by 0.0002; calibrates on "
    "hidden states of the data given, not of noise",
  ),
  "compress.quantize.vq_logits": entries.Entry(
    factory="treesurgeon.compress.quantize.vq_logits:vq_logits",
    paper="Shao et al., VQ-Logits, 2025, arXiv 2505.10202",
    oracle="tests/compress/quantize/vq_logits_test.py",
    verdict="not reproduced",
    command=entries.VECTORS,
    note="the loss falls with clusters, but a quarter fewer columns cost 0.15 nats a byte and "
    "more: k-means alone, without the training that follows in the paper",
  ),
}
