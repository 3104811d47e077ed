# SPDX-License-Identifier: Apache-2.0
"""Find the permutation of one network that brings its activations nearest to another's.

Activation matching of Ainsworth et al., "Git Re-Basin", 2022 (arXiv 2209.04836), section 3.1: run
both networks on the same batches and pair units whose activations correlate; each group is one
linear assignment problem. As in the paper's code the score is the Pearson correlation. Heads are
paired by the sum of squared correlations over their dimensions, which does not depend on the order
within them; their dimensions are paired afterwards. Groups that cannot be observed at a tap (the
dimensions of queries and keys) are matched by weights at last, the others held.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.merge import matching, units

Place = tuple[str, int]  # a tap, and its layer; -1 outside layers


def correlation(x: Float[Array, "tokens n"], y: Float[Array, "tokens m"]) -> tuple[Array, ...]:
  """Sum up what the correlation of two sets of features needs.

  Args:
    x: one network's activations.
    y: the other's, on the same inputs.

  Returns:
    Sums over tokens of: x yᵀ; x, y, x² and y² as (n, 1), (1, m), (n, 1), (1, m); and 1.

  Example:
    >>> correlation(jnp.ones((4, 2)), jnp.ones((4, 3)))[0].shape
    (2, 3)
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  cross = jnp.matmul(x.T, y, precision="highest")
  ones = jnp.full((1, 1), x.shape[0], jnp.float32)
  sums = (x.sum(0)[:, None], y.sum(0)[None, :], (x * x).sum(0)[:, None], (y * y).sum(0)[None, :])
  return (cross, *sums, ones)


def correlations(
  spec: Any, a: Any, b: Any, batches: Iterable[Any], taps: Sequence[str]
) -> dict[Place, Float[np.ndarray, "n n"]]:
  """Correlate two networks' units at some taps.

  Args:
    spec: architecture.
    a: parameters.
    b: the other network's.
    batches: as for `models.nll`; labels are not read.
    taps: names of taps.

  Returns:
    (tap, layer) to Pearson correlations, rows are units of `a`; zero for units that are constant.

  Raises:
    ValueError: if there is no batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> found = correlations(spec, params, params, [np.array([[1, 2, 3]])], ["mlp/down/in"])
    >>> found["mlp/down/in", 0].diagonal().round(2).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
  """
  total: Any = None
  for batch in batches:
    sums = _sums(spec, tuple(taps), a, b, batch)
    total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  if total is None:
    raise ValueError("activation matching needs calibration batches and none was given")
  out: dict[Place, np.ndarray] = {}
  for tap, found in total.items():
    if isinstance(found, list):
      out.update({(tap, i): _pearson(s) for i, s in enumerate(found)})
    elif found[0].ndim == 2:
      out[tap, -1] = _pearson(found)
    else:
      host = [np.asarray(s) for s in found]
      out.update({(tap, i): _pearson([s[i] for s in host]) for i in range(len(host[0]))})
  return out


def match(
  groups: Sequence[units.Group],
  correlated: Mapping[Place, np.ndarray],
  a: Mapping[str, Any],
  b: Mapping[str, Any],
  index: units.Index,
  *,
  rng: np.random.Generator,
  sweeps: int = 100,
) -> matching.Match:
  """Permute one network towards another by their activations' correlations.

  Args:
    groups: from `permutations.groups`, outer before inner.
    correlated: from `correlations`, of `b` as given.
    a: address to array, of the network that stays.
    b: the network to permute.
    index: `permutations.identity`.
    rng: for the groups that are matched by weights.
    sweeps: for these too.

  Returns:
    The match; `gain` and `sweeps` are of the groups matched by weights.

  Example:
    >>> w, all_of_it = units.Member("w", 1), units.Member("", -1)
    >>> hidden = units.Group("h", 2, (w,), taps=(("out", 0, all_of_it),))
    >>> w, seen = np.eye(2), {("out", 0): np.array([[0.1, 0.9], [0.8, 0.2]])}
    >>> start, rng = {"w": {1: np.arange(2)}}, np.random.default_rng(0)
    >>> match([hidden], seen, {"w": w}, {"w": w}, start, rng=rng).index["w"][1].tolist()
    [1, 0]
  """
  columns = {place: np.arange(c.shape[1]) for place, c in correlated.items()}
  for group in (g for g in groups if g.taps):
    score = np.zeros((group.size, group.size))
    for tap, layer, member in group.taps:
      at = member.places(group.size)
      c = correlated[tap, layer][:, columns[tap, layer]]
      if group.inner:
        blocks = c[at[0][:, None, :, None], at[0][None, :, None, :]]
        score += (blocks * blocks).sum(axis=(2, 3))
      else:
        score += sum(c[one[:, None, 0], one[None, :, 0]] for one in at)
    order = matching.assign(score)
    index = units.compose(index, group, order)
    for tap, layer, member in group.taps:
      old = columns[tap, layer]
      columns[tap, layer] = old[units.entries(member, group.size, order, len(old))]
  rest = [g for g in groups if not g.taps]
  return matching.match(rest, a, b, index, rng=rng, sweeps=sweeps)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(spec: Any, taps: tuple[str, ...], a: Any, b: Any, batch: Any) -> dict[str, Any]:
  def keep(name: str, x: jax.Array) -> jax.Array | None:
    return x.reshape(-1, x.shape[-1]) if name in taps else None

  x, y = (
    models.forward(spec, params, models.inputs(batch), observe=keep).observed for params in (a, b)
  )
  out: dict[str, Any] = {}
  for t in taps:
    if isinstance(x[t], tuple):  # layers of unequal widths
      out[t] = [correlation(u, v) for u, v in zip(x[t], y[t], strict=True)]
    else:
      out[t] = (correlation if x[t].ndim == 2 else jax.vmap(correlation))(x[t], y[t])
  return out


def _pearson(sums: Sequence[Any]) -> np.ndarray:
  cross, x, y, xx, yy, n = (np.asarray(s, np.float64) for s in sums)
  covariance = cross / n - (x / n) * (y / n)
  scale = np.sqrt(np.maximum(xx / n - (x / n) ** 2, 0)) * np.sqrt(
    np.maximum(yy / n - (y / n) ** 2, 0)
  )
  # Sums of float32: what is left of a constant's variance is rounding.
  alive = scale > 1e-6 * (np.sqrt(xx / n) * np.sqrt(yy / n))
  return np.where(alive, covariance / np.where(alive, scale, 1.0), 0.0)
