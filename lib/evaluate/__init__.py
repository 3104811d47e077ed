# SPDX-License-Identifier: Apache-2.0
"""What a model is worth: likelihood of text, size, and how sure one may be of a difference."""

from treesurgeon.evaluate.bootstrap import Interval, interval, paired_difference
from treesurgeon.evaluate.perplexity import Perplexity, evaluate
from treesurgeon.evaluate.size import Size, in_memory, on_disk

__all__ = [
  "Interval",
  "Perplexity",
  "Size",
  "evaluate",
  "in_memory",
  "interval",
  "on_disk",
  "paired_difference",
]
