# SPDX-License-Identifier: Apache-2.0
"""Networks as pure functions of a static description and a tree of leaves."""

from treesurgeon.models.decoder import Output, embed, forward, head
from treesurgeon.models.generation import extend, generate, init_cache
from treesurgeon.models.losses import entropy, nll, predictions
from treesurgeon.models.shapes import addresses, init
from treesurgeon.models.spec import PER_LAYER, Spec
from treesurgeon.models.stack import block
from treesurgeon.models.taps import BLOCK_TAPS, OUTER_TAPS, tap_of

__all__ = [
  "BLOCK_TAPS",
  "OUTER_TAPS",
  "PER_LAYER",
  "Output",
  "Spec",
  "addresses",
  "block",
  "embed",
  "entropy",
  "extend",
  "forward",
  "generate",
  "head",
  "init",
  "init_cache",
  "nll",
  "predictions",
  "tap_of",
]
