# SPDX-License-Identifier: Apache-2.0
"""Methods that adapt: adapters put on and merged away. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "adapt.lora": entries.Entry(
    factory="treesurgeon.adapt.lora:lora",
    paper="Hu et al., LoRA: Low-rank adaptation of large language models, 2021, arXiv 2106.09685",
    oracle="tests/adapt/lora_test.py",
    note="adapters cross to and from peft with equal logits, tests/peers/peft_test.py; at full "
    "fine-tuning's learning rate rank 8 gains less of the new text and loses less of the other",
  ),
  "adapt.merge": entries.Entry(
    factory="treesurgeon.adapt.merge:merge",
    paper="Hu et al., LoRA: Low-rank adaptation of large language models, 2021, arXiv 2106.09685",
    oracle="tests/adapt/merge_test.py",
    note="section 4.1; weights agree with peft's merge_and_unload, tests/peers/peft_test.py",
  ),
}
