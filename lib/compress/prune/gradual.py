# SPDX-License-Identifier: Apache-2.0
"""Gradual magnitude pruning: prune a little, train, prune more, along a cubic curve.

Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv 1710.01878): from step t0 on, every dt steps
and n dt steps long, the masks are renewed so that s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3
of the weights are zero. The network learns most of what it lost between two prunings, and most is
pruned early, where weights to spare are many.

The masks are those of jaxpruner: the smallest weights of every matrix go, and what is pruned is set
to zero after each update, so it is the first to go next time (the authors' code keeps its values
behind the mask). Exactly int(s_t n) weights of a matrix are zero; jaxpruner rounds, and is a step
ahead on the curve. With an N:M pattern each run of m loses int(s_t m). All leaves train, by Adam
with a linearly falling step, in float32 masters; the storage dtype is kept. Where `until` ends the
curve, the masks stay and training goes on. steps=0 prunes at once. Neutral at sparsity=0, steps=0.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models as networks
from treesurgeon.compress.prune import magnitude, masks
from treesurgeon.core import descend, needs, paths, step, tuning
from treesurgeon.core import model as model_lib


class Plan(NamedTuple):
  """When how much of what is pruned; hashable.

  Attributes:
    chosen: for each stored leaf that is pruned, its name and whether each of its layers is (one
      entry outside the layers).
    shares: fraction that is zero after each pruning.
    begin: step of the first pruning.
    every: steps between two.
    pattern: (n, m), or None.
  """

  chosen: tuple[tuple[str, tuple[bool, ...]], ...]
  shares: tuple[float, ...]
  begin: int
  every: int
  pattern: tuple[int, int] | None = None


class State(NamedTuple):
  """What the pruning optimizer remembers.

  Attributes:
    count: steps done.
    masks: name to what may be other than zero.
    inner: state of the optimizer within.
  """

  count: jax.Array
  masks: dict[str, jax.Array]
  inner: Any


def cubic(final: float, *, initial: float = 0.0, updates: int) -> tuple[float, ...]:
  """Compute the sparsities of the cubic curve.

  Args:
    final: the last.
    initial: the first.
    updates: intervals between them, n.

  Returns:
    n + 1 fractions.

  Example:
    >>> cubic(0.8, updates=2)
    (0.0, 0.7, 0.8)
  """
  return tuple(
    float(round(final + (initial - final) * (1 - k / updates) ** 3, 12)) for k in range(updates + 1)
  )


def pruning(inner: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformation:
  """Make an optimizer prune what it trains.

  Args:
    inner: any optimizer.
    plan: when how much of what.

  Returns:
    An optimizer over a flat mapping from stored name to array, after whose updates what is pruned
    is zero.

  Example:
    >>> plan = Plan((("w", (True,)),), (0.5,), 0, 1)
    >>> sgd, w = pruning(optax.sgd(0.5), plan), {"w": jnp.array([[1.0], [-3.0]])}
    >>> optax.apply_updates(w, sgd.update(w, sgd.init(w), w)[0])["w"].tolist()
    [[0.0], [-1.5]]
  """

  def init(params: Any) -> State:
    whole = {name: jnp.ones(params[name].shape, bool) for name, _ in plan.chosen}
    return State(jnp.zeros((), jnp.int32), whole, inner.init(params))

  def update(grads: Any, state: State, params: Any) -> tuple[Any, State]:
    turn, off = jnp.divmod(state.count - plan.begin, plan.every)
    due = (off == 0) & (turn >= 0) & (turn < len(plan.shares))
    turn = jnp.clip(turn, 0, len(plan.shares) - 1)
    kept = jax.lax.cond(
      due,
      lambda old: {n: _keep(params[n], inside, plan, turn) for n, inside in plan.chosen},
      lambda old: old,
      state.masks,
    )
    moves: Any
    moves, held = inner.update(grads, state.inner, params)
    gone = {n: jnp.where(keep, moves[n], -params[n]) for n, keep in kept.items()}
    return {**moves, **gone}, State(state.count + 1, kept, held)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


@step.method("compress.prune.gradual")
def gradual(
  *,
  sparsity: float = 0.9,
  initial: float = 0.0,
  steps: int = 1000,
  begin: int = 0,
  every: int = 100,
  until: float = 0.75,
  rate: float = 1e-3,
  pattern: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Train a model while its smallest weights are pruned, ever more of them.

  Args:
    sparsity: fraction of every selected matrix that is zero in the end.
    initial: fraction that is zero after the first pruning.
    steps: updates, each on one batch.
    begin: step of the first pruning.
    every: steps between two; the paper's are 100 to 1000.
    until: share of the steps at which pruning is complete; the rest recovers.
    rate: Adam's step at the start.
    pattern: "n:m" leaves n of every m consecutive inputs in the end, in place of `sparsity`.
    select: which addresses are pruned; None is every kernel inside the layers. All leaves train.

  Returns:
    A transform. It needs batches of one shape.

  Raises:
    ValueError: for arguments out of range, steps that leave no time for the curve, or no data.

  Example:
    >>> gradual(sparsity=0.8, steps=2000)
    (compress.prune.gradual(sparsity=0.8, steps=2000),)

  Reference:
    Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
    compression, 2017, arXiv:1710.01878.
  """
  tuning.check(steps=steps, rate=rate, begin=begin)
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=False)
  final = sparsity if n_m is None else 1 - n_m[0] / n_m[1]
  if not 0 <= initial <= final:
    raise ValueError(f"initial={initial} must lie between 0 and the final sparsity {final}")
  if every < 1 or not 0 < until <= 1:
    raise ValueError(f"every={every} must be at least 1 and until={until} between 0 and 1")
  updates = int(until * steps - begin) // every
  if steps and updates < 1:
    raise ValueError(
      f"steps={steps} with begin={begin}, until={until} leaves no time for two prunings, "
      f"every={every} steps; give more steps or a smaller every"
    )
  (cut,) = magnitude.magnitude(sparsity=sparsity, pattern=pattern, select=select)

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    batches = list(evidence["batches"])
    losses = np.zeros(0)
    jax.eval_shape(lambda p: cut.apply(m.replace(params=p), {}, key).params, m.params)  # may refuse
    if steps and tuning.learnable(m, batches):
      chosen = {a for unit in cut.units(m.addresses()) for a in unit}
      shares = cubic(final, initial=initial, updates=updates)
      plan = Plan(_inside(m, chosen), shares, begin, every, n_m)
      found, losses = descend.minimize(
        _loss, tuning.masters(m), batches, optimizer=_optimizer(plan, rate, steps), steps=steps,
        spec=m.spec,
      )  # fmt: skip
      m = tuning.put(m, found)
    m = cut.apply(m, {}, key)  # changes nothing after the last pruning
    ends = {"first_loss": float(losses[0]), "last_loss": float(losses[-1])} if len(losses) else {}
    return tuning.noted(m, {"steps": steps, "updates": updates, **ends})

  def units(names: Sequence[str]) -> step.Units:
    cut.units(names)  # raises if nothing is to be pruned
    return [tuple(names)]

  return tuning.over_model(apply, {"batches": needs.Batches()})._replace(units=units)


def _keep(w: jax.Array, inside: tuple[bool, ...], plan: Plan, turn: jax.Array) -> jax.Array:
  score = jnp.abs(w)
  if plan.pattern is not None:
    m = plan.pattern[1]
    left = jnp.asarray([m - int(s * m + 1e-9) for s in plan.shares], jnp.int32)[turn]
    keep = masks.n_of_m(score, n=left, m=m)
  else:
    size = w.shape[-2] * w.shape[-1]
    left = jnp.asarray([size - int(s * size) for s in plan.shares], jnp.int32)[turn]
    keep = masks.top(score.reshape(*w.shape[:-2], size, 1), left).reshape(w.shape)
  if all(inside):
    return keep
  return jnp.where(jnp.asarray(inside).reshape((-1,) + (1,) * (w.ndim - 1)), keep, True)


def _inside(m: model_lib.Model, chosen: set[str]) -> tuple[tuple[str, tuple[bool, ...]], ...]:
  out = []
  for name, x in paths.walk(m.params).items():
    hits = tuple(a in chosen for a in paths.addresses(paths.nest({name: x})))
    if any(hits):
      out.append((name, hits))
  return tuple(out)


def _loss(spec: Any, flat: Any, batch: Any, key: jax.Array) -> jax.Array:
  del key
  return networks.nll(spec, paths.nest(flat), batch)


@functools.lru_cache(maxsize=32)
def _optimizer(plan: Plan, rate: float, steps: int) -> optax.GradientTransformation:
  return pruning(optax.adam(optax.linear_schedule(rate, 0.0, steps)), plan)
