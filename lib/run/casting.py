# SPDX-License-Identifier: Apache-2.0
"""Change the floating-point dtype of leaves on their way in or out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import leaves, needs
from treesurgeon.run import drivers


class Cast:
  """A source whose floating-point arrays come in another dtype.

  Compressed leaves come as they are; integer arrays too.

  Args:
    source: the model to read.
    dtype: dtype's name; None changes nothing.
  """

  def __init__(self, source: needs.Source, dtype: str | None):
    self._source, self._dtype = source, dtype

  @property
  def spec(self) -> Any:
    """Architecture description."""
    return self._source.spec

  def addresses(self) -> Sequence[str]:
    """List the addresses of every leaf."""
    return self._source.addresses()

  def leaf(self, address: str) -> Any:
    """Read one leaf in the wanted dtype."""
    return cast(self._source.leaf(address), self._dtype)

  def struct(self, address: str) -> Any:
    """Describe one leaf's shapes and dtypes."""
    return jax.eval_shape(lambda x: cast(x, self._dtype), self._source.struct(address))


class CastSink:
  """A sink that changes the dtype of floating-point arrays before they are written.

  Args:
    sink: where leaves go.
    dtype: dtype's name; None changes nothing.
  """

  def __init__(self, sink: drivers.Sink, dtype: str | None):
    self._sink, self._dtype = sink, dtype
    self.pieces = getattr(sink, "pieces", False)

  def done(self, address: str) -> bool:
    """Tell whether the leaf has been written already."""
    return self._sink.done(address)

  def write(self, address: str, leaf: Any) -> None:
    """Write one leaf."""
    self._sink.write(address, cast(leaf, self._dtype))


def cast(leaf: Any, dtype: str | None) -> Any:
  """Cast a floating-point array; anything else passes.

  Args:
    leaf: array or compressed leaf.
    dtype: dtype's name, or None.

  Returns:
    The leaf.

  Example:
    >>> cast(jnp.ones(2), "bfloat16").dtype.name
    'bfloat16'
  """
  if dtype is None or leaves.is_leaf(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  return leaf if leaf.dtype == jnp.dtype(dtype) else jax.numpy.asarray(leaf).astype(dtype)
