# SPDX-License-Identifier: Apache-2.0
"""Donors that are the base with adapters: their task vectors as factors, without a dense matrix.

An adapted leaf is `Sum((base, LowRank))`. Where its base is the very leaf of the model to be
changed, compressed or not, the adapter is the task vector. Elsewhere a leaf is handed over dense.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves, model, needs, programs, step


def with_adapters(inner: step.Step) -> step.Step:
  """Hand a step its donors' adapters where they have such on the base's own leaf.

  Args:
    inner: a step with the evidence "donors", whose array function takes leaves raw: `LowRank` ones
      are changes of the base's leaf, arrays are what it became.

  Returns:
    The step. At an address all donors come as adapters or all come dense.

  Example:
    >>> from treesurgeon.core import lifting
    >>> merge = lifting.over_leaves(lambda w, donors: changes(w, donors).sum(axis=0), hyper={},
    ...   wants={"donors": needs.Donors()}, raw=True, default=".*")
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 1)))
    >>> m = model.Model(None, {"kernel": jnp.zeros((2, 1))})
    >>> donor = m.update({"kernel": leaves.Sum((m.leaf("kernel"), low))})
    >>> evidence = {"donors": needs.Aligned([donor, donor])}
    >>> with_adapters(merge).apply(m, evidence, jax.random.key(0)).leaf("kernel").tolist()
    [[2.0], [2.0]]
  """

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    return inner.apply(m, {**evidence, "donors": _Adapters(m, evidence["donors"])}, key)

  again: Any = inner.reselect
  return inner._replace(apply=apply, reselect=lambda narrower: with_adapters(again(narrower)))


def factors(
  low: leaves.LowRank, axis: int
) -> tuple[Float[Array, "outputs rank"], Float[Array, "inputs rank"]]:
  """Take an adapter apart, in float32: its matrix of (output, input) is the product out inᵀ.

  Args:
    low: the adapter.
    axis: the axis of its matrix along which one output neuron's weights lie, 0 or -1.

  Returns:
    (out, in); the scale is in the one that was `a`.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> [x.shape for x in factors(low, 0)]
    [(3, 1), (2, 1)]
  """
  a, b = low.scale * low.a.astype(jnp.float32), low.b.astype(jnp.float32)
  return (b.T, a) if axis == 0 else (a, b.T)


def changes(w: Float[Array, "*shape"], donors: tuple[Any, ...]) -> Float[Array, "donors *shape"]:
  """Stack the donors' task vectors, whether these come as adapters or as arrays, in float32.

  Args:
    w: the base's array.
    donors: `LowRank` leaves, which are changes, or arrays, from which the base is subtracted.

  Returns:
    The task vectors, donors first.

  Example:
    >>> changes(jnp.ones(2), (jnp.zeros(2),)).tolist()
    [[-1.0, -1.0]]
  """
  base = w.astype(jnp.float32)
  return jnp.stack(
    [
      leaves.dense(d).astype(jnp.float32)
      if isinstance(d, leaves.LowRank)
      else d.astype(jnp.float32) - base
      for d in donors
    ]
  )


class _Adapters(Mapping[str, tuple[Any, ...]]):
  """Donors' leaves, at each address as adapters on the base's leaf or else dense."""

  def __init__(self, m: model.Model, donors: Mapping[str, Sequence[Any]]):
    self._model, self._donors = m, donors

  def __getitem__(self, address: str) -> tuple[Any, ...]:
    found = self._donors[address]
    low = [_adapter(self._model.leaf(address), d) for d in found]
    if low and all(x is not None for x in low):
      return tuple(low)
    return tuple(leaves.dense(d) for d in found)

  def __iter__(self) -> Iterator[str]:
    return iter(self._donors)

  def __len__(self) -> int:
    return len(self._donors)


def _adapter(w: Any, leaf: Any) -> leaves.LowRank | None:
  """Return a leaf's adapter if all else in it equals the base's leaf."""
  if not isinstance(leaf, leaves.Sum) or len(leaf.parts) != 2:
    return None
  base, low = leaf.parts
  if not isinstance(low, leaves.LowRank) or leaves.signature(base) != leaves.signature(w):
    return None
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((w, base))):
    return low  # a dry run: shapes are the same either way
  return low if programs.compiled(_equal, ())(w, {"base": base}) else None


def _equal(w: Any, base: Any) -> jax.Array:
  same = [(x == y).all() for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(base), strict=True)]
  return jnp.asarray(same).all()
