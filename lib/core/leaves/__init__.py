# SPDX-License-Identifier: Apache-2.0
"""Compressed leaves: containers that stand where an array stood in a model's parameters.

Each is a pytree node whose arrays may carry leading (layer or expert) axes, so a compressed leaf
survives jit, scan, sharding, checkpointing and depth growth like an array does. The logical value
is always a matrix of shape `(..., rows, cols)`, input dimension first; `dense` computes it. Parts
may be compressed leaves in turn: scales that are quantized, factors that are.
"""

from treesurgeon.core.leaves.base import (
  Compressed,
  Leaf,
  bits_per_weight,
  container,
  dense,
  inner,
  is_leaf,
  map_leaves,
  nbytes,
  signature,
)
from treesurgeon.core.leaves.clustered import ClusteredColumns
from treesurgeon.core.leaves.codebook import Codebook
from treesurgeon.core.leaves.files import TYPES, from_parts, to_parts
from treesurgeon.core.leaves.group_sparse import GroupSparse
from treesurgeon.core.leaves.inputs import ActivationQuantized
from treesurgeon.core.leaves.low_rank import LowRank
from treesurgeon.core.leaves.outlier_victim import OutlierVictim
from treesurgeon.core.leaves.outliers import Outliers
from treesurgeon.core.leaves.quantized import QuantizedTensor
from treesurgeon.core.leaves.rotated import Rotated, keeping_turns
from treesurgeon.core.leaves.signed import SignedLowRank
from treesurgeon.core.leaves.sparse import SparseTensor
from treesurgeon.core.leaves.split_rows import SplitRows
from treesurgeon.core.leaves.summed import Sum

__all__ = [
  "TYPES",
  "ActivationQuantized",
  "ClusteredColumns",
  "Codebook",
  "Compressed",
  "GroupSparse",
  "Leaf",
  "LowRank",
  "OutlierVictim",
  "Outliers",
  "QuantizedTensor",
  "Rotated",
  "SignedLowRank",
  "SparseTensor",
  "SplitRows",
  "Sum",
  "bits_per_weight",
  "container",
  "dense",
  "from_parts",
  "inner",
  "is_leaf",
  "keeping_turns",
  "map_leaves",
  "nbytes",
  "signature",
  "to_parts",
]
