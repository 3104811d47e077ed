# SPDX-License-Identifier: Apache-2.0
"""The table of every method: name, factory, paper, and how it was verified.

Explicit and lazy: a method's module is imported when its name is first used. The ledger
`docs/methods.md`, `treesurgeon list`, the parser and the contract suite all read this table.
"""

import ast
import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any, Literal

from treesurgeon.core import step


@dataclasses.dataclass(frozen=True)
class Entry:
  """One method.

  Attributes:
    factory: "module:function".
    paper: authors, title, year, identifier.
    oracle: the test file that checks it exactly.
    verdict: "reproduced", "not reproduced", or "exact only".
    command: what shows the verdict.
    note: what a reader of the ledger should know.
  """

  factory: str
  paper: str
  oracle: str
  verdict: Literal["reproduced", "not reproduced", "exact only"] = "exact only"
  command: str = ""
  note: str = ""


_DIRECTIONS = (
  "python -P -m treesurgeon.experiments.directions --config=configs/directions.py --workdir=DIR"
)

_CONNECTIVITY = (
  "python -P -m treesurgeon.experiments.connectivity --config=configs/connectivity.py --workdir=DIR"
)

_MERGE_BENCH = (
  "python -P -m treesurgeon.experiments.merge_bench --config=configs/merge_bench.py:digits "
  "--workdir=DIR"
)

TABLE: dict[str, Entry] = {
  "adapt.lora": Entry(
    factory="treesurgeon.adapt.lora:lora",
    paper="Hu et al., LoRA: Low-rank adaptation of large language models, 2021, arXiv 2106.09685",
    oracle="tests/adapt/lora_test.py",
    note="adapters cross to and from peft with equal logits, tests/peers/peft_test.py; at full "
    "fine-tuning's learning rate rank 8 gains less of the new text and loses less of the other",
  ),
  "adapt.merge": Entry(
    factory="treesurgeon.adapt.merge:merge",
    paper="Hu et al., LoRA: Low-rank adaptation of large language models, 2021, arXiv 2106.09685",
    oracle="tests/adapt/merge_test.py",
    note="section 4.1; weights agree with peft's merge_and_unload, tests/peers/peft_test.py",
  ),
  "compress.prune.magnitude": Entry(
    factory="treesurgeon.compress.prune.magnitude:magnitude",
    paper="Han et al., Learning both weights and connections, 2015, arXiv 1506.02626",
    oracle="tests/compress/prune/prune_test.py",
    note="one shot, no retraining",
  ),
  "compress.prune.wanda": Entry(
    factory="treesurgeon.compress.prune.wanda:wanda",
    paper="Sun et al., A simple and effective pruning approach (Wanda), 2023, arXiv 2306.11695",
    oracle="tests/compress/prune/prune_test.py",
    verdict="not reproduced",
    command=_DIRECTIONS,
    note="at width 32, which has no outlier features, magnitude pruning by tensor is better at "
    "50 % in every seed",
  ),
  "compress.quantize.gptq": Entry(
    factory="treesurgeon.compress.quantize.gptq:gptq",
    paper="Frantar et al., GPTQ, 2022, arXiv 2210.17323",
    oracle="tests/compress/quantize/gptq_test.py",
    verdict="reproduced",
    command=_DIRECTIONS,
    note="better than RTN at 4, 3 and 2 bits in three seeds; codes agree with llm-compressor's, "
    "tests/peers/gptq_test.py",
  ),
  "compress.quantize.rtn": Entry(
    factory="treesurgeon.compress.quantize.rtn:rtn",
    paper="Nagel et al., A white paper on neural network quantization, 2021, arXiv 2106.08295",
    oracle="tests/compress/quantize/rtn_test.py",
    note="scales by the rule of compressed-tensors",
  ),
  "edit.rome": Entry(
    factory="treesurgeon.edit.rome:rome",
    paper="Meng et al., Locating and editing factual associations in GPT, 2022, arXiv 2202.05262",
    oracle="tests/edit/rome_test.py",
    verdict="reproduced",
    command="python -P -m treesurgeon.experiments.train_facts --config=configs/facts.py:quick",
    note="ES 1.00, PS .99, NS 1.00 (C = I: NS .63, fine-tuning: .29; 3 seeds, 24 edits); of other "
    "facts about the edited subject 81 % are lost, which these scores do not show",
  ),
  "edit.unlearn.task_negation": Entry(
    factory="treesurgeon.edit.unlearn.task_negation:task_negation",
    paper="Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089",
    oracle="tests/edit/unlearn/task_negation_test.py",
    verdict="not reproduced",
    command=_DIRECTIONS,
    note="section 3, forgetting via negation: it forgets, but at scale 1 the other text suffers as "
    "much, the two being near",
  ),
  "grow.g_stack": Entry(
    factory="treesurgeon.grow.g_stack:g_stack",
    paper="Du et al., Stacking your transformers, 2024, arXiv 2405.15319",
    oracle="tests/grow/g_stack_test.py",
    verdict="reproduced",
    command=_DIRECTIONS,
    note="beats scratch, never growing and interpolation at equal FLOPs in three seeds, growth 2; "
    "does not preserve the function; optimizer moments are gathered along",
  ),
  "grow.interpolate": Entry(
    factory="treesurgeon.grow.interpolate:interpolate",
    paper="Du et al., Stacking your transformers, 2024, arXiv 2405.15319",
    oracle="tests/grow/g_stack_test.py",
    verdict="reproduced",
    command=_DIRECTIONS,
    note="the variant the paper finds worse than stacking, and so it is here",
  ),
  "merge.adamerging": Entry(
    factory="treesurgeon.merge.adamerging:adamerging",
    paper="Yang et al., AdaMerging: Adaptive model merging for multi-task learning, 2023, "
    "arXiv 2310.02575",
    oracle="tests/merge/adamerging_test.py",
    note="task-wise, by layer or by tensor (the paper's layer-wise); density=0.2 is AdaMerging++",
  ),
  "merge.arcee_fusion": Entry(
    factory="treesurgeon.merge.arcee_fusion:arcee_fusion",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/arcee_fusion_test.py",
    note="equals mergekit 0.1.5 but near the threshold, where mergekit's divergences are rounding; "
    "exact quartiles; tests/peers/merge_spheres_test.py",
  ),
  "merge.atlas": Entry(
    factory="treesurgeon.merge.atlas:atlas",
    paper="Zhang et al., Knowledge composition using task vectors with learned anisotropic "
    "scaling, 2024, arXiv 2407.02880",
    oracle="tests/merge/atlas_test.py",
    note="recovers planted coefficients; the coefficients alone are a file, so it is a "
    "parameter-efficient fine-tuning method too; pseudo-labels by augmentation are left out",
  ),
  "merge.bang": Entry(
    factory="treesurgeon.merge.bang:bang",
    paper="Lin et al., Spurious feature diversification improves out-of-distribution "
    "generalization, 2023, arXiv 2309.17230",
    oracle="tests/merge/bang_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.digit_directions --what=bang --seeds=3",
    note="fine-tunes with smoothed labels, mixup or both, then averages as merge.wise_ft; that "
    "leaves the model less sure, and the average better out of distribution in two seeds of three; "
    "logits x10 do not spoil the average, as the head alone is louder",
  ),
  "merge.breadcrumbs": Entry(
    factory="treesurgeon.merge.breadcrumbs:breadcrumbs",
    paper="Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795",
    oracle="tests/merge/breadcrumbs_test.py",
    note="equals mergekit 0.1.5 to the bit, ties at a cut aside, tests/peers/merge_sparse_test.py, "
    "and granularity='row' is the authors'",
  ),
  "merge.breadcrumbs_ties": Entry(
    factory="treesurgeon.merge.breadcrumbs:breadcrumbs_ties",
    paper="Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795",
    oracle="tests/merge/breadcrumbs_test.py",
    note="equals mergekit 0.1.5 to the bit, ties at a cut aside; tests/peers/merge_sparse_test.py",
  ),
  "merge.consensus": Entry(
    factory="treesurgeon.merge.tall_masks:consensus",
    paper="Wang et al., Localizing task information, 2024, arXiv 2405.07813",
    oracle="tests/merge/tall_masks_test.py",
    note="keeps what at least k TALL masks keep; k=0 is task arithmetic",
  ),
  "merge.dam": Entry(
    factory="treesurgeon.merge.dam:dam",
    paper="Yang et al., Mitigating the backdoor effect for multi-task model merging via "
    "safety-aware subspace, 2024, arXiv 2410.13910",
    oracle="tests/merge/dam_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.digit_directions --what=dam --seeds=3",
    note="two masks in turn, masks=1 is the authors' code; fewer attacks than on AdaMerging, and "
    "than with one mask, in three seeds; than on task arithmetic at equal λ in two, for 2 to 8 "
    "points of accuracy; task arithmetic with a smaller λ is safer and better",
  ),
  "merge.dare_linear": Entry(
    factory="treesurgeon.merge.dare:dare_linear",
    paper="Yu et al., Language models are Super Mario (DARE), 2023, arXiv 2311.03099",
    oracle="tests/merge/dare_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.dare_ties": Entry(
    factory="treesurgeon.merge.dare:dare_ties",
    paper="Yu et al., Language models are Super Mario (DARE), 2023, arXiv 2311.03099",
    oracle="tests/merge/dare_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
  ),
  "merge.della": Entry(
    factory="treesurgeon.merge.della:della",
    paper="Deep et al., DELLA-Merging, 2024, arXiv 2406.11617",
    oracle="tests/merge/della_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
  ),
  "merge.della_linear": Entry(
    factory="treesurgeon.merge.della:della_linear",
    paper="Deep et al., DELLA-Merging, 2024, arXiv 2406.11617",
    oracle="tests/merge/della_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
  ),
  "merge.emr": Entry(
    factory="treesurgeon.merge.emr:emr",
    paper="Huang et al., EMR-Merging, 2024, arXiv 2405.17461",
    oracle="tests/merge/emr_test.py",
    note="serves one donor; rescales by tensor, the paper with granularity='global'",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.fisher": Entry(
    factory="treesurgeon.merge.fisher:fisher",
    paper="Matena and Raffel, Merging models with Fisher-weighted averaging, 2021, "
    "arXiv 2111.09832",
    oracle="tests/merge/fisher_test.py",
    note="empirical Fisher information; exact optimum of quadratic losses",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.iso_c": Entry(
    factory="treesurgeon.merge.iso_c:iso_c",
    paper="Marczak et al., No task left behind, 2025, arXiv 2502.04959",
    oracle="tests/merge/iso_c_test.py",
    note="equals FusionBench's algorithm in float64 where no direction is null",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.iso_cts": Entry(
    factory="treesurgeon.merge.iso_c:iso_cts",
    paper="Marczak et al., No task left behind, 2025, arXiv 2502.04959",
    oracle="tests/merge/iso_c_test.py",
    note="equals FusionBench's algorithm in float64 where no direction is null",
  ),
  "merge.karcher": Entry(
    factory="treesurgeon.merge.karcher:karcher",
    paper="Karcher, Riemannian center of mass and mollifier smoothing, 1977",
    oracle="tests/merge/karcher_test.py",
    note="equals mergekit 0.1.5, reading each model's inner products once; "
    "tests/peers/merge_spheres_test.py",
  ),
  "merge.knots": Entry(
    factory="treesurgeon.merge.knots:knots",
    paper="Stoica et al., Model merging with SVD to tie the knots, 2024, arXiv 2410.19735",
    oracle="tests/merge/knots_test.py",
    note="equals the authors' algorithm by tensor in float64; adapters are decomposed from their "
    "factors",
  ),
  "merge.layer_swap": Entry(
    factory="treesurgeon.merge.layer_swap:layer_swap",
    paper="Bandarkar et al., Layer swapping, 2024, arXiv 2410.01335",
    oracle="tests/merge/layer_swap_test.py",
    note="without transition layers, mergekit's passthrough of three slices",
  ),
  "merge.linear": Entry(
    factory="treesurgeon.merge.linear:linear",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/linear_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_test.py",
  ),
  "merge.magmax": Entry(
    factory="treesurgeon.merge.magmax:magmax",
    paper="Marczak et al., MagMax, 2024, arXiv 2407.06322",
    oracle="tests/merge/magmax_test.py",
    note="the merging step; the sequential fine-tuning before it is the user's",
  ),
  "merge.model_stock": Entry(
    factory="treesurgeon.merge.model_stock:model_stock",
    paper="Jang et al., Model Stock, 2024, arXiv 2403.19522",
    oracle="tests/merge/model_stock_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.multislerp": Entry(
    factory="treesurgeon.merge.multislerp:multislerp",
    paper="Goddard, multislerp, 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    oracle="tests/merge/multislerp_test.py",
    note="equals mergekit 0.1.5, whose tangent step is zero; tests/peers/merge_spheres_test.py",
  ),
  "merge.nearswap": Entry(
    factory="treesurgeon.merge.nearswap:nearswap",
    paper="Alchemonaut, NearSwap, 2024, "
    "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    oracle="tests/merge/nearswap_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.nuslerp": Entry(
    factory="treesurgeon.merge.nuslerp:nuslerp",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/nuslerp_test.py",
    note="equals mergekit 0.1.5 but for opposite vectors; tests/peers/merge_spheres_test.py",
  ),
  "merge.opcm": Entry(
    factory="treesurgeon.merge.opcm:opcm",
    paper="Tang et al., Merging models on the fly without retraining, 2025, arXiv 2501.09522",
    oracle="tests/merge/opcm_test.py",
    note="equals the official loop in float64; memory of one donor however many there are",
  ),
  "merge.optmerge": Entry(
    factory="treesurgeon.merge.optmerge:optmerge",
    paper="Wei et al., OptMerge, 2025, arXiv 2505.19892",
    oracle="tests/merge/optmerge_test.py",
    note="both official scripts, equal in float64: variant='full' and variant='lora'",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.passthrough": Entry(
    factory="treesurgeon.merge.passthrough:passthrough",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/passthrough_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.pcb": Entry(
    factory="treesurgeon.merge.pcb:pcb",
    paper="Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396",
    oracle="tests/merge/pcb_test.py",
    note="the authors' formulas and order statistics; theirs takes the model, granularity='global'",
  ),
  "merge.pleas": Entry(
    factory="treesurgeon.merge.pleas:pleas",
    paper="Nasery et al., PLeaS, 2024, arXiv 2407.02447",
    oracle="tests/merge/pleas_test.py",
    verdict="reproduced",
    command=_CONNECTIVITY,
    note="at equal width .978 right on split digits against .946 by matching alone and .571 by "
    "averaging, three seeds; what more width adds is within noise there; closed form, no worse "
    "than descent; ratio 1 is the ensemble of networks without norms exactly",
  ),
  "merge.ram": Entry(
    factory="treesurgeon.merge.ram:ram",
    paper="Reinforced Agent Merging, 2026, arXiv 2601.13572",
    oracle="tests/merge/ram_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.ramplus_tl": Entry(
    factory="treesurgeon.merge.ram:ramplus_tl",
    paper="Reinforced Agent Merging, 2026, arXiv 2601.13572",
    oracle="tests/merge/ram_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.rebasin": Entry(
    factory="treesurgeon.merge.rebasin:rebasin",
    paper="Ainsworth et al., Git Re-Basin, 2022, arXiv 2209.04836",
    oracle="tests/merge/rebasin_test.py",
    verdict="reproduced",
    command=_CONNECTIVITY,
    note="barriers fall in three seeds (digits, width 512: 1.0 nats to .3 by weights, .03 by "
    "activations; language models of width 64 from two seeds: 1.8 to 1.6 only); recovers a random "
    "permutation exactly, heads, grouped queries and tied embeddings included",
  ),
  "merge.regmean": Entry(
    factory="treesurgeon.merge.regmean:regmean",
    paper="Jin et al., Dataless knowledge fusion by merging weights of language models, 2022, "
    "arXiv 2212.09849",
    oracle="tests/merge/regmean_test.py",
    note="equals stacked least squares in float64",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.regmean_pp": Entry(
    factory="treesurgeon.merge.regmean_pp:regmean_pp",
    paper="Nguyen et al., RegMean++, 2025, arXiv 2508.03121",
    oracle="tests/merge/regmean_pp_test.py",
    note="RegMean through the blocks already merged; the blockwise driver makes the difference",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.robust_weight_signatures": Entry(
    factory="treesurgeon.merge.robust_weight_signatures:robust_weight_signatures",
    paper="Cai et al., Robust weight signatures, 2023, arXiv 2302.12480",
    oracle="tests/merge/robust_weight_signatures_test.py",
    note="stored, put on and taken off to the bit by merge.weight_patch and merge.patching",
  ),
  "merge.salsa": Entry(
    factory="treesurgeon.merge.salsa:salsa",
    paper="Chegini et al., SALSA: Soup-based alignment learning for stronger adaptation in RLHF, "
    "2024, arXiv 2411.01798",
    oracle="tests/merge/salsa_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.merge_directions --what=salsa --seeds=3",
    note="by DPO on given pairs; with the soup the policy goes further in three seeds, but is no "
    "better: on small sorters DPO itself costs accuracy; train.preferences.ppo is not tried",
  ),
  "merge.sce": Entry(
    factory="treesurgeon.merge.sce:sce",
    paper="Wan et al., FuseChat, 2024, arXiv 2408.07990",
    oracle="tests/merge/sce_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.slerp": Entry(
    factory="treesurgeon.merge.slerp:slerp",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    oracle="tests/merge/slerp_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.soup_greedy": Entry(
    factory="treesurgeon.merge.soups:soup_greedy",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/soups_test.py",
    note="the uniform soup is merge.linear; never worse than its best ingredient on the data",
  ),
  "merge.soup_learned": Entry(
    factory="treesurgeon.merge.soups:soup_learned",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/soups_test.py",
    note="without the paper's temperature",
  ),
  "merge.sparse_model_soups": Entry(
    factory="treesurgeon.merge.sparse_model_soups:sparse_model_soups",
    paper="Zimmer et al., Sparse model soups, 2023, arXiv 2306.16788",
    oracle="tests/merge/sparse_model_soups_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.merge_directions --what=sparse_soups --seeds=3",
    note="the soup's zeros are exactly those of the pruned model; rounds of soups beat rounds of "
    "one copy in three seeds, but one soup its mean copy in two only, and a copy trained as long "
    "as all together beats it: at 60 steps retraining is far from done",
  ),
  "merge.tall_masks": Entry(
    factory="treesurgeon.merge.tall_masks:tall_masks",
    paper="Wang et al., Localizing task information, 2024, arXiv 2405.07813",
    oracle="tests/merge/tall_masks_test.py",
    note="serves one donor; merge.task_store keeps all in two models and a bit an entry",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.task_arithmetic": Entry(
    factory="treesurgeon.merge.task_arithmetic:task_arithmetic",
    paper="Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089",
    oracle="tests/merge/task_arithmetic_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_test.py",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.ties": Entry(
    factory="treesurgeon.merge.ties:ties",
    paper="Yadav et al., TIES-Merging, 2023, arXiv 2306.01708",
    oracle="tests/merge/ties_test.py",
    verdict="not reproduced",
    command=_DIRECTIONS,
    note="better than the other task's expert, but behind a plain average of two experts; equals "
    "mergekit 0.1.5 by tensor, the paper with granularity='global'",
  ),
  "merge.tsv_merge": Entry(
    factory="treesurgeon.merge.tsv_merge:tsv_merge",
    paper="Gargiulo et al., Task singular vectors, 2024, arXiv 2412.00081",
    oracle="tests/merge/tsv_merge_test.py",
    note="equals the official algorithm in float64 where no direction is null",
    verdict="reproduced",
    command=_MERGE_BENCH,
  ),
  "merge.twin": Entry(
    factory="treesurgeon.merge.twin:twin",
    paper="Lu et al., Twin-Merging, 2024, arXiv 2406.15479",
    oracle="tests/merge/twin_test.py",
    note="the router's weights are given; training a router is not included",
  ),
  "merge.unconstrained": Entry(
    factory="treesurgeon.merge.unconstrained:unconstrained",
    paper="Zhang et al., Unconstrained model merging for enhanced LLM reasoning, 2024, "
    "arXiv 2410.13699",
    oracle="tests/merge/unconstrained_test.py",
    note="the homogeneous half, encoding ours; the heterogeneous half is treesurgeon.merge.fuse",
  ),
  "merge.wise_ft": Entry(
    factory="treesurgeon.merge.wise_ft:wise_ft",
    paper="Wortsman et al., Robust fine-tuning of zero-shot models, 2021, arXiv 2109.01903",
    oracle="tests/merge/wise_ft_test.py",
    note="both ends to the bit; sweeps compile once",
  ),
  "merge.wudi": Entry(
    factory="treesurgeon.merge.wudi:wudi",
    paper="Cheng et al., Whoever started the interference should end it, 2025, arXiv 2503.08099",
    oracle="tests/merge/wudi_test.py",
    note="equals the official loop in float64; solver='closed' is its exact minimum",
    verdict="not reproduced",
    command=_MERGE_BENCH,
  ),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One family of networks, all of which `lib/models` covers by the switches of one spec.

  Attributes:
    paper: authors, title, year, identifier.
    model_types: `model_type` in config.json.
    note: what a reader of the ledger should know.
  """

  paper: str
  model_types: tuple[str, ...]
  note: str = ""


ARCHITECTURES: dict[str, Architecture] = {
  "BERT, MiniLM": Architecture("Devlin et al., BERT, 2018, arXiv 1810.04805", ("bert",)),
  "Gemma 1, 2, 3": Architecture(
    "Gemma team, Gemma 3 technical report, 2025, arXiv 2503.19786",
    ("gemma", "gemma2", "gemma3_text"),
  ),
  "GPT-2": Architecture(
    "Radford et al., Language models are unsupervised multitask learners, 2019", ("gpt2",)
  ),
  "GPT-J": Architecture("Wang and Komatsuzaki, GPT-J-6B, 2021", ("gptj",)),
  "GPT-NeoX, Pythia": Architecture(
    "Black et al., GPT-NeoX-20B, 2022, arXiv 2204.06745", ("gpt_neox",)
  ),
  "Llama 2, 3": Architecture(
    "Grattafiori et al., The Llama 3 herd of models, 2024, arXiv 2407.21783", ("llama",)
  ),
  "Mistral": Architecture("Jiang et al., Mistral 7B, 2023, arXiv 2310.06825", ("mistral",)),
  "OLMo 2": Architecture("OLMo team, 2 OLMo 2 Furious, 2025, arXiv 2501.00656", ("olmo2",)),
  "OPT": Architecture("Zhang et al., OPT, 2022, arXiv 2205.01068", ("opt",)),
  "OpenELM, layer-wise scaling": Architecture(
    "Mehta et al., OpenELM, 2024, arXiv 2404.14619",
    ("openelm",),
    "unequal layers are several segments; the reference is written from the published definition",
  ),
  "Qwen2, Qwen2.5": Architecture(
    "Qwen team, Qwen2.5 technical report, 2024, arXiv 2412.15115", ("qwen2",)
  ),
  "Qwen3": Architecture("Qwen team, Qwen3 technical report, 2025, arXiv 2505.09388", ("qwen3",)),
}


@dataclasses.dataclass(frozen=True)
class Procedure:
  """What works on models but is no transform: a study, a measure, a converter.

  Attributes:
    file: where it is, from the root of the repository.
    paper: authors, title, year, identifier.
    oracle: the test file that checks it.
    verdict: as of an `Entry`.
    command: what runs it, or shows the verdict.
    note: what a reader of the ledger should know.
  """

  file: str
  paper: str
  oracle: str
  verdict: Literal["reproduced", "not reproduced", "exact only"] = "exact only"
  command: str = ""
  note: str = ""


PROCEDURES: dict[str, Procedure] = {
  "evolutionary search of a merge": Procedure(
    "lib/run/evolve.py",
    "Akiba et al., Evolutionary optimization of model merging recipes, 2024, arXiv 2403.13187",
    "tests/run/evolve_test.py",
    command="treesurgeon evolve --help",
    note="CMA-ES over the numbers of any merge, by the package cmaes",
  ),
  "extraction of a LoRA": Procedure(
    "lib/adapt/extract.py",
    "Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    "tests/adapt/extract_test.py",
    command="treesurgeon extract-lora --help",
    note="equals mergekit 0.1.5's factors up to sign; tests/peers/mergekit_extras_test.py",
  ),
  "fusion of models with other vocabularies": Procedure(
    "lib/merge/fuse.py",
    "Zhang et al., Unconstrained model merging, 2024, arXiv 2410.13699",
    "tests/merge/fuse_test.py",
    note="the heterogeneous half; the homogeneous one is merge.unconstrained",
  ),
  "linear mode connectivity": Procedure(
    "lib/evaluate/connectivity.py",
    "Ito et al., Analysis of linear mode connectivity via permutation-based weight matching, "
    "2024, arXiv 2402.04051",
    "tests/evaluate/connectivity_test.py",
    command="python -P -m treesurgeon.experiments.connectivity --config=configs/connectivity.py "
    "--workdir=DIR",
    note="barrier, distance and alignment of singular vectors before and after matching",
  ),
  "merge benchmark": Procedure(
    "lib/evaluate/merge_bench.py",
    "He et al., MergeBench, 2025, arXiv 2505.10833; Yadav et al., What matters for model merging "
    "at scale?, 2024, arXiv 2410.03617",
    "tests/evaluate/merge_bench_test.py",
    command=_MERGE_BENCH,
    note="results and what held of the expected orders: docs/merge_bench.md",
  ),
  "mixture of experts from dense models": Procedure(
    "lib/merge/moe.py",
    "Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    "tests/merge/moe_test.py",
    command="treesurgeon moe --help",
    note="Mixtral, Qwen2-MoE and Qwen3-MoE; tensors equal mergekit-moe's",
  ),
}


def load(name: str) -> Callable[..., step.Transform]:
  """Import a method's factory.

  Args:
    name: a name in `TABLE`.

  Returns:
    The factory.

  Raises:
    ValueError: for an unknown name; the nearest are named.

  Example:
    >>> load("compress.quantize.rtn")(bits=3)
    (compress.quantize.rtn(bits=3),)
  """
  if name not in TABLE:
    near = difflib.get_close_matches(name, TABLE, n=3, cutoff=0.4)
    raise ValueError(f"unknown transform {name!r}; did you mean {', '.join(near or TABLE)}?")
  module, function = TABLE[name].factory.split(":")
  return getattr(importlib.import_module(module), function)


def summary(name: str) -> str:
  """Return a method's one-line description, from its docstring.

  Args:
    name: a name in `TABLE`.

  Returns:
    The first line of the factory's docstring.

  Example:
    >>> summary("compress.quantize.rtn").endswith(".")
    True
  """
  return (load(name).__doc__ or "").strip().splitlines()[0]


def parse(expression: str) -> step.Transform:
  """Read a transform from its canonical spelling; names and literals only.

  Args:
    expression: like `compress.prune.wanda(sparsity=0.5) + compress.quantize.gptq(bits=4)`;
      `by_path([(regex, transform), ...])` and `chain(a, b)` may nest.

  Returns:
    The transform.

  Raises:
    ValueError: for a syntax error, unknown name or argument, or an argument that is no literal.

  Example:
    >>> parse("compress.quantize.rtn(bits=4) + compress.quantize.rtn(bits=3)")
    (compress.quantize.rtn(), compress.quantize.rtn(bits=3))
  """
  try:
    tree = ast.parse(expression.strip(), mode="eval")
  except SyntaxError as error:
    raise ValueError(f"cannot read the transform {expression!r}: {error.msg}") from error
  except (ValueError, MemoryError, RecursionError) as error:  # null bytes; too deep
    raise ValueError(f"cannot read the transform {expression[:80]!r}: {error}") from error
  return _build(tree.body, expression)


def _build(node: ast.expr, source: str) -> step.Transform:
  match node:
    case ast.BinOp(op=ast.Add()):
      return _build(node.left, source) + _build(node.right, source)
    case ast.Call(func=ast.Name(id="chain"), keywords=[]):
      return step.chain(*(_build(a, source) for a in node.args))
    case ast.Call(func=ast.Name(id="by_path"), args=[ast.List(elts=rules)], keywords=[]):
      return step.by_path([_rule(r, source) for r in rules])
    case ast.Call(args=[]):
      name = _dotted(node.func, source)
      factory = load(name)
      arguments: dict[str, Any] = {}
      for k in node.keywords:
        value = _literal(k, name, source)
        if k.arg in arguments:
          raise ValueError(f"{name}: the argument {k.arg!r} is given twice in {source!r}")
        arguments[str(k.arg)] = value
      return factory(**arguments)
    case ast.Call():
      name = _dotted(node.func, source)
      raise ValueError(f"{name}: arguments are given by name, like {name}(bits=4), in {source!r}")
    case ast.Name() | ast.Attribute():
      name = _dotted(node, source)
      raise ValueError(f"{name!r} is not a call; write {name}() in {source!r}")
    case _:
      raise ValueError(
        f"{ast.unparse(node)!r} is not a transform in {source!r}; "
        "valid are calls of registered names joined by '+'"
      )


def _rule(node: ast.expr, source: str) -> tuple[str, step.Transform]:
  match node:
    case ast.Tuple(elts=[ast.Constant(value=str(pattern)), inner]):
      return pattern, _build(inner, source)
    case _:
      raise ValueError(f"by_path takes (regex, transform) pairs, not {ast.unparse(node)!r}")


def _dotted(node: ast.expr, source: str) -> str:
  match node:
    case ast.Name(id=name):
      return name
    case ast.Attribute(value=inner, attr=name):
      return f"{_dotted(inner, source)}.{name}"
    case _:
      raise ValueError(f"{ast.unparse(node)!r} is not the name of a transform in {source!r}")


def _literal(keyword: ast.keyword, name: str, source: str) -> Any:
  if keyword.arg is None:
    raise ValueError(f"{name}: '**' is not allowed in {source!r}")
  try:
    return ast.literal_eval(keyword.value)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{name}: the argument {keyword.arg}={ast.unparse(keyword.value)} is not a literal "
      "(a number, a string, True, False, None, or a list of these)"
    ) from error
