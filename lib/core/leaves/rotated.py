# SPDX-License-Identifier: Apache-2.0
"""A kernel whose inputs are turned by a Hadamard matrix when it is multiplied by."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import hadamard
from treesurgeon.core.leaves import base


@base.container(("weight",))
class Rotated(base.Around):
  """Hold a kernel W as Hᵀ W, compressed or not; inputs become x H, so that the product is x W.

  Attributes:
    weight: Hᵀ W, array or compressed leaf; H is `hadamard.matrix` of its rows.
  """

  weight: base.Part

  @classmethod
  def of(cls, w: jax.Array) -> "Rotated":
    """Turn a kernel."""
    return cls(jnp.swapaxes(hadamard.transform(jnp.swapaxes(w, -1, -2)), -1, -2))

  def dense(self) -> jax.Array:
    """Turn the weight back."""
    turned = jnp.swapaxes(base.dense(self.weight), -1, -2)
    return jnp.swapaxes(hadamard.transform(turned, back=True), -1, -2)


def keeping_turns(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Make a function of a leaf change what a `Rotated` holds, and keep its turn.

  Args:
    fn: `fn(w, **hyper)` -> leaf, which reads nothing else of the inputs.

  Returns:
    The function; other leaves go through `fn` as they are.

  Example:
    >>> halve = keeping_turns(lambda w: w / 2)
    >>> halve(Rotated(jnp.ones((2, 1)))).weight.tolist()
    [[0.5], [0.5]]
  """

  @functools.wraps(fn)
  def changed(w: Any, **hyper: Any) -> Any:
    return Rotated(fn(w.weight, **hyper)) if isinstance(w, Rotated) else fn(w, **hyper)

  return changed
