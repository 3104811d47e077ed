# SPDX-License-Identifier: Apache-2.0
"""Training: data, objectives, optimizers and the one loop that every experiment uses."""

from treesurgeon.train.flops import train_flops
from treesurgeon.train.loop import fit
from treesurgeon.train.partition import trainable

__all__ = ["fit", "train_flops", "trainable"]
