# SPDX-License-Identifier: Apache-2.0
"""TALL masks: find in a multi-task vector the entries that each task uses.

Wang et al., "Localizing task information for improved model merging and compression", 2024 (arXiv
2405.07813). Task t uses the entries with m_t = 1[|τ_t| > λ_t |τ_mt - τ_t|], where τ_mt is the
weighted sum of the task vectors. `tall_masks` rebuilds one task's model, θ₀ + m_t τ_mt, which
`task_store` keeps for all tasks in little more than two models and a bit an entry. `consensus`
merges: it keeps the entries that at least k tasks use (k=2 drops what one task alone uses) and adds
α times them. `choose` finds λ_t by validation, from the authors' grid.

Everything is entry by entry, so both stream. Computed in float32, returned in the storage dtype;
compressed leaves come back dense. Neutral at alpha=0; consensus at k=0 is task arithmetic, above
the number of tasks the base.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.core import model as model_lib
from treesurgeon.merge import consensus as consensus_lib
from treesurgeon.merge import weights as weights_lib

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


def masks(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike | Sequence[ArrayLike] = 0.4,
) -> tuple[Float[Array, "*shape"], tuple[Bool[Array, "*shape"], ...]]:
  """Find the multi-task vector and which of its entries each task uses.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_t.
    weights: one number a donor in the multi-task vector; None means ones.
    lam: λ_t, for all donors or one a donor; the larger, the fewer entries.

  Returns:
    (τ_mt in float32, a mask for each donor).

  Example:
    >>> donors = (jnp.array([4.0, 0, 1]), jnp.array([0, 4.0, 1]))
    >>> both, (first, second) = masks(jnp.zeros(3), donors)
    >>> both.tolist(), first.tolist(), second.tolist()
    ([4.0, 4.0, 2.0], [True, False, True], [False, True, True])
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  lams = weights_lib.each(lam, len(donors), name="lam")
  base = w.astype(jnp.float32)
  deltas = [d.astype(jnp.float32) - base for d in donors]
  merged = jnp.asarray(sum(consensus_lib.times(c, d) for c, d in zip(weight, deltas, strict=True)))
  found = [jnp.abs(d) > a * jnp.abs(merged - d) for a, d in zip(lams, deltas, strict=True)]
  return merged, tuple(found)


def rebuild(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  task: int,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike | Sequence[ArrayLike] = 0.4,
  alpha: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
  """Rebuild one task's array from the multi-task vector and the task's mask.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays.
    task: which donor's, from 0.
    weights: one number a donor in the multi-task vector; None means ones.
    lam: λ_t, for all donors or one a donor.
    alpha: multiplies what is added.

  Returns:
    θ₀ + α m_t τ_mt, in the dtype of `w`.

  Example:
    >>> donors = (jnp.array([4.0, 0, 1]), jnp.array([0, 4.0, 1]))
    >>> rebuild(jnp.zeros(3), donors, task=0).tolist()
    [4.0, 0.0, 2.0]
  """
  merged, found = masks(w, donors, weights=weights, lam=lam)
  change = jnp.where(found[task], merged, 0.0)
  return (w.astype(jnp.float32) + consensus_lib.times(alpha, change)).astype(w.dtype)


def agree(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  k: int = 2,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike | Sequence[ArrayLike] = 0.4,
  alpha: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
  """Add the entries of the multi-task vector that at least k tasks use.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays.
    k: how many tasks must use an entry.
    weights: one number a donor in the multi-task vector; None means ones.
    lam: λ_t, for all donors or one a donor.
    alpha: multiplies what is added.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> agree(jnp.zeros(3), (jnp.array([4.0, 0, 1]), jnp.array([0, 4.0, 1]))).tolist()
    [0.0, 0.0, 2.0]
  """
  merged, found = masks(w, donors, weights=weights, lam=lam)
  votes = sum(m.astype(jnp.int32) for m in found)
  change = jnp.where(jnp.asarray(votes) >= k, merged, 0.0)
  return (w.astype(jnp.float32) + consensus_lib.times(alpha, change)).astype(w.dtype)


@step.method("merge.tall_masks")
def tall_masks(
  *,
  task: int,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied | Sequence[varied.Varied] = 0.4,
  alpha: varied.Varied = 1.0,
  select: str | None = None,
) -> step.Step:
  """Rebuild one donor from the sum of all donors' task vectors and the donor's TALL mask.

  Args:
    task: which donor to rebuild, from 0.
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor in the multi-task vector; None means ones.
    lam: threshold λ_t, for all donors or one a donor; by validation, see `choose`.
    alpha: multiplies what is added.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError if there is no such donor.

  Raises:
    ValueError: for a negative λ.

  Example:
    >>> tall_masks(task=1, lam=0.6)
    (merge.tall_masks(task=1, lam=0.6),)

  Reference:
    Wang et al., Localizing task information, 2024, arXiv 2405.07813.
  """
  _check_lam(lam)
  return lifting.over_leaves(
    rebuild,
    hyper={"task": task},
    knobs={"weights": weights, "lam": lam, "alpha": alpha},
    check=weights_lib.check_task,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


@step.method("merge.consensus")
def consensus(
  *,
  k: int = 2,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied | Sequence[varied.Varied] = 0.4,
  alpha: varied.Varied = 1.0,
  select: str | None = None,
) -> step.Step:
  """Add what at least k donors use of the sum of their task vectors.

  Args:
    k: how many donors must use an entry, by their TALL masks.
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor in the multi-task vector; None means ones.
    lam: threshold λ_t, for all donors or one a donor.
    alpha: multiplies what is added.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a negative λ.

  Example:
    >>> consensus(k=3, alpha=0.4)
    (merge.consensus(k=3, alpha=0.4),)

  Reference:
    Wang et al., Localizing task information, 2024, arXiv 2405.07813.
  """
  _check_lam(lam)
  return lifting.over_leaves(
    agree,
    hyper={"k": k},
    knobs={"weights": weights, "lam": lam, "alpha": alpha},
    check=weights_lib.check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def choose(
  base: model_lib.Model,
  donors: Sequence[needs.Source],
  evaluate: Callable[[model_lib.Model, int], float],
  *,
  grid: Sequence[float] = GRID,
  weights: Sequence[float] | None = None,
) -> tuple[tuple[float, ...], list[list[float]]]:
  """Choose each task's λ by validating its rebuilt model.

  Args:
    base: the model that was fine-tuned.
    donors: the fine-tuned models, one a task.
    evaluate: (model, task) -> score on validation data, higher better.
    grid: values to try; of equal scores the first is taken.
    weights: one number a donor in the multi-task vector; None means ones.

  Returns:
    (λ for each task, scores[task][place in the grid]).

  Example:
    >>> def near(m, task):
    ...   return -float(jnp.abs(m.leaf("w") - donors[task].leaf("w")).sum())
    >>> base = model_lib.Model(None, {"w": jnp.zeros(2)})
    >>> donors = [base.replace(params={"w": jnp.array(x)}) for x in ([4.0, 1.0], [0.0, 5.0])]
    >>> choose(base, donors, near, grid=(0.1, 0.6))[0]
    (0.6, 0.1)
  """
  evidence = {"donors": needs.Aligned(donors)}
  scores: list[list[float]] = []
  for task in range(len(donors)):
    scores.append([])
    for lam in grid:
      (one,) = tall_masks(task=task, lam=lam, weights=weights)
      # Nothing here is random; the key is what every step takes.
      served = one.apply(base, evidence, jax.random.key(0))
      scores[-1].append(float(evaluate(served, task)))
  return tuple(grid[max(range(len(s)), key=s.__getitem__)] for s in scores), scores


def _check_lam(lam: varied.Varied | Sequence[varied.Varied]) -> None:
  if not all(value >= 0 for value in varied.values(lam)):
    raise ValueError(f"lam={lam} must not be negative; the authors try {GRID}")
