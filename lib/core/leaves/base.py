# SPDX-License-Identifier: Apache-2.0
"""What every compressed leaf is: a pytree node that answers for the matrix it stands for."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# A field that holds an array. Not annotated as one: jax rebuilds containers around whatever a tree
# map returned (shapes, shardings, names), and tests check annotations at run time.
Part = Any
T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def container(data: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
  """Register a frozen dataclass as a pytree whose `data` fields are children, the rest static.

  Args:
    data: names of the fields that hold arrays or leaves.

  Returns:
    A class decorator.

  Example:
    >>> @container(("x",))
    ... class Wrapped(Compressed):
    ...   x: Part
    >>> jax.tree.leaves(Wrapped(3))
    [3]
  """

  def register(cls: type[T]) -> type[T]:
    cls = dataclasses.dataclass(frozen=True)(cls)
    meta = tuple(f.name for f in dataclasses.fields(cls) if f.name not in data)  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

  return register


class Compressed:
  """What every compressed leaf answers: its logical shape and dtype, and its dense value."""

  rows: int
  cols: int

  def dense(self) -> jax.Array:
    """Compute the matrix that this leaf stands for, in its storage dtype."""
    raise TypeError(f"{type(self).__name__} does not say how to become dense")

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    first = jax.tree.leaves(self)[0]
    return tuple(first.shape[:-2])

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, `(..., rows, cols)`."""
    return (*self.batch, self.rows, self.cols)

  @property
  def ndim(self) -> int:
    """Number of logical axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of logical weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes actually held, all parts counted."""
    return sum(nbytes(x) for x in jax.tree.leaves(self))


class Around(Compressed):
  """A leaf that holds one kernel and has its shape and dtype, but does something to its inputs."""

  weight: Part

  @property
  def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Input dimension."""
    return self.weight.shape[-2]

  @property
  def cols(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Output dimension."""
    return self.weight.shape[-1]

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes before the matrix."""
    return tuple(self.weight.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return self.weight.dtype


Leaf = Any  # jax.Array | np.ndarray | Compressed; jax accepts the three alike


def is_leaf(node: object) -> bool:
  """Tell whether a node is a compressed leaf; the `is_leaf` of every tree walk here.

  Args:
    node: anything.

  Returns:
    True for a compressed container.

  Example:
    >>> is_leaf(jnp.zeros(2))
    False
  """
  return isinstance(node, Compressed)


def dense(leaf: Leaf) -> Any:
  """Return the array a leaf stands for; arrays pass through.

  Args:
    leaf: array or compressed leaf.

  Returns:
    An array of the leaf's logical shape and dtype.

  Example:
    >>> dense(jnp.ones(2)).tolist()
    [1.0, 1.0]
  """
  return leaf.dense() if isinstance(leaf, Compressed) else leaf


def nbytes(leaf: Leaf) -> int:
  """Count the bytes a leaf holds; int4 and int2 count as packed.

  Args:
    leaf: array, shape struct, or compressed leaf.

  Returns:
    Bytes in memory and, within a header's breadth, on disk.

  Example:
    >>> nbytes(jnp.zeros((2, 3), jnp.bfloat16))
    12
  """
  if isinstance(leaf, Compressed):
    return leaf.nbytes
  dtype = jnp.dtype(leaf.dtype)
  width = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8
  return -(-math.prod(leaf.shape) * width // 8)


def bits_per_weight(leaf: Leaf) -> float:
  """Compute the mean bits one logical weight costs, scales and indices included.

  Args:
    leaf: array or compressed leaf.

  Returns:
    Bits per weight.

  Example:
    >>> bits_per_weight(jnp.zeros((4, 4), jnp.bfloat16))
    16.0
  """
  return nbytes(leaf) * 8 / max(1, math.prod(leaf.shape))


def signature(leaf: Leaf) -> tuple:
  """Describe what must agree for two layers' leaves to be stacked into one segment.

  Args:
    leaf: array, tracer, shape struct, or compressed leaf.

  Returns:
    A hashable value: the tree structure and each array's shape and dtype.

  Example:
    >>> signature(jnp.zeros(3)) == signature(jnp.ones(3))
    True
  """
  arrays, structure = jax.tree.flatten(leaf)
  return structure, tuple((tuple(a.shape), jnp.dtype(a.dtype).name) for a in arrays)


def inner(leaf: Leaf) -> Leaf:
  """Return the kernel that leaves around it hold: what is rounded once, and not in every pass.

  Args:
    leaf: array or compressed leaf.

  Returns:
    The first leaf within that is not an `Around`; itself if it is none.

  Example:
    >>> inner(jnp.ones(2)).tolist()
    [1.0, 1.0]
  """
  while isinstance(leaf, Around):
    leaf = leaf.weight
  return leaf


map_leaves = functools.partial(jax.tree.map, is_leaf=is_leaf)
