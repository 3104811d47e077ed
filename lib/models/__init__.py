# SPDX-License-Identifier: Apache-2.0
"""Networks as pure functions of a static description and a tree of leaves."""

from treesurgeon.models.decoder import Output
from treesurgeon.models.generation import extend, generate, init_cache
from treesurgeon.models.losses import entropy, inputs, nll, predictions
from treesurgeon.models.network import addresses, block, embed, forward, head, init
from treesurgeon.models.spec import PER_LAYER, Spec
from treesurgeon.models.taps import BLOCK_TAPS, OUTER_TAPS, tap_of
from treesurgeon.models.vision_spec import VisionSpec

__all__ = [
  "BLOCK_TAPS",
  "OUTER_TAPS",
  "PER_LAYER",
  "Output",
  "Spec",
  "VisionSpec",
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
  "inputs",
  "nll",
  "predictions",
  "tap_of",
]
