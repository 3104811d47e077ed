# SPDX-License-Identifier: Apache-2.0
"""Compare merged models as a benchmark does: normalised, held out, forgotten, significant.

After He et al., "MergeBench: a benchmark for merging domain-specialized LLMs", 2025 (arXiv
2505.10833), and Yadav et al., "What matters for model merging at scale?", 2024 (arXiv 2410.03617).
Every item of a task gives (hits, targets); a model's score is their ratio, its normalised score
that over the task's own expert. No single mean decides: methods are ranked by the mean, the worst
task and by the mean rank, and a difference counts only if a bootstrap over items, paired between
models and separate by task, says so.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs

Items = np.ndarray  # (n, 2) float64: hits and targets of each item
Sheet = Mapping[str, Items]  # task to items, of one model


class Standing(NamedTuple):
  """Where a method stands.

  Attributes:
    normalised: mean over tasks of score / expert's score.
    worst: the least of these.
    rank: mean over tasks of the rank among the compared methods, 1 is best.
    low, high: 95 % bootstrap interval of `normalised`, experts held fixed.
  """

  normalised: float
  worst: float
  rank: float
  low: float
  high: float


def score(
  model: model_lib.Model, rows: Mapping[str, np.ndarray], *, exact: bool, batch: int = 64
) -> Items:
  """Count a model's hits on every item.

  Args:
    model: the model.
    rows: arrays of equal length, an item each, as `models.predictions` takes a batch.
    exact: whether an item is one hit if all its targets are right, else none.
    batch: items at a time.

  Returns:
    Hits and targets of each item.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> score(m, {"tokens": np.zeros((3, 4), np.int32)}, exact=False)[:, 1].tolist()
    [3.0, 3.0, 3.0]
  """
  n = len(next(iter(rows.values())))
  out = []
  for at in range(0, n, batch):
    # The last batch is filled up with its own first item, so that one program serves all.
    index = np.minimum(np.arange(at, at + batch), n - 1)
    part = {k: v[index] for k, v in rows.items()}
    out.append(np.asarray(_count(model.spec, model.params, part, exact))[: n - at])
  return np.concatenate(out).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("spec", "exact"))
def _count(spec: Any, params: Any, part: Mapping[str, jax.Array], exact: bool) -> jax.Array:
  n = next(iter(part.values())).shape[0]
  logits, labels, weights = models.predictions(spec, params, part)
  right = (jnp.argmax(logits, axis=-1) == labels).reshape(n, -1)
  asked = (weights > 0).reshape(n, -1)
  hits = jnp.sum(right & asked, axis=1).astype(jnp.float32)
  targets = jnp.sum(asked, axis=1).astype(jnp.float32)
  if exact:
    return jnp.stack([(hits == targets).astype(jnp.float32), jnp.ones_like(targets)], axis=1)
  return jnp.stack([hits, targets], axis=1)


def rate(items: Items) -> float:
  """Return the share of targets hit.

  Args:
    items: hits and targets.

  Returns:
    0 to 1.

  Example:
    >>> rate(np.array([[1.0, 2.0], [2.0, 2.0]]))
    0.75
  """
  return float(items[:, 0].sum() / items[:, 1].sum())


def standings(
  sheets: Mapping[str, Sheet],
  experts: Mapping[str, Items],
  *,
  resamples: int = 1000,
  seed: int = 0,
) -> dict[str, Standing]:
  """Rank methods on the experts' tasks by several aggregations.

  Args:
    sheets: method to its items by task; every method has the same tasks.
    experts: task to the items of its own expert.
    resamples: bootstrap samples.
    seed: of the samples.

  Returns:
    Method to standing, best mean first.

  Raises:
    ValueError: if an expert scores nothing, so that there is nothing to normalise by, or a method
      lacks a task.

  Example:
    >>> hit, miss = np.array([[1.0, 1.0]] * 4), np.array([[0.0, 1.0]] * 4)
    >>> found = standings({"good": {"t": hit}, "bad": {"t": miss}}, {"t": hit})
    >>> found["good"].normalised, found["bad"].rank
    (1.0, 2.0)
  """
  tasks = sorted(experts)
  ceiling = {t: rate(experts[t]) for t in tasks}
  for t, value in ceiling.items():
    if value <= 0:
      raise ValueError(f"the expert of {t!r} scores 0, so nothing can be normalised by it")
  for name, sheet in sheets.items():
    if lacking := [t for t in tasks if t not in sheet]:
      raise ValueError(f"{name!r} has no items of the task {lacking[0]!r}")
  raw = {m: np.array([rate(s[t]) / ceiling[t] for t in tasks]) for m, s in sheets.items()}
  table = np.stack(list(raw.values()))
  # Equal scores share their mean rank.
  above = (table[None, :, :] > table[:, None, :]).sum(axis=1)
  ties = (table[None, :, :] == table[:, None, :]).sum(axis=1)
  ranks = dict(zip(raw, (above + (ties + 1) / 2).mean(axis=1), strict=True))
  out = {}
  for name, values in raw.items():
    draws = _draws(sheets[name], tasks, ceiling, resamples, seed)
    low, high = np.percentile(draws, [2.5, 97.5])
    out[name] = Standing(
      float(values.mean()), float(values.min()), float(ranks[name]), float(low), float(high)
    )
  return dict(sorted(out.items(), key=lambda x: -x[1].normalised))


def difference(
  a: Sheet, b: Sheet, experts: Mapping[str, Items], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
  """Bound the difference in mean normalised score, a - b, by a paired bootstrap.

  Args:
    a: one model's items by task.
    b: another's, on the same items.
    experts: task to the items of its own expert.
    resamples: bootstrap samples.
    seed: of the samples.

  Returns:
    (difference, low, high) at 95 %; significant where the interval excludes zero.

  Example:
    >>> hit, miss = np.array([[1.0, 1.0]] * 4), np.array([[0.0, 1.0]] * 4)
    >>> difference({"t": hit}, {"t": miss}, {"t": hit})
    (1.0, 1.0, 1.0)
  """
  tasks = sorted(experts)
  ceiling = {t: rate(experts[t]) for t in tasks}
  value = float(np.mean([(rate(a[t]) - rate(b[t])) / ceiling[t] for t in tasks]))
  gap = _draws(a, tasks, ceiling, resamples, seed) - _draws(b, tasks, ceiling, resamples, seed)
  low, high = np.percentile(gap, [2.5, 97.5])
  return value, float(low), float(high)


def _draws(
  sheet: Sheet, tasks: Sequence[str], ceiling: Mapping[str, float], resamples: int, seed: int
) -> np.ndarray:
  """Resample the items of every task; equal seeds draw equal items, which pairs two models."""
  total = np.zeros(resamples)
  for i, t in enumerate(tasks):
    items = sheet[t]
    rng = np.random.default_rng([seed, i])
    sums = items[rng.integers(0, len(items), (resamples, len(items)))].sum(axis=1)
    total += sums[:, 0] / sums[:, 1] / ceiling[t]
  return total / len(tasks)


def conflicts(
  base: needs.Source, experts: Mapping[str, needs.Source]
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Measure how much experts' changes interfere, pair by pair.

  Args:
    base: the model they were tuned from.
    experts: task to expert.

  Returns:
    (tasks, cosines, clashes): cosines of the task vectors, and the share of their entries, weighted
    by magnitude, whose signs differ; both (n, n).

  Example:
    >>> base, one = (model_lib.Model(None, {"w": jnp.full(2, x)}) for x in (0.0, 1.0))
    >>> conflicts(base, {"a": one, "b": one})[1][0, 1].round(3).item()
    1.0
  """
  names = list(experts)
  n = len(names)
  dots, clash, mass = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
  for address in base.addresses():
    w = jnp.asarray(base.leaf(address))
    deltas = jnp.stack([jnp.asarray(experts[t].leaf(address)) - w for t in names]).reshape(n, -1)
    d, c, m = _pairs(deltas.astype(jnp.float32))
    dots, clash, mass = dots + np.asarray(d), clash + np.asarray(c), mass + np.asarray(m)
  norms = np.sqrt(np.maximum(np.diag(dots), 1e-30))
  return names, dots / norms[:, None] / norms[None, :], clash / np.maximum(mass, 1e-30)


@jax.jit
def _pairs(deltas: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  def against(one: jax.Array) -> tuple[jax.Array, jax.Array]:
    product = deltas * one[None, :]
    size = jnp.abs(product)
    return jnp.sum(jnp.where(product < 0, size, 0.0), axis=1), jnp.sum(size, axis=1)

  clash, mass = jax.lax.map(against, deltas)
  return deltas @ deltas.T, clash, mass
