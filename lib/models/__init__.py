# SPDX-License-Identifier: Apache-2.0
"""Networks as pure functions of a static description and a tree of leaves.

Each name is imported when it is first used: who only reads and writes files needs the descriptions,
not the networks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from treesurgeon.models.spec import PER_LAYER, Spec
from treesurgeon.models.vision_spec import VisionSpec

if TYPE_CHECKING:
  from treesurgeon.models.decoder import Output
  from treesurgeon.models.generation import extend, generate, init_cache
  from treesurgeon.models.losses import entropy, inputs, nll, predictions
  from treesurgeon.models.network import addresses, block, embed, forward, head, init
  from treesurgeon.models.taps import BLOCK_TAPS, OUTER_TAPS, tap_of

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

_HOMES = {
  "decoder": ("Output",),
  "generation": ("extend", "generate", "init_cache"),
  "losses": ("entropy", "inputs", "nll", "predictions"),
  "network": ("addresses", "block", "embed", "forward", "head", "init"),
  "taps": ("BLOCK_TAPS", "OUTER_TAPS", "tap_of"),
}


def __getattr__(name: str) -> Any:
  for home, names in _HOMES.items():
    if name in names:
      value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
      globals()[name] = value
      return value
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
