# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics as commuting folds.

A fold has an initial state, an update by one batch of input vectors, and a merge of two states
that is commutative and associative. So batches may come in any order, be split over devices or
hosts, and be merged later. All states are float32; sums, not means, so that merging is addition.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Part = Any  # an array; a shape while a transform is only planned


class Fold(NamedTuple):
  """How to gather a statistic of a linear layer's inputs.

  Attributes:
    init: number of input features -> empty state.
    update: (state, inputs (tokens, features)) -> state.
    merge: (state, state) -> state.
  """

  init: Callable[[int], Any]
  update: Callable[[Any, Float[Array, "tokens features"]], Any]
  merge: Callable[[Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecondMoment:
  """Uncentred second moment of inputs, as a sum.

  Attributes:
    moment: sum over tokens of x xᵀ, (features, features).
    count: number of tokens.
  """

  moment: Part
  count: Part

  def mean(self) -> Float[Array, "n n"]:
    """Divide by the number of tokens."""
    return self.moment / self.count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerFeature:
  """One number an input feature: a sum of squares, a sum of magnitudes, or a maximum.

  Attributes:
    value: (features,).
    count: number of tokens.
  """

  value: Part
  count: Part

  def mean(self) -> Float[Array, " n"]:
    """Divide by the number of tokens; for sums."""
    return self.value / self.count


def _tokens(x: jax.Array) -> jax.Array:
  return jnp.full((), x.shape[0], jnp.float32)


def _add_moment(s: SecondMoment, x: jax.Array) -> SecondMoment:
  x = x.astype(jnp.float32)
  return SecondMoment(s.moment + jnp.matmul(x.T, x, precision="highest"), s.count + _tokens(x))


def _add_squares(s: PerFeature, x: jax.Array) -> PerFeature:
  return PerFeature(
    s.value + jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0), s.count + _tokens(x)
  )


def _add_magnitudes(s: PerFeature, x: jax.Array) -> PerFeature:
  return PerFeature(s.value + jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=0), s.count + _tokens(x))


def _raise_maximum(s: PerFeature, x: jax.Array) -> PerFeature:
  top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=0)
  return PerFeature(jnp.maximum(s.value, top), s.count + _tokens(x))


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _max(a: PerFeature, b: PerFeature) -> PerFeature:
  return PerFeature(jnp.maximum(a.value, b.value), a.count + b.count)


def _square(n: int) -> SecondMoment:
  return SecondMoment(jnp.zeros((n, n), jnp.float32), jnp.zeros((), jnp.float32))


def _vector(n: int) -> PerFeature:
  return PerFeature(jnp.zeros(n, jnp.float32), jnp.zeros((), jnp.float32))


FOLDS: dict[str, Fold] = {
  "second_moment": Fold(_square, _add_moment, _add),
  "sum_squares": Fold(_vector, _add_squares, _add),
  "sum_magnitudes": Fold(_vector, _add_magnitudes, _add),
  "absmax": Fold(_vector, _raise_maximum, _max),
}
