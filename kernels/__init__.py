# SPDX-License-Identifier: Apache-2.0
"""Matrix products over dense and compressed arrays, one folder an operation.

A forward pass calls `kernels.matmul(x, leaf)` and never asks what the leaf is. On a TPU
`kernels.prepare(params)` first arranges quantized kernels as the device reads them.
"""

from treesurgeon.kernels.matmul.api import matmul as matmul
from treesurgeon.kernels.matmul.arrange import prepare as prepare
from treesurgeon.kernels.matmul.arrange import restore as restore
from treesurgeon.kernels.matmul.shards import split as split
from treesurgeon.kernels.matmul.stacked import hold as hold
from treesurgeon.kernels.matmul.stacked import in_place as in_place

__all__ = ["hold", "in_place", "matmul", "prepare", "restore", "split"]
