# SPDX-License-Identifier: Apache-2.0
"""Low-rank terms beside compressed kernels: what the methods that compensate an error share.

They stand behind any compression, of any kind, and compare with the original: a donor. The original
is a model by name, or the one donor handed to the driver. What is added becomes a part of a `Sum`,
so a compressed model runs as it did, and two thin products more.
"""

from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import leaves, needs


def want(original: str | None) -> needs.Donors:
  """Ask for the model as it was.

  Args:
    original: its name, or None for the donor handed to the driver.

  Returns:
    The need.

  Example:
    >>> want("big").models
    ('big',)
  """
  return needs.Donors((original,) if original else ())


def one_donor(count: int, **unused: Any) -> None:
  """Refuse anything but one original.

  Args:
    count: how many donors were handed over.
    **unused: a method's hyper-parameters.

  Raises:
    ValueError: telling how many there are.

  Example:
    >>> one_donor(1)
  """
  del unused
  if count != 1:
    raise ValueError(f"an error is made up for against one original model; {count} were given")


def error(w: Any, original: tuple[Any, ...]) -> jax.Array:
  """Compute what compression lost.

  Args:
    w: the leaf as it is.
    original: the leaf as it was, alone in a tuple.

  Returns:
    The difference in float32.

  Example:
    >>> error(jnp.ones((1, 1)), (jnp.full((1, 1), 3.0),)).item()
    2.0
  """
  before, after = (leaves.dense(x).astype(jnp.float32) for x in (original[0], w))
  return before - after


def put(w: Any, term: leaves.LowRank) -> leaves.Sum:
  """Add a term to a leaf.

  Args:
    w: array or compressed leaf.
    term: the factors.

  Returns:
    Their sum; the parts of a sum stay parts.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> len(put(put(jnp.zeros((2, 2)), low), low).parts)
    3
  """
  return leaves.Sum((*(w.parts if isinstance(w, leaves.Sum) else (w,)), term))
