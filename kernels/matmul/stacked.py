# SPDX-License-Identifier: Apache-2.0
"""One layer of stacked prepared matrices, which a kernel reads where it lies.

Layers are stacked and scanned over, and a scan slices each layer's arrays out: a copy of the packed
codes, which are then read and written once more than the product needs. `hold` keeps prepared
matrices out of what is scanned, and `in_place` hands a layer the whole stack and its index, by
which the kernel's transfers are addressed.
"""

from typing import Any

import jax
import numpy as np

from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import fitted, prepared


@base.container(("stack", "index"))
class LayerOf(base.Compressed):
  """Stand for one matrix of a stack.

  Attributes:
    stack: a PreparedTensor with one leading axis.
    index: which of it, int32.
  """

  stack: base.Part
  index: base.Part

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.stack.rows

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.stack.cols

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix: none."""
    return ()

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.stack.dtype

  def take(self) -> prepared.PreparedTensor:
    """Slice the matrix out."""
    at = lambda a: jax.lax.dynamic_index_in_dim(a, self.index, keepdims=False)
    return jax.tree.map(at, self.stack)

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    return self.take().dense()


def hold(stacked: Any) -> Any:
  """Take out of stacked layers what a kernel reads in place.

  Args:
    stacked: tree of leaves with a leading axis of layers.

  Returns:
    The tree without its prepared matrices, to scan over.

  Example:
    >>> hold({"w": 1})
    {'w': 1}
  """
  return jax.tree.map(lambda n: None if _held(n) else n, stacked, is_leaf=_held)


def in_place(stacked: Any, rest: Any, index: jax.Array) -> Any:
  """Complete one layer by the matrices that `hold` took out.

  Args:
    stacked: the tree given to `hold`.
    rest: one layer of what it returned.
    index: of the layer in the stack.

  Returns:
    The layer's leaves.

  Example:
    >>> in_place({"w": 1}, {"w": 2}, jax.numpy.asarray(0))
    {'w': 2}
  """
  one = lambda node, sliced: LayerOf(node, index) if _held(node) else sliced
  return jax.tree.map(one, stacked, rest, is_leaf=_held)


def matrix(leaf: Any) -> Any:
  """Return what says how a leaf is arranged: of a layer the stack.

  Args:
    leaf: PreparedTensor or LayerOf, or one that was fitted to a kernel.

  Returns:
    The PreparedTensor.

  Example:
    >>> matrix(3)
    3
  """
  leaf = leaf.matrix if isinstance(leaf, fitted.FittedTensor) else leaf
  return leaf.stack if isinstance(leaf, LayerOf) else leaf


def _held(node: Any) -> bool:
  # Experts' matrices have a second leading axis, over which a product is mapped: they are sliced.
  return isinstance(node, prepared.PreparedTensor) and len(node.batch) == 1
