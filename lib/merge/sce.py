# SPDX-License-Identifier: Apache-2.0
"""SCE: select where models differ, calculate their weights, erase minority signs.

Wan et al., "FuseChat: knowledge fusion of chat models", 2024 (arXiv 2408.07990). Of the positions
whose changes vary between the models at all, the share `select_topk` of largest variance is kept;
each model weighs by the mean square of its kept changes; at every position the changes whose sign
is that of the sum (zero counts as plus) are averaged by these weights. Same arithmetic as mergekit
0.1.5's `sce`: by leaf, all weights equal where the mean squares sum to less than 1e-6 (as they do
for small changes), divisors of at least 1e-6. Of equal variances at the threshold the first are
kept, mergekit leaves it to its sort. One donor varies nowhere, so less than select_topk=1 keeps
nothing of it. Computed in float32, returned in the storage dtype; compressed leaves come back
dense. Neutral at select_topk=0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from treesurgeon.core import lifting, needs, step, trim, varied
from treesurgeon.merge import weights as weights_lib

_TINY = 1e-6


def select_calculate_erase(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  select_topk: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
  """Merge arrays by SCE.

  Args:
    w: the base's array.
    donors: the fine-tuned arrays.
    select_topk: share of the varying positions to keep, 0 to 1.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> donors = (jnp.array([3.0, 1.0]), jnp.array([1.0, 1.5]))
    >>> select_calculate_erase(jnp.zeros(2), donors, select_topk=0.5).round(2).tolist()
    [2.7999..., 0.0]
  """
  base = w.astype(jnp.float32)
  changes = [d.astype(jnp.float32) - base for d in donors]
  count = len(changes)

  def chosen() -> Bool[Array, "*shape"]:
    center = sum(changes) / count
    variance = jnp.asarray(sum((d - center) ** 2 for d in changes)) / count
    return _largest(variance, select_topk)

  mask = jax.lax.cond(
    jnp.asarray(select_topk, jnp.float32) < 1, chosen, lambda: jnp.ones(w.shape, bool)
  )
  changes = [jnp.where(mask, d, 0.0) for d in changes]
  squares = jnp.stack([jnp.mean(d * d) for d in changes])
  total = jnp.sum(squares)
  none = total < _TINY
  weight = jnp.where(none, 1.0 / count, squares / jnp.where(none, 1.0, total))
  elected = jnp.where(jnp.asarray(sum(changes)) >= 0, 1.0, -1.0)
  merged = jnp.zeros_like(base)
  divisor = jnp.zeros_like(base)
  for i, d in enumerate(changes):
    kept = jnp.where(jnp.sign(d) == elected, weight[i], 0.0)
    merged += d * kept
    divisor += kept
  return (base + merged / jnp.maximum(divisor, _TINY)).astype(w.dtype)


@step.method("merge.sce")
def sce(
  *, models: Sequence[str] = (), select_topk: varied.Varied = 1.0, select: str | None = None
) -> step.Step:
  """Merge fine-tuned donors into the model they started from where they differ most.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    select_topk: share of each leaf's varying positions to keep, 0 to 1.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a share outside 0 to 1.

  Example:
    >>> sce(select_topk=0.1)
    (merge.sce(select_topk=0.1),)

  Reference:
    Wan et al., FuseChat, 2024, arXiv 2408.07990.
  """
  if not all(0 <= share <= 1 for share in varied.values(select_topk)):
    raise ValueError(f"select_topk={select_topk} must lie between 0 and 1")
  return lifting.over_leaves(
    select_calculate_erase,
    hyper={},
    knobs={"select_topk": select_topk},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _largest(variance: Float[Array, "*shape"], share: ArrayLike) -> Bool[Array, "*shape"]:
  """Mark the largest entries, as many as a share of those that are not zero."""
  nonzero = jnp.sum(variance != 0, dtype=jnp.int32)
  # mergekit multiplies in float32, too.
  want = (nonzero.astype(jnp.float32) * share).astype(jnp.int32)
  bits = jax.lax.bitcast_convert_type(variance, jnp.int32)

  def narrow(state: tuple) -> tuple:
    low, high, at_low = state
    pivot = low + (high - low) // 2
    found = jnp.sum(bits >= pivot, dtype=jnp.int32)
    enough = found >= want
    return (
      jnp.where(enough, pivot, low),
      jnp.where(enough, high, pivot),
      jnp.where(enough, found, at_low),
    )

  def unfinished(state: tuple) -> Array:
    low, high, at_low = state
    return (high - low > 1) & (at_low != want)

  # The variances are not negative, so their bit patterns are ordered as they are. From pattern 1
  # on: a variance of zero is not to be kept.
  start = (jnp.int32(1), jnp.int32(2**31 - 1), nonzero)
  low, _, _ = jax.lax.while_loop(unfinished, narrow, start)
  ties = want - jnp.sum(bits > low, dtype=jnp.int32)
  return trim.kept(variance, low, ties)


def _check(donors: int, *, select_topk: float) -> None:
  del select_topk
  weights_lib.resolve(None, donors, of="donors")
