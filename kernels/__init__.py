# SPDX-License-Identifier: Apache-2.0
"""Matrix products over dense and compressed arrays, one folder an operation.

A forward pass calls `kernels.matmul(x, leaf)` and never asks what the leaf is.
"""

from treesurgeon.kernels.matmul.api import matmul as matmul

__all__ = ["matmul"]
