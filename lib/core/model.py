# SPDX-License-Identifier: Apache-2.0
"""A model: a static architecture description, a tree of arrays, and its history."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from treesurgeon.core import leaves, paths, pieces
from treesurgeon.core import lineage as lineage_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Hold a network as a value.

  Deliberately not a pytree: lineage must never retrigger a compilation. Pass `params` to jitted
  functions and `spec` as a static argument.

  Attributes:
    spec: frozen, hashable architecture description (`models.Spec`).
    params: nested dict of arrays and compressed leaves, see `core.paths`.
    lineage: what was done to the model, oldest first.
    aux: by-products a later step reads or carries along: masks, statistics, and under
      "optimizer" an optax state, which growth transforms together with the parameters.
  """

  spec: Any
  params: Mapping[str, Any]
  lineage: tuple[lineage_lib.Record, ...] = ()
  aux: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def replace(self, **changes: Any) -> "Model":
    """Return a copy with some fields replaced."""
    return dataclasses.replace(self, **changes)

  def update(self, changes: Mapping[str, Any]) -> "Model":
    """Return a copy with some leaves replaced, by address."""
    return self.replace(params=paths.update(self.params, changes)) if changes else self

  def addresses(self) -> list[str]:
    """List every leaf's address."""
    return paths.addresses(self.params)

  def leaf(self, address: str) -> Any:
    """Fetch one leaf by address."""
    return paths.get(self.params, address)

  def struct(self, address: str) -> Any:
    """Describe one leaf's shapes and dtypes, without cutting it out of its stack."""
    return paths.get(jax.tree.map(_struct, self.params), address)

  def nbytes(self) -> int:
    """Count the bytes of all parameters as held, compressed leaves compressed."""
    return sum(leaves.nbytes(x) for x in paths.walk(self.params).values())

  def size(self) -> int:
    """Count the logical parameters."""
    return sum(x.size for x in paths.walk(self.params).values())


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Model):
  """Hold some of a model's leaves by address, as drivers hand them to a step.

  `params` is a flat mapping from address to leaf, so that a driver can pass one leaf or one block
  without stacking and unstacking it. A part never holds some but not all addresses of one of the
  step's units.

  Attributes:
    late: whether what is changed may be left to be computed when it is written: `params` then may
      hold `core.pieces.Pieces`, which `leaf` puts together.
  """

  late: bool = False

  def addresses(self) -> list[str]:
    """List the addresses held."""
    return list(self.params)

  def leaf(self, address: str) -> Any:
    """Fetch one leaf by address."""
    if address not in self.params:
      raise ValueError(f"{address} is not in this part of the model: {', '.join(self.params)}")
    found = self.params[address]
    return np.asarray(found) if isinstance(found, pieces.Pieces) else found

  def struct(self, address: str) -> Any:
    """Describe one leaf's shapes and dtypes."""
    return jax.tree.map(_struct, self.leaf(address))

  def update(self, changes: Mapping[str, Any]) -> "Part":
    """Return a copy with some leaves replaced, by address."""
    for address in changes:
      self.leaf(address)  # raises for an address the part does not hold
    return self.replace(params={**self.params, **changes})

  def replace(self, **changes: Any) -> "Part":
    """Return a copy with some fields replaced."""
    return dataclasses.replace(self, **changes)


def load(source: Any) -> Model:
  """Read a model into memory.

  Args:
    source: any source of leaves (`needs.Source`).

  Returns:
    The model; itself if it is one.

  Example:
    >>> m = Model(None, {"w": np.zeros(2)})
    >>> load(m) is m
    True
  """
  if isinstance(source, Model):
    return source
  flat = {a: source.leaf(a) for a in source.addresses()}
  return Model(source.spec, paths.unflatten(flat))


def _struct(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)
