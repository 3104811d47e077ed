# SPDX-License-Identifier: Apache-2.0
"""Bootstrap confidence intervals over documents (Efron, Annals of Statistics 7(1), 1979).

Tokens of one document are not independent, so documents are what is resampled. Two models
scored on the same documents are compared by the same resamples of both (Koehn, EMNLP 2004).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Documents = Sequence[tuple[float, int]]  # (total loss, predicted tokens) of each
CHUNK = 1 << 20  # draws held at once


class Interval(NamedTuple):
  """An estimate and where it may lie.

  Attributes:
    value: estimate from all documents.
    low, high: bounds of the percentile interval.
    level: its nominal coverage.
  """

  value: float
  low: float
  high: float
  level: float


def interval(
  documents: Documents, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """Bound the mean loss of a token.

  Args:
    documents: (total loss, predicted tokens) of each, `Perplexity.documents`.
    level: nominal coverage.
    resamples: how many bootstrap samples.
    seed: of the samples.

  Returns:
    The mean and its percentile interval, in the unit of the losses.

  Raises:
    ValueError: for fewer than two documents with tokens or a level outside (0, 1).

  Example:
    >>> interval([(2.0, 1), (2.0, 1), (4.0, 2)])
    Interval(value=2.0, low=2.0, high=2.0, level=0.95)
  """
  table = _table(documents)
  return _percentile(table, _ratio, level=level, resamples=resamples, seed=seed)


def paired_difference(
  a: Documents,
  b: Documents,
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """Bound the difference in mean loss, a - b, of two models on the same documents.

  Args:
    a: (total loss, predicted tokens) of each document, by the first model.
    b: of the same documents in the same order, by the second.
    level: nominal coverage.
    resamples: how many bootstrap samples.
    seed: of the samples.

  Returns:
    The difference and its percentile interval; negative means that the first model is better.

  Raises:
    ValueError: if the documents do not pair up, are fewer than two, or for a level outside (0, 1).

  Example:
    >>> paired_difference([(2.0, 1), (6.0, 1)], [(1.0, 1), (4.0, 1)]).value
    1.5
  """
  if len(a) != len(b):
    raise ValueError(f"documents must pair up; the models have {len(a)} and {len(b)}")
  alone = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if (x[1] > 0) != (y[1] > 0)]
  if alone:
    raise ValueError(f"document {alone[0]} was scored by one of the two models only")
  table = np.concatenate([_table(a), _table(b)], axis=1)
  return _percentile(
    table, lambda s: _ratio(s[..., :2]) - _ratio(s[..., 2:]),
    level=level, resamples=resamples, seed=seed,
  )  # fmt: skip


def _table(documents: Documents) -> np.ndarray:
  kept = np.array([(t, n) for t, n in documents if n > 0], np.float64)
  if len(kept) < 2:
    raise ValueError(
      f"{len(kept)} documents with predicted tokens cannot be resampled; give at least 2"
    )
  return kept


def _ratio(sums: np.ndarray) -> Any:
  return sums[..., 0] / sums[..., 1]


def _percentile(
  table: np.ndarray,
  statistic: Callable[[np.ndarray], Any],
  *,
  level: float,
  resamples: int,
  seed: int,
) -> Interval:
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie strictly between 0 and 1, like 0.95")
  if resamples < 1:
    raise ValueError(f"resamples={resamples} must be at least 1")
  rng = np.random.default_rng(seed)
  n = len(table)
  size = max(1, CHUNK // n)
  draws = []
  for at in range(0, resamples, size):
    index = rng.integers(0, n, (min(size, resamples - at), n))
    draws.append(statistic(table[index].sum(1)))
  tail = 100 * (1 - level) / 2
  low, high = np.percentile(np.concatenate(draws), [tail, 100 - tail])
  return Interval(float(statistic(table.sum(0))), float(low), float(high), level)
