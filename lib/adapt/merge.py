# SPDX-License-Identifier: Apache-2.0
"""Merge: fold adapters into the weights, so that the network is an ordinary one again.

Hu et al., 2021, arXiv:2106.09685, section 4.1: no latency is added at inference. The sum is the one
that the forward pass computes (`leaves.dense`), taken once: float32, rounded to the storage dtype.
A merge into a quantized base would either lose the adapter in a requantization or lose the
quantization, so it is refused unless the latter is asked for.
"""

import re
from typing import Any

import jax

from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, lifting, model, needs, step

WHERE = r"(?:.*/)?(?:kernel|embedding)"


@step.method("adapt.merge")
def merge(*, select: str | None = None, dense: bool = False) -> step.Step:
  """Fold adapters into the weights they stand beside.

  Stacked adapters are folded together; leaves without adapters are left as they are. Neutral
  point: a model without adapters.

  Args:
    select: regular expression over addresses; by default every kernel and embedding.
    dense: make a compressed base dense; otherwise it is refused.

  Returns:
    The transform.

  Raises:
    ValueError: when applied to a compressed base without `dense`.

  Example:
    >>> merge()
    (adapt.merge(),)

  Reference:
    Hu et al., 2021, arXiv:2106.09685.
  """
  if not dense:
    return _guarded(select)
  return lifting.over_leaves(fold, hyper={}, select=select, default=WHERE, domain=WHERE, raw=True)


def fold(w: Any) -> Any:
  """Fold a leaf's adapters into its base.

  Args:
    w: array or compressed leaf.

  Returns:
    An array of the base's dtype; a leaf without adapters as it is.

  Example:
    >>> import jax.numpy as jnp
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), scale=0.5)
    >>> fold(leaves.Sum((jnp.ones((2, 2)), low))).tolist()
    [[1.5, 1.5], [1.5, 1.5]]
  """
  return w if adapters.split(w).adapter is None else leaves.dense(w)


def root(w: Any) -> Any:
  """Take every adapter off a leaf.

  Args:
    w: array or compressed leaf.

  Returns:
    What lies below the adapters.

  Example:
    >>> import jax.numpy as jnp
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> root(leaves.Sum((jnp.ones((2, 2)), low, low))).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
  """
  while (taken := adapters.split(w)).adapter is not None:
    w = taken.base
  return w


def _guarded(select: str | None) -> step.Step:
  """Look at every base before anything is folded, where the addresses are known."""
  inner = lifting.over_leaves(fold, hyper={}, select=select, default=WHERE, domain=WHERE, raw=True)

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    for address in m.addresses():
      if re.fullmatch(select or WHERE, address) and re.fullmatch(WHERE, address):
        _refuse_compressed(address, m.leaf(address))
    return inner.apply(m, evidence, key)

  def reselect(narrower: str) -> step.Step:
    return _guarded(narrower if select is None else rf"(?=(?:{select})\Z)(?:{narrower})")

  return inner._replace(apply=apply, reselect=reselect)


def _refuse_compressed(address: str, leaf: Any) -> None:
  base = root(leaf)
  if base is not leaf and leaves.is_leaf(base):
    raise ValueError(
      f"{address}: adapt.merge cannot fold an adapter into a {type(base).__name__} without "
      "quantizing it anew; merge(dense=True) makes it dense, and a compressing transform can follow"
    )
