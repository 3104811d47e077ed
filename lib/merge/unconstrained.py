# SPDX-License-Identifier: Apache-2.0
"""Unconstrained merging of models of one architecture: search each layer's method and coefficients.

Zhang et al., "Unconstrained model merging for enhanced LLM reasoning", 2024 (arXiv 2410.13699),
its homogeneous half: an evolutionary search (CMA-ES) over fine-grained, layer-wise recipes on
held-out data. (The heterogeneous half is `fuse.py`.) Each layer, and what lies outside the layers
as one more, has a coefficient a donor and a choice among task arithmetic, TIES and DARE, which are
here three ways to prepare the donors' changes: as they are, trimmed and freed of entries against
the elected sign, or dropped at random and rescaled. Then θ = θ₀ + Σ c_i τ̂_i.

No code was published with the paper: which methods a layer may choose from, and how the choice is
encoded (the largest of one score a method), are ours. The start, task arithmetic at `init`, is the
incumbent, so the outcome is never worse than it on the data. All candidates run one program.
While shapes are traced (a dry run) nothing is searched. Neutral at init=0, budget=1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from treesurgeon import models as networks
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, step, tuning
from treesurgeon.merge import adamerging, mixed_models, mixture, search

METHODS = ("task_arithmetic", "ties", "dare")


@functools.partial(jax.jit, static_argnames=("methods", "density"))
def prepared(
  parts: mixture.Parts, key: jax.Array, *, methods: tuple[str, ...], density: float
) -> mixture.Parts:
  """Prepare the donors' changes by several methods.

  Args:
    parts: base and donors.
    key: of DARE's random masks.
    methods: names out of `METHODS`.
    density: what TIES and DARE keep.

  Returns:
    The same with len(methods) donors for each, one method after another.
  """
  donors: list[Any] = []
  for method in methods:
    if method == "task_arithmetic":
      donors += parts.donors
    elif method == "ties":
      donors += adamerging.agreeing(parts, density=density).donors
    else:
      for i, donor in enumerate(parts.donors):
        mine = jax.random.fold_in(key, i)
        donors.append({n: _dropped(parts.base[n], x, mine, n, density) for n, x in donor.items()})
  return mixture.Parts(parts.base, tuple(donors), parts.rest)


@functools.partial(jax.jit, static_argnames=("methods", "donors", "layers"))
def recipe(genome: Any, *, methods: int, donors: int, layers: int) -> dict[str, Any]:
  """Read a genome as coefficients of prepared donors: those of methods not chosen are zero.

  Args:
    genome: (layers + 1) rows of one coefficient a donor and one score a method.
    methods: how many methods.
    donors: how many donors.
    layers: how many layers; the last row is for what lies outside them.

  Returns:
    Coefficients as `mixture.start` shapes them for granularity "layer".

  Example:
    >>> c = recipe(np.array([0.5, 0.1, 0.9]), methods=2, donors=1, layers=0)
    >>> c["rest"].tolist()
    [0.0, 0.5]
  """
  rows = jnp.asarray(genome, jnp.float32).reshape(layers + 1, donors + methods)
  weight, score = rows[:, :donors], rows[:, donors:]
  chosen = jax.nn.one_hot(jnp.argmax(score, axis=1), methods)
  each = chosen[:, :, None] * weight[:, None, :]
  flat = each.reshape(layers + 1, methods * donors).T
  return {"layers": flat[:, :layers], "rest": flat[:, layers]}


@step.method("merge.unconstrained")
def unconstrained(
  *,
  models: Sequence[str] = (),
  methods: Sequence[str] = METHODS,
  density: float = 0.3,
  low: float = 0.0,
  high: float = 1.0,
  init: float = 0.3,
  budget: int = 200,
  sigma: float = 0.2,
  select: str | None = None,
) -> step.Step:
  """Search each layer's way of merging, and its coefficients, by evolution on held-out data.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    methods: what a layer may choose from: "task_arithmetic", "ties", "dare".
    density: fraction of the changes that TIES and DARE keep.
    low: smallest coefficient.
    high: largest coefficient.
    init: coefficient to begin from, of the first method.
    budget: how many candidates to try, the start included.
    sigma: first spread of the search, relative to the bounds.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; its lineage tells each layer's method and coefficients.

  Raises:
    ValueError: for an argument out of range; when applied, if there is no data.

  Example:
    >>> unconstrained(methods=("task_arithmetic",), budget=50)
    (merge.unconstrained(methods=('task_arithmetic',), budget=50),)

  Reference:
    Zhang et al., Unconstrained model merging for enhanced LLM reasoning, 2024, arXiv 2410.13699.
  """
  methods = tuple(methods)
  odd = [name for name in methods if name not in METHODS]
  if odd or not methods:
    raise ValueError(f"methods={methods!r}; valid: some of {', '.join(METHODS)}")
  if not 0 < density <= 1 or not low <= init <= high or budget < 1 or sigma <= 0:
    raise ValueError(
      f"density={density} must lie in (0, 1], init={init} between low={low} and high={high}, "
      f"budget={budget} be at least 1 and sigma={sigma} above 0"
    )
  pattern = select or ".*"

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    plan, parts = mixed_models.gather(m, evidence["donors"], pattern, granularity="layer")
    size = {"methods": len(methods), "donors": len(parts.donors), "layers": plan.layers}
    parts = prepared(parts, key, methods=methods, density=density)
    row = [init] * size["donors"] + [1.0] + [0.0] * (len(methods) - 1)
    start, best = np.tile(row, plan.layers + 1), None
    batches = list(evidence["batches"])
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((m.params, parts.base)))
    if tuning.learnable(m, batches) and not traced:
      shape = [low] * size["donors"] + [0.0] * len(methods)
      most = [high] * size["donors"] + [1.0] * len(methods)
      found = search.minimize(
        lambda x: _loss(plan, parts, recipe(x, **size), batches),
        start=start,
        low=np.tile(shape, plan.layers + 1),
        high=np.tile(most, plan.layers + 1),
        budget=budget,
        seed=int(jax.random.randint(key, (), 0, 2**31 - 1)),
        sigma=sigma,
      )
      start, best = found.x, found
    new = mixed_models.put(m, plan, parts, recipe(start, **size))
    if best is None:
      return new
    rows = start.reshape(plan.layers + 1, -1)
    note = {
      "first_loss": best.values[0],
      "loss": best.value,
      "candidates": len(best.values),
      "recipe": [
        {
          "layer": i if i < plan.layers else "outside",
          "method": methods[int(np.argmax(row[size["donors"] :]))],
          "weights": row[: size["donors"]].tolist(),
        }
        for i, row in enumerate(rows)
      ],
    }
    return new.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), **note}})

  return adamerging.over_model(apply, models, pattern, needs.Batches())


def _dropped(w: Any, donor: Any, key: jax.Array, name: str, density: float) -> jax.Array:
  """Drop entries of a change at random and rescale the others, layer by layer."""
  base = w.astype(jnp.float32)
  names = mixture.addresses(name)
  shape = w.shape[1:] if mixture.stacked(name) else w.shape
  each = [jax.random.bernoulli(step.leaf_key(key, a), density, shape) for a in names]
  keep = jnp.stack(each) if mixture.stacked(name) else each[0]
  return base + jnp.where(keep, (donor.astype(jnp.float32) - base) / density, 0.0)


def _loss(plan: mixture.Plan, parts: Any, coefficients: Any, batches: Sequence[Any]) -> float:
  values = [_nll(plan, parts, coefficients, b) for b in batches]
  return float(np.mean([float(v) for v in values]))


@functools.partial(jax.jit, static_argnums=0)
def _nll(plan: mixture.Plan, parts: Any, coefficients: Any, batch: Any) -> jax.Array:
  return networks.nll(plan.spec, mixture.network(plan, parts, coefficients), batch)
