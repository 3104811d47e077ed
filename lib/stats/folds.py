# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics as commuting folds.

A fold has an initial state, an update by one batch of input vectors, and a merge of two states
that is commutative and associative. So batches may come in any order, be split over devices or
hosts, and be merged later. All states are float32; sums, not means, so that merging is addition.

Every token has a number, its place in the whole data. A negative one leaves the token out, as
padding; else only "samples" looks at it, to draw the same tokens however the data are split.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from treesurgeon.core import hadamard, linalg

SAMPLES = 512  # input vectors that "samples" keeps

Part = Any  # an array; a shape while a transform is only planned


class Fold(NamedTuple):
  """How to gather a statistic of a linear layer's inputs.

  Attributes:
    init: number of input features -> empty state.
    update: (state, inputs (tokens, features), numbers of the tokens) -> state; without numbers they
      count from 0.
    merge: (state, state) -> state.
  """

  init: Callable[[int], Any]
  update: Callable[..., Any]
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
    """Divide by the number of tokens; zeros where there were none."""
    return self.moment / jnp.maximum(self.count, 1)

  def turned(self) -> "SecondMoment":
    """Return what it is of inputs turned as `leaves.Rotated` turns them."""
    half = hadamard.transform(self.moment)
    return SecondMoment(hadamard.transform(jnp.swapaxes(half, -1, -2)), self.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerFeature:
  """One number an input feature: a sum of values, magnitudes or squares, or a maximum.

  Attributes:
    value: (features,).
    count: number of tokens.
  """

  value: Part
  count: Part

  def mean(self) -> Float[Array, " n"]:
    """Divide by the number of tokens; for sums. Zeros where there were none."""
    return self.value / jnp.maximum(self.count, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Range:
  """The range of every input feature, with its signs.

  Attributes:
    low: lowest value, (features,); +inf before any token.
    high: highest; -inf before any token.
    count: number of tokens.
  """

  low: Part
  high: Part
  count: Part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """Some whole input vectors, drawn evenly over all tokens.

  Attributes:
    rows: (SAMPLES, features); zeros where there were fewer tokens.
    ranks: what each was drawn by, ascending; the largest uint32 marks an empty row.
    count: number of tokens seen.
  """

  rows: Part
  ranks: Part
  count: Part

  def weights(self) -> Float[Array, " samples"]:
    """Return 1 for every row that holds a token, 0 for the others."""
    return (self.ranks != _EMPTY).astype(jnp.float32)


_EMPTY = np.uint32(0xFFFFFFFF)


def _ready(x: jax.Array, numbers: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the inputs in float32, which of them count, and how many do."""
  x = x.astype(jnp.float32)
  if numbers is None:
    return x, jnp.ones((x.shape[0], 1), bool), jnp.full((), x.shape[0], jnp.float32)
  keep = numbers >= 0
  return x, keep[:, None], keep.sum().astype(jnp.float32)


def _add_moment(s: SecondMoment, x: jax.Array, numbers: Any = None) -> SecondMoment:
  x, keep, count = _ready(x, numbers)
  x = jnp.where(keep, x, 0)
  return SecondMoment(s.moment + linalg.gram(x), s.count + count)


def _adding(of: Callable[[jax.Array], jax.Array]) -> Callable[..., PerFeature]:
  def add(s: PerFeature, x: jax.Array, numbers: Any = None) -> PerFeature:
    x, keep, count = _ready(x, numbers)
    return PerFeature(s.value + jnp.sum(jnp.where(keep, of(x), 0), axis=0), s.count + count)

  return add


def _raise_maximum(s: PerFeature, x: jax.Array, numbers: Any = None) -> PerFeature:
  x, keep, count = _ready(x, numbers)
  top = jnp.max(jnp.where(keep, jnp.abs(x), 0), axis=0)
  return PerFeature(jnp.maximum(s.value, top), s.count + count)


def _widen(s: Range, x: jax.Array, numbers: Any = None) -> Range:
  x, keep, count = _ready(x, numbers)
  low, high = (jnp.where(keep, x, end) for end in (jnp.inf, -jnp.inf))
  return Range(
    jnp.minimum(s.low, low.min(axis=0)), jnp.maximum(s.high, high.max(axis=0)), s.count + count
  )


def _draw(s: Samples, x: jax.Array, numbers: Any = None) -> Samples:
  x, keep, count = _ready(x, numbers)
  numbers = jnp.arange(x.shape[0], dtype=jnp.int32) if numbers is None else numbers
  ranks = jnp.where(keep[:, 0], _mixed(numbers), _EMPTY)
  return _lowest(s, Samples(x, ranks, count))


def _lowest(a: Samples, b: Samples) -> Samples:
  """Keep the rows of lowest rank; no two tokens have the same."""
  ranks = jnp.concatenate([a.ranks, b.ranks])
  first = jnp.argsort(ranks, stable=True)[: len(a.ranks)]
  rows = jnp.concatenate([a.rows, b.rows])[first]
  kept = (ranks[first] != _EMPTY)[:, None]
  return Samples(jnp.where(kept, rows, 0), ranks[first], a.count + b.count)


def _mixed(numbers: Int32[Array, " n"]) -> UInt32[Array, " n"]:
  """Mix the bits of numbers, one to one (the finalizer of MurmurHash3, public domain)."""
  h = numbers.astype(jnp.uint32)
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _max(a: PerFeature, b: PerFeature) -> PerFeature:
  return PerFeature(jnp.maximum(a.value, b.value), a.count + b.count)


def _union(a: Range, b: Range) -> Range:
  return Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high), a.count + b.count)


def _square(n: int) -> SecondMoment:
  return SecondMoment(jnp.zeros((n, n), jnp.float32), jnp.zeros((), jnp.float32))


def _vector(n: int) -> PerFeature:
  return PerFeature(jnp.zeros(n, jnp.float32), jnp.zeros((), jnp.float32))


def _no_range(n: int) -> Range:
  return Range(
    jnp.full(n, jnp.inf, jnp.float32),
    jnp.full(n, -jnp.inf, jnp.float32),
    jnp.zeros((), jnp.float32),
  )


def _no_samples(n: int) -> Samples:
  return Samples(
    jnp.zeros((SAMPLES, n), jnp.float32),
    jnp.full(SAMPLES, _EMPTY, jnp.uint32),
    jnp.zeros((), jnp.float32),
  )


FOLDS: dict[str, Fold] = {
  "second_moment": Fold(_square, _add_moment, _add),
  "sum": Fold(_vector, _adding(lambda x: x), _add),
  "sum_squares": Fold(_vector, _adding(jnp.square), _add),
  "sum_magnitudes": Fold(_vector, _adding(jnp.abs), _add),
  "absmax": Fold(_vector, _raise_maximum, _max),
  "range": Fold(_no_range, _widen, _union),
  "samples": Fold(_no_samples, _draw, _lowest),
}
