# SPDX-License-Identifier: Apache-2.0
"""Reading and writing models: safetensors directories, orbax checkpoints, tokenizers."""

from treesurgeon.io.checkpoint import Checkpoint
from treesurgeon.io.loading import load
from treesurgeon.io.sink import Sink, save

__all__ = ["Checkpoint", "Sink", "load", "save"]
