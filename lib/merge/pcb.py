# SPDX-License-Identifier: Apache-2.0
"""PCB-Merging: let parameters compete, and average those that win with their scores as weights.

Du et al., "Parameter competition balancing for model merging", 2024 (arXiv 2410.02396). An entry's
score is exp(T β²) tanh(τ_t Σ_s τ_s), where β is its clipped magnitude scaled to 0 to 1 within
its task: large where the task itself and the others' changes want it. The best `density` of
each task's scores, scaled to 0 to 1, weight the clipped changes:
θ₀ + λ Σ_t s_t τ_t / Σ_t s_t. Magnitudes are clipped at the 1e-4 quantiles of both ends, as in
the authors' code, whose order statistics, `int` of a fraction and strict threshold these are. (A
factor in common of a task's scores drops out, so exp(T (β² - 1)) is used, which cannot overflow.)
Their evolutionary search of one λ a task is `weights` here, times lam.

`granularity="global"` is theirs: the model as one vector. `"tensor"`, which streams, takes every
tensor by itself, `"row"` every row (the weights of one output neuron). Order statistics of all but
small arrays come from counting (`trim`), not sorting. Where all scores of a task are equal it has
no winners. Computed in float32, returned in the storage dtype; compressed leaves come back dense.
Neutral at lam=0; with one donor and lam=1 entries that win become its (clipped) own, the others
stay the base's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import leaves, lifting, model, needs, paths, programs, step, trim, varied
from treesurgeon.merge import consensus, rows
from treesurgeon.merge import weights as weights_lib

GRANULARITIES = ("tensor", "row", "global")
CLIP = 1e-4
_FEW = 1 << 12  # entries that are sorted, which compiles sooner than counting
Parts = Sequence[Float[Array, "..."]]


def compete(
  tasks: Sequence[Parts], *, density: float = 0.1, weights: Sequence[ArrayLike] | None = None
) -> list[Float[Array, "..."]]:
  """Merge task vectors by competition.

  Args:
    tasks: each task's vector as one or more float32 arrays, which count as one vector.
    density: fraction of a task's entries that may win.
    weights: multiplies each task's winners; None means ones.

  Returns:
    The merged change, in as many arrays.

  Example:
    >>> tasks = [[jnp.array([0.3, 0.5, 0.0, 0.1])], [jnp.array([0.2, -0.5, 0.1, 0.3])]]
    >>> [round(float(x), 2) for x in compete(tasks, density=0.5)[0]]
    [0.3, 0.0, 0.0, 0.3]
  """
  weight = weights_lib.resolve(weights, len(tasks), of="donors")
  count, size = len(tasks), sum(x.size for x in tasks[0])
  sums = [jnp.asarray(sum(parts)) for parts in zip(*tasks, strict=True)]

  def add(totals: tuple, given: tuple) -> tuple:
    c, task = given
    sizes = [jnp.abs(x) for x in task]
    low = _kth(sizes, size - int(size * CLIP))
    high = _kth(sizes, size - max(int(size * (1 - CLIP) - 1), 0))
    clipped = [jnp.clip(a, low, high) for a in sizes]
    # After clipping the extremes are the quantiles themselves.
    scores = [
      jnp.exp(count * (_scaled(a, low, high) ** 2 - 1)) * jnp.tanh(x * s)
      for a, x, s in zip(clipped, task, sums, strict=True)
    ]
    bar = _at(scores, min(int(size * (1 - density)), size - 1))
    best = jnp.max(jnp.stack([jnp.max(s) for s in scores]))
    shares = [_scaled(jnp.maximum(s, bar), bar, best) for s in scores]
    won = [
      share * consensus.times(c, jnp.sign(x) * a)
      for share, x, a in zip(shares, task, clipped, strict=True)
    ]
    return jax.tree.map(jnp.add, totals, (won, shares)), None

  stacked = [jnp.stack(parts) for parts in zip(*tasks, strict=True)]
  zeros = [jnp.zeros_like(s) for s in sums]
  weight = jnp.stack([jnp.asarray(c, jnp.float32) for c in weight])
  (top, bottom), _ = jax.lax.scan(add, (zeros, zeros), (weight, stacked))
  return [t / jnp.maximum(b, 1e-12) for t, b in zip(top, bottom, strict=True)]


def merge(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  density: float = 0.1,
  lam: ArrayLike = 1.2,
  weights: Sequence[ArrayLike] | None = None,
  granularity: str = "tensor",
  axis: int = -1,
) -> Float[Array, "*shape"]:
  """Merge arrays by competition.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays.
    density: fraction of a task's entries that may win.
    lam: λ, multiplies the merged change.
    weights: multiplies each task's winners; None means ones.
    granularity: "tensor" or "row".
    axis: along which a row lies.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> change = jnp.array([0.125, 0.25, 0.5, 1.0])
    >>> merge(jnp.zeros(4), (change,), density=0.5, lam=1.0).tolist()
    [0.0, 0.0, 0.0, 0.5]
  """
  base = w.astype(jnp.float32)
  deltas = [d.astype(jnp.float32) - base for d in donors]

  def one(*tasks: jax.Array) -> jax.Array:
    return compete([[t] for t in tasks], density=density, weights=weights)[0]

  change = rows.over(one, axis, *deltas) if granularity == "row" else one(*deltas)
  return (base + consensus.times(lam, change)).astype(w.dtype)


def merge_tree(
  tree: Mapping[str, tuple[jax.Array, tuple[jax.Array, ...]]],
  *,
  density: float = 0.1,
  lam: ArrayLike = 1.2,
  weights: Sequence[ArrayLike] | None = None,
) -> dict[str, jax.Array]:
  """Merge all arrays of a model as one vector.

  Args:
    tree: for each address the base's array and the donors' arrays.
    density: fraction of a task's entries that may win.
    lam: λ, multiplies the merged change.
    weights: multiplies each task's winners; None means ones.

  Returns:
    For each address the merged array.

  Example:
    >>> tree = {"a": (jnp.zeros(2), (jnp.ones(2),)), "b": (jnp.zeros(2), (jnp.array([2.0, 9.0]),))}
    >>> merge_tree(tree, density=0.5, lam=1.0)["b"].tolist()
    [0.0, 2.0]
  """
  bases = [w.astype(jnp.float32) for w, _ in tree.values()]
  count = len(next(iter(tree.values()))[1])
  tasks = [
    [d[i].astype(jnp.float32) - b for b, (_, d) in zip(bases, tree.values(), strict=True)]
    for i in range(count)
  ]
  changes = compete(tasks, density=density, weights=weights)
  return {
    a: (b + consensus.times(lam, c)).astype(w.dtype)
    for (a, (w, _)), b, c in zip(tree.items(), bases, changes, strict=True)
  }


@step.method("merge.pcb")
def pcb(
  *,
  models: Sequence[str] = (),
  density: varied.Varied = 0.1,
  lam: varied.Varied = 1.2,
  weights: Sequence[varied.Varied] | None = None,
  granularity: str = "tensor",
  select: str | None = None,
) -> step.Step:
  """Merge donors by parameter competition balancing.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    density: fraction of each donor's entries that may win, 0 to 1.
    lam: multiplies the merged change.
    weights: multiplies each donor's winners; None means ones.
    granularity: "tensor", "row", or "global" (the authors').
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a density outside 0 to 1 or an unknown granularity.

  Example:
    >>> pcb(density=0.05, granularity="global")
    (merge.pcb(density=0.05, granularity='global'),)

  Reference:
    Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(GRANULARITIES)}")
  weights_lib.check_shares(density, name="density")
  wants: dict[str, needs.Need] = {"donors": needs.Donors(tuple(models))}
  if granularity != "global":
    return lifting.over_leaves(
      merge,
      hyper={"density": density, "granularity": granularity, "axis": rows.AXIS},
      knobs={"lam": lam, "weights": weights},
      check=weights_lib.check,
      select=select,
      default=".*",
      domain=".*",
      wants=wants,
    )
  if any(varied.is_rules(x) for x in (density, lam, *(weights or ()))):
    raise ValueError("granularity='global' merges the model as one vector: nothing can vary in it")
  return _over_model(density, {"lam": lam, "weights": weights}, select or ".*", wants)


def _over_model(
  density: Any, knobs: Mapping, pattern: str, wants: Mapping[str, needs.Need]
) -> step.Step:
  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    del key
    found = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    tree = {a: (m.leaf(a), evidence["donors"][a]) for a in found}
    for address, (w, donors) in tree.items():
      step.check_donors(address, w, donors)
      weights_lib.check(len(donors), weights=knobs["weights"])
    tree = leaves.map_leaves(leaves.dense, tree)
    turned = jax.tree.map(jnp.float32, dict(knobs))
    return m.update(programs.compiled(merge_tree, (("density", density),))(tree, turned))

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def reselect(narrower: str) -> step.Step:
    return _over_model(density, knobs, step.both(pattern, narrower), wants)

  return step.Step(wants, apply, "model", {}, units, reselect)


def _at(parts: Parts, place: int) -> jax.Array:
  """Return the entry of arrays, taken as one vector, that ascending order puts at a place."""
  size = sum(x.size for x in parts)
  if size <= _FEW:
    return jnp.sort(jnp.concatenate([x.ravel() for x in parts]))[place]
  # Counting orders magnitudes, so what is negative is looked up from the other side.
  plus = _kth([jnp.maximum(x, 0.0) for x in parts], size - place)
  minus = _kth([jnp.maximum(-x, 0.0) for x in parts], place + 1)
  return jnp.where(minus > 0, -minus, plus)


def _kth(parts: Parts, k: int) -> jax.Array:
  """Return the k-th largest of arrays of no negative entry."""
  size = sum(x.size for x in parts)
  if size <= _FEW:
    return _at(parts, size - k)
  threshold, _ = trim.cut(parts, k)
  floor = jax.lax.bitcast_convert_type(threshold, jnp.float32)
  return jnp.min(jnp.stack([jnp.min(jnp.where(x >= floor, x, jnp.inf)) for x in parts]))


def _scaled(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  span = high - low
  return jnp.where(span > 0, (x - low) / jnp.where(span > 0, span, 1.0), 0.0)
