# SPDX-License-Identifier: Apache-2.0
"""TIES merging: trim small changes, elect a sign, average what agrees with it.

Yadav et al., "TIES-Merging: resolving interference when merging models", 2023 (arXiv 2306.01708).
`granularity="tensor"` is mergekit's `ties`: every tensor is trimmed by itself to
max(1, int(density n)) entries. `granularity="global"` is the paper's: the whole model's change is
trimmed as one vector, so the step sees whole models at once. In both, equal magnitudes at the
threshold are kept lowest index first (mergekit leaves their order to its sort), the sign is that of
the weighted sum with zero counted as plus, and `normalize` divides by the weights of the entries
that agree. A negative weight turns a donor's change around, but `normalize` divides by that weight
again and cancels it, in mergekit as here. Computed in float32, returned in the storage dtype;
compressed leaves come back dense. Neutral at lam=0; with one donor, density 1 and lam 1 the result
is that donor up to rounding.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import (
  leaves,
  lifting,
  model,
  needs,
  paths,
  pieces,
  programs,
  step,
  trim,
  varied,
)
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib

GRANULARITIES = ("tensor", "global")
Cuts = tuple[tuple[jax.Array, jax.Array] | None, ...]


def trim_elect_merge(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  cuts: Cuts | None = None,
  *,
  weights: Sequence[ArrayLike] | None = None,
  density: float | tuple[float, ...] = 0.2,
  lam: ArrayLike = 1.0,
  normalize: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by TIES.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    cuts: for each donor where to trim (see `trim.cut`), None for not at all; without it
      each array is trimmed by itself.
    weights: one number a donor; None means ones.
    density: fraction of each donor's entries to keep, or one fraction a donor.
    lam: λ, multiplies the merged change.
    normalize: whether to divide by the summed weights of the agreeing entries.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: for a wrong number of weights or densities.

  Example:
    >>> donors = (jnp.array([3.0, 0.1, -1.0]), jnp.array([1.0, 0.2, 2.0]))
    >>> trim_elect_merge(jnp.zeros(3), donors, density=0.67).tolist()
    [2.0, 0.0, 2.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  base = w.astype(jnp.float32)
  changes = [d.astype(jnp.float32) - base for d in donors]
  if cuts is None:
    cuts = tuple(
      _one_cut([d], share)
      for d, share in zip(
        changes, weights_lib.each(density, len(donors), name="density"), strict=True
      )
    )
  trimmed = [
    d if where is None else jnp.where(trim.kept(d, *where), d, 0.0)
    for d, where in zip(changes, cuts, strict=True)
  ]
  merged = consensus.elect(base, trimmed, weights=weight, lam=lam, normalize=normalize)
  return merged.astype(w.dtype)


def global_cuts(
  tree: Mapping[str, tuple[jax.Array, tuple[jax.Array, ...]]], *, density: float | tuple[float, ...]
) -> dict[str, Cuts]:
  """Find where to trim each donor's change of all arrays, taken as one vector.

  Args:
    tree: for each address the base's array and the donors' arrays.
    density: fraction of each donor's entries to keep, or one fraction a donor.

  Returns:
    For each address what `trim_elect_merge` takes as `cuts`.

  Example:
    >>> tree = {"a": (jnp.zeros(2), (jnp.ones(2),)), "b": (jnp.zeros(2), (jnp.full(2, 3.0),))}
    >>> cuts = global_cuts(tree, density=0.5)
    >>> trim_elect_merge(*tree["a"], cuts["a"]).tolist()
    [0.0, 0.0]
  """
  count = len(next(iter(tree.values()))[1])
  columns = []
  for i, share in enumerate(weights_lib.each(density, count, name="density")):
    deltas = [d[i].astype(jnp.float32) - w.astype(jnp.float32) for w, d in tree.values()]
    cut = _cut(deltas, share)
    columns.append([None] * len(tree) if cut is None else [(cut[0], t) for t in cut[1]])
  return dict(zip(tree, zip(*columns, strict=True), strict=True))


@step.method("merge.ties")
def ties(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.2,
  lam: varied.Varied = 1.0,
  normalize: bool = True,
  granularity: str = "tensor",
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors into the model they started from by trim, elect sign and merge.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    lam: multiplies the merged change.
    normalize: whether to average the agreeing changes; otherwise they are added.
    granularity: "tensor" trims every tensor by itself, "global" the model as one vector.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a density outside 0 to 1 or an unknown granularity.

  Example:
    >>> ties(density=0.5, weights=(1.0, 0.5))
    (merge.ties(weights=(1.0, 0.5), density=0.5),)

  Reference:
    Yadav et al., TIES-Merging, 2023, arXiv 2306.01708.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(GRANULARITIES)}")
  weights_lib.check_shares(density, name="density")
  knobs = {"weights": weights, "lam": lam}
  wants: dict[str, needs.Need] = {"donors": needs.Donors(tuple(models))}
  if granularity == "tensor":
    return lifting.over_leaves(
      trim_elect_merge,
      hyper={"normalize": normalize, "density": density},
      knobs=knobs,
      check=weights_lib.check,
      split=_split,
      select=select,
      default=".*",
      domain=".*",
      wants=wants,
    )
  if any(varied.is_rules(d) for d in (density, *(density if isinstance(density, tuple) else ()))):
    raise ValueError(
      "granularity='global' trims the model as one vector: density cannot vary in it"
    )
  return _over_model(normalize, knobs, density, select or ".*", wants)


def _over_model(
  normalize: bool,
  knobs: Mapping[str, Any],
  density: Any,
  pattern: str,
  wants: Mapping[str, needs.Need],
) -> step.Step:
  """Cut all leaves first, then merge each by itself with its cut as evidence."""
  each = lifting.over_leaves(
    trim_elect_merge,
    hyper={"normalize": normalize},
    knobs=knobs,
    check=weights_lib.check,
    select=pattern,
    domain=".*",
    wants={**wants, "cuts": needs.Statistic("cuts")},
  )

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    tree = {
      a: (m.leaf(a), evidence["donors"][a]) for a in m.addresses() if re.fullmatch(pattern, a)
    }
    for address, (w, donors) in tree.items():
      step.check_donors(address, w, donors)
    tree = leaves.map_leaves(leaves.dense, tree)
    cuts = programs.compiled(global_cuts, (("density", density),))(tree, {})
    return each.apply(m, {**evidence, "cuts": cuts}, key)

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  return step.Step(
    wants,
    apply,
    "model",
    {},
    units,
    lambda narrower: _over_model(normalize, knobs, density, step.both(pattern, narrower), wants),
  )


def _split(
  w: np.ndarray,
  donors: tuple[np.ndarray, ...],
  where: pieces.Bounds,
  *,
  density: float | tuple[float, ...],
  normalize: bool,
) -> list[dict[str, Any]]:
  """Trim a large host array as a whole, so that its pieces can be merged by themselves."""
  del normalize
  columns = []
  for donor, share in zip(
    donors, weights_lib.each(density, len(donors), name="density"), strict=True
  ):
    if share >= 1:
      columns.append([None] * len(where))
    elif share <= 0:
      columns.append([(np.int32(2**31 - 1), np.int32(0))] * len(where))
    else:
      at, ties = trim.cut_pieces(w, donor, where, max(1, int(share * w.size)))
      columns.append([(at, t) for t in ties])
  return [{"cuts": cuts} for cuts in zip(*columns, strict=True)]


def _cut(deltas: Sequence[jax.Array], share: float) -> tuple | None:
  """Return (threshold, ties of each array); None where everything stays."""
  total = sum(d.size for d in deltas)
  if share >= 1:
    return None
  if share <= 0:
    return jnp.int32(2**31 - 1), (jnp.int32(0),) * len(deltas)
  return trim.cut(deltas, max(1, int(share * total)))


def _one_cut(deltas: Sequence[jax.Array], share: float) -> tuple | None:
  cut = _cut(deltas, share)
  return None if cut is None else (cut[0], cut[1][0])
