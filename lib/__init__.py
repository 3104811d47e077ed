# SPDX-License-Identifier: Apache-2.0
"""Compress, grow, merge and edit trained networks: pure functions from a model to a model.

The names most sessions start with are here; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from treesurgeon.core.model import Model as Model
  from treesurgeon.core.step import by_path as by_path
  from treesurgeon.core.step import chain as chain
  from treesurgeon.io.checkpoint import Checkpoint as Checkpoint
  from treesurgeon.io.loading import load as load
  from treesurgeon.io.sink import save as save
  from treesurgeon.registry import parse as parse
  from treesurgeon.run.auto import apply as apply

__version__ = "0.1.0"

_HOMES = {
  "Checkpoint": "io.checkpoint",
  "Model": "core.model",
  "apply": "run.auto",
  "by_path": "core.step",
  "chain": "core.step",
  "load": "io.loading",
  "parse": "registry",
  "save": "io.sink",
}


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
