# SPDX-License-Identifier: Apache-2.0
"""ZipLM: remove heads and neurons by structured OBS, as many of each layer as a speedup needs.

Kurtic et al., "ZipLM: Inference-aware structured pruning of language models" (arXiv 2302.04089).
With H the second moment of what enters W, `attn/o` or `mlp/down`, removing the rows S of a unit and
letting the others make up for it costs tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S). The cheapest unit goes, W and H⁻¹
are updated, and so on: that is the order, and a database of errors at every level. What stays at a
level is what the updates arrive at, the least squares solution on the rows kept, H_KK⁻¹ H_K: W.
An integer program takes from each database the levels whose errors ||W'X - WX|| / ||WX|| add up to
the least within the cost that the target leaves. Then errors are weighted layer by layer by random
search, 10 % of the weights redrawn at a time, which keeps what has the lowest loss on the first
batch (the paper's structured SPDY).

One shot as a step; gradually as several, with distillation between, each speedup counted from the
model it is given. Grouped queries go with their key and value. Differences: a unit stays of every
block, so that it has a shape (the paper drops blocks whole); the integer program is exact where the
paper's dynamic program rounds costs. A dry run knows no errors and takes shares of units for them.
Neutral at speedup=1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.compress import allocate
from treesurgeon.compress.prune import latency as tables
from treesurgeon.compress.prune import shrink as shrinking
from treesurgeon.compress.prune import structured_obs
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, programs, step, tuning

SHRINK = 0.9  # widths tried are the powers of it
MUTATED = 0.1
KERNELS = {"attention": "attn/o/kernel", "mlp": "mlp/down/kernel"}
Item = tuple[int, str]  # layer, part
Plan = dict[Item, int]  # units that stay


def levels(units: int, part: str) -> list[int]:
  """List how many units a block may keep.

  Args:
    units: how many it has.
    part: "attention", any number; "mlp", shrinking by a tenth.

  Returns:
    Numbers, descending, down to 1.

  Example:
    >>> levels(3, "attention"), levels(10, "mlp")[:3]
    ([3, 2, 1], [10, 9, 8])
  """
  if part == "attention":
    return list(range(units, 0, -1))
  sizes, now = {units, 1}, float(units)
  while now > 1:
    sizes.add(round(now))
    now *= SHRINK
  return sorted(sizes, reverse=True)


@step.method("compress.prune.ziplm")
def ziplm(
  *,
  speedup: float = 2.0,
  latency: str = "weights",
  search: int = 1000,
  damping: float = 0.01,
) -> step.Step:
  """Remove heads and neurons until a model is as much faster as asked.

  Args:
    speedup: cost before over cost after; 1 is the neutral setting.
    latency: "weights" counts them, "measured" times this machine, else a JSON file (`latency`).
    search: how often the weights of the layers' errors are redrawn; 0 leaves them equal.
    damping: added to the diagonal of second moments, relative to their mean.

  Returns:
    A transform of whole models; it rewrites the architecture too. Its lineage tells what every
    layer keeps, and the cost before and after.

  Raises:
    ValueError: for values out of range; when applied, for a target that cannot be met.

  Example:
    >>> ziplm(speedup=1.5)
    (compress.prune.ziplm(speedup=1.5),)

  Reference:
    Kurtic et al., ZipLM: Inference-Aware Structured Pruning of Language Models, 2023,
    arXiv:2302.04089.
  """
  if speedup < 1:
    raise ValueError(f"speedup={speedup} must be at least 1")
  if search < 0:
    raise ValueError(f"search={search} must not be negative")
  if not 0 < damping < 1:
    raise ValueError(f"damping={damping}: valid is above 0 and below 1, usually 0.01")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    if speedup == 1:
      return m
    shrinking.check(m)
    table = tables.named(latency, m.spec)
    job = Job(m, evidence["inputs"], table, speedup, damping)
    plan = job.plan(np.ones(len(job.items)))
    batches = list(evidence["batches"])
    if search and batches and not job.traced:
      plan = _searched(job, plan, batches[0], search, key)
    return tuning.noted(job.apply(plan), job.told(plan))

  pattern = r"layers/\d+/(attn/o|mlp/down)/kernel"
  wants = {"inputs": needs.Statistic("second_moment", select=pattern), "batches": needs.Batches()}
  return tuning.over_model(apply, wants)


class Job:
  """The database of one model, and what can be made of it.

  Args:
    m: the model.
    inputs: second moments by address.
    table: costs.
    speedup: the target.
    damping: see `structured_obs`.

  Attributes:
    items: every layer's parts.
    traced: whether errors are unknown, in a dry run.
  """

  def __init__(
    self,
    m: model_lib.Model,
    inputs: Mapping[str, Any],
    table: tables.Table,
    speedup: float,
    damping: float,
  ):
    self.m, self.inputs, self.table, self.damping = m, inputs, table, damping
    self.items: list[Item] = [(i, p) for i in range(m.spec.num_layers) for p in KERNELS]
    self.sizes = [self.units(*item) for item in self.items]
    self.options = [levels(n, p) for n, (_, p) in zip(self.sizes, self.items, strict=True)]
    self.costs = [
      [table.cost(p, k) for k in options]
      for (_, p), options in zip(self.items, self.options, strict=True)
    ]
    self.whole = sum(c[0] for c in self.costs) + table.other
    self.budget = self.whole / speedup - table.other
    found = [self._removal(*item) for item in self.items]
    self.order = [o for o, _ in found]
    self.traced = any(isinstance(e, jax.core.Tracer) for _, e in found)
    self.errors = [
      [1 - k / n if self.traced else float(e[n - k]) for k in options]
      for (_, e), n, options in zip(found, self.sizes, self.options, strict=True)
    ]
    self._made: dict[tuple[int, int], jax.Array] = {}

  def units(self, layer: int, part: str) -> int:
    """Count the units that a block has."""
    return self.m.spec.per_layer("num_kv_heads" if part == "attention" else "d_ff")[layer]

  def block(self, layer: int, part: str) -> int:
    """Count the rows of a unit."""
    if part == "mlp":
      return 1
    heads = self.m.spec.per_layer("num_heads")[layer]
    return self.m.spec.head_dim * heads // self.units(layer, part)

  def plan(self, weights: np.ndarray) -> Plan:
    """Choose a level for every block, its errors weighted."""
    losses = [[w * e for e in errors] for w, errors in zip(weights, self.errors, strict=True)]
    picks = allocate.solve(self.costs, losses, self.budget, unit=self.table.unit)
    return {
      item: options[k] for item, options, k in zip(self.items, self.options, picks, strict=True)
    }

  def kept(self, index: int, count: int) -> jax.Array:
    """List the units of a block that stay."""
    return jnp.sort(self.order[index][self.sizes[index] - count :])

  def kernel(self, index: int, count: int) -> jax.Array:
    """Compute the rows that stay of a block's output kernel."""
    if (index, count) not in self._made:
      layer, part = self.items[index]
      address = f"layers/{layer}/{KERNELS[part]}"
      w = self.m.leaf(address)
      rows = shrinking.entries(self.kept(index, count), self.block(layer, part))
      solve = programs.compiled(structured_obs.refit, (("damping", self.damping),))
      made = solve(w, {"h": self.inputs[address].moment, "kept": rows})
      self._made[index, count] = made.astype(w.dtype)
    return self._made[index, count]

  def silenced(self, plan: Plan) -> model_lib.Model:
    """Make the model of a plan in the old shapes, zeros in the place of what goes."""
    changes = {}
    for index, (layer, part) in enumerate(self.items):
      count = plan[layer, part]
      if count < self.sizes[index]:
        address = f"layers/{layer}/{KERNELS[part]}"
        rows = shrinking.entries(self.kept(index, count), self.block(layer, part))
        changes[address] = (
          jnp.zeros_like(self.m.leaf(address)).at[rows].set(self.kernel(index, count))
        )
    return self.m.update(changes)

  def apply(self, plan: Plan) -> model_lib.Model:
    """Make the model of a plan."""
    spec, units = self.m.spec, {}
    for index, item in enumerate(self.items):
      units[item] = self.kept(index, plan[item])
    layers = range(spec.num_layers)
    groups = [self.block(i, "attention") // spec.head_dim for i in layers]
    small = shrinking.shrink(
      self.m,
      shrinking.Units(
        None,
        [units[i, "mlp"] for i in layers],
        [shrinking.entries(units[i, "attention"], groups[i]) for i in layers],
        [units[i, "attention"] for i in layers],
      ),
    )
    changed = [i for i, item in enumerate(self.items) if plan[item] < self.sizes[i]]
    return small.update(
      {
        f"layers/{self.items[i][0]}/{KERNELS[self.items[i][1]]}": self.kernel(
          i, plan[self.items[i]]
        )
        for i in changed
      }
    )

  def told(self, plan: Plan) -> dict[str, Any]:
    """Say for the lineage what stays and what it costs."""
    after = sum(self.table.cost(p, k) for (_, p), k in plan.items()) + self.table.other
    return {
      "kept": {p: [k for (_, q), k in plan.items() if q == p] for p in KERNELS},
      "cost": [self.whole, after],
      "unit": self.table.unit,
    }

  def _removal(self, layer: int, part: str) -> tuple[jax.Array, jax.Array]:
    address = f"layers/{layer}/{KERNELS[part]}"
    hyper = (("block", self.block(layer, part)), ("damping", self.damping))
    given = {"h": self.inputs[address].moment}
    return programs.compiled(structured_obs.removal, hyper)(self.m.leaf(address), given)


def _searched(job: Job, plan: Plan, batch: Any, count: int, key: jax.Array) -> Plan:
  """Redraw some of the errors' weights again and again; keep what has the lowest loss."""
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  loss = programs.compiled(_loss, (("spec", job.m.spec),))
  weights = np.ones(len(job.items))
  seen: dict[tuple[int, ...], float] = {}

  def measure(plan: Plan) -> float:
    name = tuple(plan.values())
    if name not in seen:
      seen[name] = float(loss(job.silenced(plan).params, {"batch": batch}))
    return seen[name]

  best = measure(plan)
  for _ in range(count):
    other = weights.copy()
    some = rng.choice(len(other), size=max(1, round(MUTATED * len(other))), replace=False)
    other[some] = rng.random(len(some))
    trial = job.plan(other)
    if (found := measure(trial)) < best:
      best, plan, weights = found, trial, other
  return plan


def _loss(params: Any, batch: Any, *, spec: models.Spec) -> jax.Array:
  return models.nll(spec, params, batch)
