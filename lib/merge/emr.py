# SPDX-License-Identifier: Apache-2.0
"""EMR: elect one vector for all tasks, then mask and rescale it for each.

Huang et al., "EMR-Merging: tuning-free high-performance model merging", 2024 (arXiv 2405.17461).
The elected vector τ has the sign of Σ τ_t (zero counted as minus, as in the authors' code) and
the largest magnitude among the changes of that sign. Task t is served by θ₀ + λ_t M_t ⊙ τ with
M_t = [τ_t τ > 0] and λ_t = Σ|τ_t| / Σ|M_t ⊙ τ|, which restores its mean magnitude.

`granularity="tensor"` takes λ_t of every tensor by itself, so that it streams; `"global"` is the
paper's, one λ_t for the model. (The authors' code sums means over tensors, so that a bias counts
as much as a matrix.) Where nothing is left to scale λ_t is 1. Computed in float32, returned in
the storage dtype; compressed leaves come back dense. Neutral at alpha=0; with one donor the result
is that donor up to rounding.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from treesurgeon.core import leaves, lifting, model, needs, paths, programs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib

GRANULARITIES = ("tensor", "global")


def elect(
  deltas: Sequence[Float[Array, "*shape"]],
) -> tuple[Float[Array, "*shape"], tuple[Bool[Array, "*shape"], ...]]:
  """Elect one vector for all tasks, and tell which of its entries agree with each.

  Args:
    deltas: the task vectors τ_t, float32.

  Returns:
    (τ, the masks M_t).

  Example:
    >>> vector, (first, second) = elect([jnp.array([1.0, -1.0]), jnp.array([2.0, 3.0])])
    >>> vector.tolist(), first.tolist(), second.tolist()
    ([2.0, 3.0], [True, False], [True, True])
  """
  sign = jnp.where(jnp.asarray(sum(deltas)) > 0, 1.0, -1.0)
  agrees = tuple(d * sign > 0 for d in deltas)
  largest = jnp.zeros_like(deltas[0])
  for mask, delta in zip(agrees, deltas, strict=True):
    largest = jnp.maximum(largest, jnp.where(mask, jnp.abs(delta), 0.0))
  return sign * largest, agrees


def serve(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  scale: Float[Array, ""] | None = None,
  *,
  task: int,
  alpha: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
  """Rebuild one task's array from the elected vector.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays.
    scale: λ_t; None takes this array's own.
    task: which donor's, from 0.
    alpha: multiplies what is added.

  Returns:
    θ₀ + α λ_t M_t ⊙ τ, in the dtype of `w`.

  Example:
    >>> donors = (jnp.array([1.0, -1.0]), jnp.array([2.0, 3.0]))
    >>> serve(jnp.zeros(2), donors, task=0).tolist()
    [2.0, 0.0]
  """
  base = w.astype(jnp.float32)
  deltas = [d.astype(jnp.float32) - base for d in donors]
  vector, masks = elect(deltas)
  masked = jnp.where(masks[task], vector, 0.0)
  if scale is None:
    scale = _quotient(jnp.sum(jnp.abs(deltas[task])), jnp.sum(jnp.abs(masked)))
  return (base + consensus.times(alpha, scale * masked)).astype(w.dtype)


def global_scale(
  tree: Mapping[str, tuple[jax.Array, tuple[jax.Array, ...]]], *, task: int
) -> Float[Array, ""]:
  """Find one λ_t for all arrays.

  Args:
    tree: for each address the base's array and the donors' arrays.
    task: which donor's, from 0.

  Returns:
    Σ|τ_t| / Σ|M_t ⊙ τ| over all arrays.

  Example:
    >>> tree = {"w": (jnp.zeros(2), (jnp.array([1.0, -1.0]), jnp.array([2.0, 3.0])))}
    >>> float(global_scale(tree, task=0))
    1.0
  """
  before, after = jnp.float32(0), jnp.float32(0)
  for w, donors in tree.values():
    deltas = [d.astype(jnp.float32) - w.astype(jnp.float32) for d in donors]
    vector, masks = elect(deltas)
    before += jnp.sum(jnp.abs(deltas[task]))
    after += jnp.sum(jnp.where(masks[task], jnp.abs(vector), 0.0))
  return _quotient(before, after)


@step.method("merge.emr")
def emr(
  *,
  task: int,
  models: Sequence[str] = (),
  alpha: varied.Varied = 1.0,
  granularity: str = "tensor",
  select: str | None = None,
) -> step.Step:
  """Rebuild one donor from the vector that all donors elect, masked and rescaled for it.

  Args:
    task: which donor to rebuild, from 0.
    models: directories of the donors; empty takes those handed to the driver.
    alpha: multiplies what is added; the paper's is 1.
    granularity: "tensor" rescales every tensor by itself, "global" the model as one vector.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError if there is no such donor.

  Raises:
    ValueError: for an unknown granularity.

  Example:
    >>> emr(task=1)
    (merge.emr(task=1),)

  Reference:
    Huang et al., EMR-Merging, 2024, arXiv 2405.17461.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(GRANULARITIES)}")
  wants: dict[str, needs.Need] = {"donors": needs.Donors(tuple(models))}
  if granularity == "global":
    return _over_model(task, alpha, select or ".*", wants)
  return _over_leaves(task, alpha, select, wants)


def _over_leaves(
  task: int, alpha: varied.Varied, select: str | None, wants: Mapping[str, needs.Need]
) -> step.Step:
  return lifting.over_leaves(
    serve,
    hyper={"task": task},
    knobs={"alpha": alpha},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants=wants,
  )


def _over_model(
  task: int, alpha: varied.Varied, pattern: str, wants: Mapping[str, needs.Need]
) -> step.Step:
  """Find the scale from all leaves first, then serve each by itself."""
  each = _over_leaves(task, alpha, pattern, {**wants, "scale": needs.Statistic("scale")})

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    found = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    tree = {a: (m.leaf(a), evidence["donors"][a]) for a in found}
    for address, (w, donors) in tree.items():
      step.check_donors(address, w, donors)
      _check(len(donors), task=task)
    tree = leaves.map_leaves(leaves.dense, tree)
    scale = programs.compiled(global_scale, (("task", task),))(tree, {})
    return each.apply(m, {**evidence, "scale": dict.fromkeys(found, scale)}, key)

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def reselect(narrower: str) -> step.Step:
    return _over_model(task, alpha, step.both(pattern, narrower), wants)

  return step.Step(wants, apply, "model", {}, units, reselect)


def _check(donors: int, *, task: int, **rest: float) -> None:
  weights_lib.check_task(donors, task=task, weights=None, **rest)


def _quotient(before: jax.Array, after: jax.Array) -> jax.Array:
  return jnp.where(after > 0, before / jnp.where(after > 0, after, 1.0), 1.0)
