# SPDX-License-Identifier: Apache-2.0
"""Pair the units of two networks, and tell the pairs that match from those that do not."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import numpy as np

from treesurgeon.core import paths, varied
from treesurgeon.merge import (
  activation_matching,
  alignment,
  matching,
  permutations,
  units,
  widening,
)

Method = Literal["activation", "weight"]
Flat = Mapping[str, Any]


class Pairing(NamedTuple):
  """How two networks' units go together.

  Attributes:
    index: puts the second network's units in the first's order.
    picks: group's name to (pairs that become one unit, pairs that stay apart).
  """

  index: Any
  picks: Any


def pair(
  spec: Any, a: Flat, b: Flat, batches: Any, *, rng: np.random.Generator, method: Method,
  residual: bool, ratio: varied.Varied,
) -> Pairing:  # fmt: skip
  """Pair units by matching, and keep the pairs of the lowest scores apart.

  Args:
    spec: architecture.
    a: address to array, all leaves of the first network.
    b: of the second.
    batches: for "activation".
    rng: of the groups' order in weight matching.
    method: "activation" or "weight"; the score is the correlation or the inner product.
    residual: whether channels of the residual stream may move.
    ratio: share of pairs that stay apart.

  Returns:
    The pairing.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> flat, rng = paths.flatten(models.init(spec, jax.random.key(0))), np.random.default_rng(0)
    >>> how = {"method": "weight", "residual": True, "ratio": 0.5}
    >>> [len(x) for x in pair(spec, flat, flat, (), rng=rng, **how).picks["layers/0/mlp"]]
    [4, 4]
  """
  (found,) = alignment.align(spec, a, [b], batches, rng=rng, method=method, residual=residual)
  moved = units.apply({n: np.asarray(x) for n, x in b.items()}, found.index)
  groups = widening.widenable(spec, residual=residual)
  fixed = {n: np.asarray(x) for n, x in a.items()}
  if method == "activation":
    scores = _correlated(spec, groups, fixed, moved, batches, residual)
  else:
    scores = {g.name: np.diagonal(matching.similarity(g, fixed, moved)) for g in groups}
  counts = {g.name: widening.separate(g.size, varied.at(ratio, g.name)) for g in groups}
  return Pairing(found.index, {n: widening.choose(s, counts[n]) for n, s in scores.items()})


def search(
  spec: Any, a: Flat, b: Flat, batches: Any, key: jax.Array, *, residual: bool,
  ratio: varied.Varied, **how: Any,
) -> Pairing:  # fmt: skip
  """Do what `pair` does; inside a trace by a callback to the host.

  Args:
    spec: architecture.
    a: address to array, all leaves of the first network.
    b: of the second.
    batches: for "activation".
    key: random key of the groups' order.
    residual: whether channels of the residual stream may move.
    ratio: share of pairs that stay apart.
    **how: see `pair`.

  Returns:
    The pairing.
  """

  def host(a: Flat, b: Flat, seed: Any) -> Pairing:
    rng = np.random.default_rng(np.asarray(seed).tolist())
    return pair(spec, a, b, batches, rng=rng, residual=residual, ratio=ratio, **how)

  seed = jax.random.key_data(key)
  if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((a, b, seed))):
    return host(a, b, seed)
  index = permutations.identity(spec, residual=residual)
  picks = {}
  for g in widening.widenable(spec, residual=residual):
    apart = widening.separate(g.size, varied.at(ratio, g.name))
    picks[g.name] = (np.zeros(g.size - apart, np.int32), np.zeros(apart, np.int32))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.int32), Pairing(index, picks))
  return jax.pure_callback(host, shapes, a, b, seed)


def _correlated(
  spec: Any, groups: Sequence[units.Group], a: Flat, b: Flat, batches: Any, residual: bool
) -> dict[str, np.ndarray]:
  # All taps, as for matching, so that one program serves both.
  every = permutations.groups(spec, residual=residual)
  taps = sorted({tap for g in every for tap, _, _ in g.taps})
  seen = activation_matching.correlations(
    spec, paths.unflatten(a), paths.unflatten(b), batches, taps
  )
  out = {}
  for g in groups:
    parts = [
      np.diagonal(seen[tap, layer])[member.places(g.size)].mean(axis=(0, 2))
      for tap, layer, member in g.taps
    ]
    out[g.name] = np.mean(parts, axis=0)
  return out
