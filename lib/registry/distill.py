# SPDX-License-Identifier: Apache-2.0
"""Methods that train a small model beside a large one. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "compress.distill.logits": entries.Entry(
    factory="treesurgeon.compress.distill.logits:logits",
    paper="Hinton et al., Distilling the knowledge in a neural network, 2015, arXiv 1503.02531",
    oracle="tests/compress/distill/logits_test.py",
    verdict="not reproduced",
    command=entries.STRUCTURE,
    note="worse than training on labels for as long, by 0.02 nats in three seeds; the loss of "
    "Minitron's retraining; a constant rate, schedules are the training loop's",
  ),
}
