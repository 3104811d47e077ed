# SPDX-License-Identifier: Apache-2.0
"""ECoFLaP: ratios for blocks from how steep the loss is at each, then Wanda within them.

Sung et al., "ECoFLaP: efficient coarse-to-fine layer-wise pruning for vision-language models", 2024
(arXiv 2310.02998). How much the loss changes when a kernel is moved a little to both sides along a
random direction, |L(w + εz) - L(w - εz)| / 2ε averaged over the calibration batches, takes two
forward passes and no gradient. Every block keeps at least the share 1 - `limit` of its weights, the
rest of the budget goes to blocks in proportion to the sum of their kernels' slopes, and what a full
block cannot take goes to the others likewise. Within a kernel, the weights of least |w| * ||x|| of
each output go (`wanda`).

As the authors' scripts: ε = 1e-3, limit = sparsity + 0.1, sums and blocks. Where we differ: exactly
int(sparsity n) weights of all selected kernels go, so an output may lose one more than its
neighbour (their loop rounds up, and its correction has a sign error); slopes are those of all
batches, one direction each. No N:M patterns, which fix the ratio. Computed in float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from treesurgeon.compress.prune import masks, wanda
from treesurgeon.core import lifting, needs, step, tuning
from treesurgeon.core import model as model_lib

PER = ("block", "matrix")


def shares(
  scores: Mapping[str, float],
  sizes: Mapping[str, int],
  *,
  sparsity: float,
  limit: float,
  per: str = "block",
) -> dict[str, int]:
  """Divide the number of weights to prune among kernels.

  Args:
    scores: slope by address.
    sizes: number of weights by address.
    sparsity: fraction of all weights to prune.
    limit: largest fraction of a block.
    per: "block" or "matrix": what has a ratio of its own.

  Returns:
    Address to how many weights to prune; the sum is int(sparsity n).

  Example:
    >>> shares({"a": 3.0, "b": 1.0}, {"a": 100, "b": 100}, sparsity=0.5, limit=0.75)
    {'a': 37, 'b': 63}
  """
  names = list(scores)
  group = {a: "/".join(a.split("/")[:2]) if per == "block" else a for a in names}
  groups = list(dict.fromkeys(group.values()))
  size = np.array([sum(sizes[a] for a in names if group[a] == g) for g in groups], np.float64)
  score = np.array([sum(scores[a] for a in names if group[a] == g) for g in groups], np.float64)
  total = sum(sizes.values())
  kept = size * (1 - limit)
  for _ in range(len(groups) + 1):  # each round fills a group or spends the budget
    left, room = total - int(sparsity * total) - kept.sum(), size - kept
    weight = np.where(room > 0, score, 0)
    weight = weight if weight.sum() > 0 else room
    if left <= 0 or weight.sum() <= 0:
      break
    kept = kept + np.minimum(left * weight / weight.sum(), room)
  share = dict(zip(groups, kept / size, strict=True))
  exact = {a: sizes[a] * share[group[a]] for a in names}
  whole = {a: min(int(x), sizes[a]) for a, x in exact.items()}
  missing = total - int(sparsity * total) - sum(whole.values())
  order = sorted((a for a in names if whole[a] < sizes[a]), key=lambda a: whole[a] - exact[a])
  for a in order[:missing]:  # by the largest remainder
    whole[a] += 1
  return {a: sizes[a] - whole[a] for a in names}


def prune(
  w: Float[Array, "rows cols"],
  squares: Float[Array, " rows"],
  pruned: Int[Any, ""],
) -> Float[Array, "rows cols"]:
  """Prune a number of weights by Wanda's score, as evenly over the outputs as it goes.

  Args:
    w: weights, input dimension first.
    squares: sum of squares of each input, up to a factor.
    pruned: how many go; those outputs lose one more whose next weight matters least.

  Returns:
    The pruned weights, in the dtype of `w`.

  Example:
    >>> w = jnp.array([[3.0, 1.0], [4.0, 2.0]])
    >>> prune(w, jnp.ones(2), jnp.int32(1)).tolist()
    [[3.0, 0.0], [4.0, 2.0]]
  """
  rows, cols = w.shape
  score = wanda.influence(w, squares)
  each, more = pruned // cols, pruned % cols
  keep = masks.top(score, rows - each)
  least = jnp.where(keep, score, jnp.inf).min(axis=0)
  loses = jnp.argsort(jnp.argsort(least, stable=True)) < more
  keep = jnp.where(loses[None, :], masks.top(score, rows - each - 1), keep)
  return jnp.where(keep, w, 0)


@step.method("compress.prune.ecoflap")
def ecoflap(
  *,
  sparsity: float = 0.5,
  limit: float | None = None,
  per: str = "block",
  select: str | None = None,
) -> step.Step:
  """Prune blocks the more the less steep the loss is there, and within them by Wanda.

  Args:
    sparsity: fraction of all selected weights to prune; 0 is the neutral setting.
    limit: largest fraction of a block; None is 0.1 more than the sparsity.
    per: "block" or "matrix": what has a ratio of its own.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> ecoflap(sparsity=0.6)
    (compress.prune.ecoflap(sparsity=0.6),)

  Reference:
    Sung et al., ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models,
    2024, arXiv:2310.02998.
  """
  masks.read(sparsity=sparsity, pattern=None, packed=False)
  most = min(sparsity + 0.1, 1.0) if limit is None else limit
  if not sparsity <= most <= 1:
    raise ValueError(f"limit={limit} must lie between the sparsity {sparsity} and 1")
  if per not in PER:
    raise ValueError(f"per={per!r}: valid are {', '.join(PER)}")
  return _step(sparsity, most, per, select)


def _step(sparsity: float, limit: float, per: str, select: str | None) -> step.Step:
  """Find every kernel's number of weights first, then prune each by itself."""
  wants = {"inputs": needs.Statistic("sum_squares"), "pruned": needs.Statistic("slope")}
  each = lifting.over_leaves(_leaf, hyper={}, select=select, wants=wants, scope="block")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    slopes = evidence["pruned"]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(dict(slopes))):
      return each.apply(m, {**evidence, "pruned": dict.fromkeys(slopes, jnp.int32(0))}, key)
    sizes = {a: int(s.size) for a, s in slopes.items()}
    scores = {a: float(s.value) for a, s in slopes.items()}
    found = shares(scores, sizes, sparsity=sparsity, limit=limit, per=per)
    counts = {a: np.int32(n) for a, n in found.items()}
    out = each.apply(m, {**evidence, "pruned": counts}, key)
    return tuning.noted(out, {"sparsity": {a: round(n / sizes[a], 4) for a, n in found.items()}})

  def reselect(narrower: str) -> step.Step:
    return _step(sparsity, limit, per, narrower if select is None else step.both(select, narrower))

  return each._replace(apply=apply, reselect=reselect)


def _leaf(w: Any, inputs: Any, pruned: Any) -> Any:
  return prune(w, inputs.value, pruned)
