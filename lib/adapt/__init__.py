# SPDX-License-Identifier: Apache-2.0
"""Adapters: small trainable terms beside frozen weights, made, merged, and exchanged with peft.

`treesurgeon.adapt.lora` and `.merge` are factories of transforms, not the modules of those names.
"""

from treesurgeon.adapt.lora import lora
from treesurgeon.adapt.merge import merge

__all__ = ["lora", "merge"]
