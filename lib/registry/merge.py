# SPDX-License-Identifier: Apache-2.0
"""Methods that merge: one model from several. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "merge.adamerging": entries.Entry(
    factory="treesurgeon.merge.adamerging:adamerging",
    paper="Yang et al., AdaMerging: Adaptive model merging for multi-task learning, 2023, "
    "arXiv 2310.02575",
    oracle="tests/merge/adamerging_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="task-wise, by layer or by tensor (the paper's layer-wise); density=0.2 is "
    "AdaMerging++; on digits by tensor is better than by task in three seeds, but behind task "
    "arithmetic, whose one number is chosen on labels",
  ),
  "merge.arcee_fusion": entries.Entry(
    factory="treesurgeon.merge.arcee_fusion:arcee_fusion",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/arcee_fusion_test.py",
    note="equals mergekit 0.1.5 but near the threshold, where mergekit's divergences are rounding; "
    "exact quartiles; tests/peers/merge_spheres_test.py",
  ),
  "merge.atlas": entries.Entry(
    factory="treesurgeon.merge.atlas:atlas",
    paper="Zhang et al., Knowledge composition using task vectors with learned anisotropic "
    "scaling, 2024, arXiv 2407.02880",
    oracle="tests/merge/atlas_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="recovers planted coefficients; the coefficients alone are a file, so it is a "
    "parameter-efficient fine-tuning method too; pseudo-labels by augmentation are left out; on "
    "digits better than task arithmetic in three seeds; on the language suite in two of three",
  ),
  "merge.bang": entries.Entry(
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
  "merge.breadcrumbs": entries.Entry(
    factory="treesurgeon.merge.breadcrumbs:breadcrumbs",
    paper="Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795",
    oracle="tests/merge/breadcrumbs_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="equals mergekit 0.1.5 to the bit, ties at a cut aside, "
    "tests/peers/merge_sparse_test.py, and granularity='row' is the authors'; on digits within "
    ".002 of task arithmetic",
  ),
  "merge.breadcrumbs_ties": entries.Entry(
    factory="treesurgeon.merge.breadcrumbs:breadcrumbs_ties",
    paper="Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795",
    oracle="tests/merge/breadcrumbs_test.py",
    note="equals mergekit 0.1.5 to the bit, ties at a cut aside; tests/peers/merge_sparse_test.py",
  ),
  "merge.consensus": entries.Entry(
    factory="treesurgeon.merge.tall_masks:consensus",
    paper="Wang et al., Localizing task information, 2024, arXiv 2405.07813",
    oracle="tests/merge/tall_masks_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="keeps what at least k TALL masks keep; k=0 is task arithmetic; on digits better than "
    "task arithmetic in one seed of three",
  ),
  "merge.dam": entries.Entry(
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
  "merge.dare_linear": entries.Entry(
    factory="treesurgeon.merge.dare:dare_linear",
    paper="Yu et al., Language models are Super Mario (DARE), 2023, arXiv 2311.03099",
    oracle="tests/merge/dare_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; "
    "tests/peers/merge_sparse_test.py; that rescaling is needed holds on digits in three seeds, "
    "and not on the language suite, where the best λ is the smallest",
  ),
  "merge.dare_ties": entries.Entry(
    factory="treesurgeon.merge.dare:dare_ties",
    paper="Yu et al., Language models are Super Mario (DARE), 2023, arXiv 2311.03099",
    oracle="tests/merge/dare_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
  ),
  "merge.della": entries.Entry(
    factory="treesurgeon.merge.della:della",
    paper="Deep et al., DELLA-Merging, 2024, arXiv 2406.11617",
    oracle="tests/merge/della_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; "
    "tests/peers/merge_sparse_test.py; on digits better than DARE with TIES in one seed of three",
  ),
  "merge.della_linear": entries.Entry(
    factory="treesurgeon.merge.della:della_linear",
    paper="Deep et al., DELLA-Merging, 2024, arXiv 2406.11617",
    oracle="tests/merge/della_test.py",
    note="equals mergekit 0.1.5 given its masks, rescale='l1'; tests/peers/merge_sparse_test.py",
  ),
  "merge.emr": entries.Entry(
    factory="treesurgeon.merge.emr:emr",
    paper="Huang et al., EMR-Merging, 2024, arXiv 2405.17461",
    oracle="tests/merge/emr_test.py",
    note="serves one donor; rescales by tensor, the paper with granularity='global'",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
  ),
  "merge.fisher": entries.Entry(
    factory="treesurgeon.merge.fisher:fisher",
    paper="Matena and Raffel, Merging models with Fisher-weighted averaging, 2021, "
    "arXiv 2111.09832",
    oracle="tests/merge/fisher_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="empirical Fisher information; exact optimum of quadratic losses; better than an "
    "average on digits and on the language suite in three seeds",
  ),
  "merge.iso_c": entries.Entry(
    factory="treesurgeon.merge.iso_c:iso_c",
    paper="Marczak et al., No task left behind, 2025, arXiv 2502.04959",
    oracle="tests/merge/iso_c_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="equals FusionBench's algorithm in float64 where no direction is null; better than "
    "task arithmetic on digits and on the language suite in three seeds",
  ),
  "merge.iso_cts": entries.Entry(
    factory="treesurgeon.merge.iso_c:iso_cts",
    paper="Marczak et al., No task left behind, 2025, arXiv 2502.04959",
    oracle="tests/merge/iso_c_test.py",
    note="equals FusionBench's algorithm in float64 where no direction is null",
  ),
  "merge.karcher": entries.Entry(
    factory="treesurgeon.merge.karcher:karcher",
    paper="Karcher, Riemannian center of mass and mollifier smoothing, 1977",
    oracle="tests/merge/karcher_test.py",
    note="equals mergekit 0.1.5, reading each model's inner products once; "
    "tests/peers/merge_spheres_test.py",
  ),
  "merge.knots": entries.Entry(
    factory="treesurgeon.merge.knots:knots",
    paper="Stoica et al., Model merging with SVD to tie the knots, 2024, arXiv 2410.19735",
    oracle="tests/merge/knots_test.py",
    note="equals the authors' algorithm by tensor in float64; adapters are decomposed from their "
    "factors",
  ),
  "merge.layer_swap": entries.Entry(
    factory="treesurgeon.merge.layer_swap:layer_swap",
    paper="Bandarkar et al., Layer swapping, 2024, arXiv 2410.01335",
    oracle="tests/merge/layer_swap_test.py",
    note="without transition layers, mergekit's passthrough of three slices",
  ),
  "merge.linear": entries.Entry(
    factory="treesurgeon.merge.linear:linear",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/linear_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_test.py",
  ),
  "merge.magmax": entries.Entry(
    factory="treesurgeon.merge.magmax:magmax",
    paper="Marczak et al., MagMax, 2024, arXiv 2407.06322",
    oracle="tests/merge/magmax_test.py",
    note="the merging step; the sequential fine-tuning before it is the user's",
  ),
  "merge.model_stock": entries.Entry(
    factory="treesurgeon.merge.model_stock:model_stock",
    paper="Jang et al., Model Stock, 2024, arXiv 2403.19522",
    oracle="tests/merge/model_stock_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py; on digits it stays near "
    "the base, behind an average, in three seeds; experts there are of different tasks, the "
    "paper's of one",
  ),
  "merge.multislerp": entries.Entry(
    factory="treesurgeon.merge.multislerp:multislerp",
    paper="Goddard, multislerp, 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    oracle="tests/merge/multislerp_test.py",
    note="equals mergekit 0.1.5, whose tangent step is zero; tests/peers/merge_spheres_test.py",
  ),
  "merge.nearswap": entries.Entry(
    factory="treesurgeon.merge.nearswap:nearswap",
    paper="Alchemonaut, NearSwap, 2024, "
    "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    oracle="tests/merge/nearswap_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.nuslerp": entries.Entry(
    factory="treesurgeon.merge.nuslerp:nuslerp",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/nuslerp_test.py",
    note="equals mergekit 0.1.5 but for opposite vectors; tests/peers/merge_spheres_test.py",
  ),
  "merge.opcm": entries.Entry(
    factory="treesurgeon.merge.opcm:opcm",
    paper="Tang et al., Merging models on the fly without retraining, 2025, arXiv 2501.09522",
    oracle="tests/merge/opcm_test.py",
    note="equals the official loop in float64; memory of one donor however many there are",
  ),
  "merge.optmerge": entries.Entry(
    factory="treesurgeon.merge.optmerge:optmerge",
    paper="Wei et al., OptMerge, 2025, arXiv 2505.19892",
    oracle="tests/merge/optmerge_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="both official scripts, equal in float64: variant='full' and variant='lora'; better "
    "than task arithmetic on digits in three seeds, on the language suite in one of three",
  ),
  "merge.passthrough": entries.Entry(
    factory="treesurgeon.merge.passthrough:passthrough",
    paper="Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257",
    oracle="tests/merge/passthrough_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.pcb": entries.Entry(
    factory="treesurgeon.merge.pcb:pcb",
    paper="Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396",
    oracle="tests/merge/pcb_test.py",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
    note="the authors' formulas and order statistics; theirs takes the model, "
    "granularity='global'; better than TIES on digits in one seed of three, on the language "
    "suite in three",
  ),
  "merge.pleas": entries.Entry(
    factory="treesurgeon.merge.pleas:pleas",
    paper="Nasery et al., PLeaS, 2024, arXiv 2407.02447",
    oracle="tests/merge/pleas_test.py",
    verdict="reproduced",
    command=entries.CONNECTIVITY,
    note="at equal width .978 right on split digits against .946 by matching alone and .571 by "
    "averaging, three seeds; what more width adds is within noise there; closed form, no worse "
    "than descent; ratio 1 is the ensemble of networks without norms exactly",
  ),
  "merge.ram": entries.Entry(
    factory="treesurgeon.merge.ram:ram",
    paper="Reinforced Agent Merging, 2026, arXiv 2601.13572",
    oracle="tests/merge/ram_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.ramplus_tl": entries.Entry(
    factory="treesurgeon.merge.ram:ramplus_tl",
    paper="Reinforced Agent Merging, 2026, arXiv 2601.13572",
    oracle="tests/merge/ram_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.rebasin": entries.Entry(
    factory="treesurgeon.merge.rebasin:rebasin",
    paper="Ainsworth et al., Git Re-Basin, 2022, arXiv 2209.04836",
    oracle="tests/merge/rebasin_test.py",
    verdict="reproduced",
    command=entries.CONNECTIVITY,
    note="barriers fall in three seeds (digits, width 512: 1.0 nats to .3 by weights, .03 by "
    "activations; language models of width 64 from two seeds: 1.8 to 1.6 only); recovers a random "
    "permutation exactly, heads, grouped queries and tied embeddings included",
  ),
  "merge.regmean": entries.Entry(
    factory="treesurgeon.merge.regmean:regmean",
    paper="Jin et al., Dataless knowledge fusion by merging weights of language models, 2022, "
    "arXiv 2212.09849",
    oracle="tests/merge/regmean_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="equals stacked least squares in float64; better than an average on digits and on the "
    "language suite in three seeds",
  ),
  "merge.regmean_pp": entries.Entry(
    factory="treesurgeon.merge.regmean_pp:regmean_pp",
    paper="Nguyen et al., RegMean++, 2025, arXiv 2508.03121",
    oracle="tests/merge/regmean_pp_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="RegMean through the blocks already merged; the blockwise driver makes the "
    "difference; better than RegMean on digits in three seeds, on the language suite in one of "
    "three",
  ),
  "merge.robust_weight_signatures": entries.Entry(
    factory="treesurgeon.merge.robust_weight_signatures:robust_weight_signatures",
    paper="Cai et al., Robust weight signatures, 2023, arXiv 2302.12480",
    oracle="tests/merge/robust_weight_signatures_test.py",
    note="stored, put on and taken off to the bit by merge.weight_patch and merge.patching",
  ),
  "merge.salsa": entries.Entry(
    factory="treesurgeon.merge.salsa:salsa",
    paper="Chegini et al., SALSA: Soup-based alignment learning for stronger adaptation in RLHF, "
    "2024, arXiv 2411.01798",
    oracle="tests/merge/salsa_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.merge_directions --what=salsa --seeds=3",
    note="by DPO on given pairs; with the soup the policy goes further in three seeds, but is no "
    "better: on small sorters DPO itself costs accuracy; train.preferences.ppo is not tried",
  ),
  "merge.sce": entries.Entry(
    factory="treesurgeon.merge.sce:sce",
    paper="Wan et al., FuseChat, 2024, arXiv 2408.07990",
    oracle="tests/merge/sce_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py",
  ),
  "merge.slerp": entries.Entry(
    factory="treesurgeon.merge.slerp:slerp",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    oracle="tests/merge/slerp_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_spheres_test.py; as Lu et al., 2024, arXiv "
    "2409.03444, merge checkpoints of domain adaptation",
  ),
  "merge.soup_greedy": entries.Entry(
    factory="treesurgeon.merge.soups:soup_greedy",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/soups_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="the uniform soup is merge.linear; never worse than its best ingredient on the data; "
    "on digits better than the uniform soup in three seeds; ingredients there are of different "
    "tasks, the paper's of one",
  ),
  "merge.soup_learned": entries.Entry(
    factory="treesurgeon.merge.soups:soup_learned",
    paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482",
    oracle="tests/merge/soups_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="without the paper's temperature; on digits better than the uniform soup in three "
    "seeds; on the language suite in two of three",
  ),
  "merge.sparse_model_soups": entries.Entry(
    factory="treesurgeon.merge.sparse_model_soups:sparse_model_soups",
    paper="Zimmer et al., Sparse model soups, 2023, arXiv 2306.16788",
    oracle="tests/merge/sparse_model_soups_test.py",
    verdict="not reproduced",
    command="python -P -m treesurgeon.experiments.merge_directions --what=sparse_soups --seeds=3",
    note="the soup's zeros are exactly those of the pruned model; rounds of soups beat rounds of "
    "one copy in three seeds, but one soup its mean copy in two only, and a copy trained as long "
    "as all together beats it: at 60 steps retraining is far from done",
  ),
  "merge.tall_masks": entries.Entry(
    factory="treesurgeon.merge.tall_masks:tall_masks",
    paper="Wang et al., Localizing task information, 2024, arXiv 2405.07813",
    oracle="tests/merge/tall_masks_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="serves one donor; merge.task_store keeps all in two models and a bit an entry; near "
    "the expert on digits (.96); .52 of it where experts are far from their base",
  ),
  "merge.task_arithmetic": entries.Entry(
    factory="treesurgeon.merge.task_arithmetic:task_arithmetic",
    paper="Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089",
    oracle="tests/merge/task_arithmetic_test.py",
    note="equals mergekit 0.1.5; tests/peers/merge_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
  ),
  "merge.ties": entries.Entry(
    factory="treesurgeon.merge.ties:ties",
    paper="Yadav et al., TIES-Merging, 2023, arXiv 2306.01708",
    oracle="tests/merge/ties_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="better than an average of four digit experts in three seeds; of two text experts "
    "(experiments.directions) and on the language suite in two seeds of three the average is "
    "better; equals mergekit 0.1.5 by tensor, the paper with granularity='global'",
  ),
  "merge.tsv_merge": entries.Entry(
    factory="treesurgeon.merge.tsv_merge:tsv_merge",
    paper="Gargiulo et al., Task singular vectors, 2024, arXiv 2412.00081",
    oracle="tests/merge/tsv_merge_test.py",
    verdict="reproduced",
    command=entries.MERGE_BENCH,
    note="equals the official algorithm in float64 where no direction is null; better than "
    "task arithmetic on digits in three seeds, worse on the language suite in three",
  ),
  "merge.twin": entries.Entry(
    factory="treesurgeon.merge.twin:twin",
    paper="Lu et al., Twin-Merging, 2024, arXiv 2406.15479",
    oracle="tests/merge/twin_test.py",
    note="the router's weights are given; training a router is not included",
  ),
  "merge.unconstrained": entries.Entry(
    factory="treesurgeon.merge.unconstrained:unconstrained",
    paper="Zhang et al., Unconstrained model merging for enhanced LLM reasoning, 2024, "
    "arXiv 2410.13699",
    oracle="tests/merge/unconstrained_test.py",
    note="the homogeneous half, encoding ours; the heterogeneous half is treesurgeon.merge.fuse",
  ),
  "merge.wise_ft": entries.Entry(
    factory="treesurgeon.merge.wise_ft:wise_ft",
    paper="Wortsman et al., Robust fine-tuning of zero-shot models, 2021, arXiv 2109.01903",
    oracle="tests/merge/wise_ft_test.py",
    note="both ends to the bit; sweeps compile once; also the interpolation of Diversity-rewarded "
    "CFG distillation, arXiv 2410.06084",
  ),
  "merge.wudi": entries.Entry(
    factory="treesurgeon.merge.wudi:wudi",
    paper="Cheng et al., Whoever started the interference should end it, 2025, arXiv 2503.08099",
    oracle="tests/merge/wudi_test.py",
    note="equals the official loop in float64; solver='closed' is its exact minimum",
    verdict="not reproduced",
    command=entries.MERGE_BENCH,
  ),
}
