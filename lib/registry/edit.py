# SPDX-License-Identifier: Apache-2.0
"""Methods that edit: facts rewritten, abilities unlearned. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "edit.rome": entries.Entry(
    factory="treesurgeon.edit.rome:rome",
    paper="Meng et al., Locating and editing factual associations in GPT, 2022, arXiv 2202.05262",
    oracle="tests/edit/rome_test.py",
    verdict="reproduced",
    command="python -P -m treesurgeon.experiments.train_facts --config=configs/facts.py:quick",
    note="ES 1.00, PS .99, NS 1.00 (C = I: NS .63, fine-tuning: .29; 3 seeds, 24 edits); of other "
    "facts about the edited subject 81 % are lost, which these scores do not show",
  ),
  "edit.unlearn.task_negation": entries.Entry(
    factory="treesurgeon.edit.unlearn.task_negation:task_negation",
    paper="Ilharco et al., Editing models with task arithmetic, 2022, arXiv 2212.04089",
    oracle="tests/edit/unlearn/task_negation_test.py",
    verdict="not reproduced",
    command=entries.DIRECTIONS,
    note="section 3, forgetting via negation: it forgets, but at scale 1 the other text suffers as "
    "much, the two being near",
  ),
}
