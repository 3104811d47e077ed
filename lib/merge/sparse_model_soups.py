# SPDX-License-Identifier: Apache-2.0
"""Sparse model soups: prune once, retrain copies under one mask, average them; in rounds.

Zimmer et al., "Sparse model soups: a recipe for improved pruning via model averaging", 2023
(arXiv 2306.16788). Models that were pruned apart have zeros in different places, so their average
is dense. Copies of one pruned model that keep its mask, and differ in the order of the data and in
weight decay only, average to a model with that very mask; the next round prunes the average.

Pruning is `compress.prune.magnitude`. Over R rounds each removes the same share of what is left, so
that the last ends at `sparsity`. The copies train side by side in one program, with Adam and a
linearly falling step; their average is uniform. There is no batch norm whose statistics would
have to be estimated again. The mask is exact: a pruned entry is zero in the result. float32
masters, storage dtype kept. Neutral at sparsity=0, steps=0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models as networks
from treesurgeon.compress.prune import magnitude
from treesurgeon.core import descend, needs, paths, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import mixture


def average(copies: jax.Array, start: jax.Array) -> jax.Array:
  """Average copies of an array along the first axis.

  Args:
    copies: (m, ...).
    start: what all copies began from; where none has moved the result is it, to the bit.

  Returns:
    The average.

  Example:
    >>> average(jnp.array([[1.0], [2.0]]), jnp.array([0.5])).tolist()
    [1.5]
  """
  return start + (copies - start[None]).mean(axis=0)


def loss(spec: Any, copies: Any, batch: Any, key: jax.Array, masks: Any, decay: Any) -> jax.Array:
  """Add the losses of all copies, each on its own batch; gradients do not mix.

  Args:
    spec: the architecture.
    copies: stored name to array, copies along the first axis.
    batch: batches, copies along the first axis.
    key: not used.
    masks: stored name to 0 and 1, without the copies' axis.
    decay: (m,) weight of half the squared parameters.

  Returns:
    The sum.
  """
  del key

  def one(flat: Any, mine: Any, weight: jax.Array) -> jax.Array:
    kept = {n: x * masks[n] for n, x in flat.items()}
    square = sum(jnp.sum(x * x) for x in kept.values())
    return networks.nll(spec, paths.nest(kept), mine) + 0.5 * weight * square

  return jax.vmap(one)(copies, batch, decay).sum()


@step.method("merge.sparse_model_soups")
def sparse_model_soups(
  *,
  sparsity: float = 0.9,
  rounds: int = 1,
  copies: int = 3,
  steps: int = 300,
  rate: float = 1e-3,
  decay: Sequence[float] = (0.0, 1e-4, 5e-4),
  pattern: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Prune a model, retrain several copies that keep the mask, and average them, in rounds.

  Args:
    sparsity: fraction of the selected weights that is zero in the end.
    rounds: prune-retrain-average cycles.
    copies: models a round; 1 is iterative magnitude pruning.
    steps: updates a round, each on one batch a copy.
    rate: Adam's step at the start of a round.
    decay: weight decay of the copies, in turn.
    pattern: "n:m" keeps n of every m consecutive inputs, in place of `sparsity`; one round.
    select: which addresses are pruned; None is every kernel inside the layers. All leaves train.

  Returns:
    A transform. It needs batches of one shape.

  Raises:
    ValueError: for arguments out of range, no data, or batches of several shapes.

  Example:
    >>> sparse_model_soups(sparsity=0.8, rounds=2)
    (merge.sparse_model_soups(sparsity=0.8, rounds=2),)

  Reference:
    Zimmer et al., Sparse model soups, 2023, arXiv 2306.16788.
  """
  tuning.check(steps=steps, rate=rate)
  if rounds < 1 or copies < 1 or not decay or (pattern is not None and rounds != 1):
    raise ValueError(
      f"rounds={rounds} and copies={copies} must be at least 1 (with a pattern, rounds is 1) and "
      f"decay={tuple(decay)} not empty"
    )
  shares = [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds + 1)]
  cuts = [magnitude.magnitude(sparsity=s, pattern=pattern, select=select)[0] for s in shares]

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    batches = list(evidence["batches"])
    learns = bool(steps) and tuning.learnable(m, batches)
    chosen = {a for unit in cuts[0].units(m.addresses()) for a in unit}
    weight = jnp.asarray(np.resize(np.asarray(decay, np.float32), copies))
    _check_shapes(batches)
    for i, cut in enumerate(cuts):
      m = cut.apply(m, {}, key)
      start, masks = tuning.masters(m), _masks(m, chosen)
      mean = start
      if learns:
        many = {n: jnp.broadcast_to(x[None], (copies, *x.shape)) for n, x in start.items()}
        many, _ = descend.minimize(
          loss,
          many,
          _dealt(batches, copies, steps, seed=i),
          masks,
          weight,
          optimizer=_falling(rate, steps),
          steps=steps,
          spec=m.spec,
        )
        mean = {n: average(many[n], start[n]) * masks[n] for n in start}
      m = tuning.put(m, mean)
    return tuning.noted(m, {"sparsity": shares, "copies": copies, "steps": steps})

  def units(names: Sequence[str]) -> step.Units:
    cuts[0].units(names)  # raises if nothing is to be pruned
    return [tuple(names)]

  made = tuning.over_model(apply, {"batches": needs.Batches()})
  return made._replace(units=units)


def _masks(m: model_lib.Model, chosen: set[str]) -> dict[str, jax.Array]:
  """Tell, for every stored leaf, what may be other than zero: all that was not up for pruning."""
  out = {}
  for name, x in tuning.masters(m).items():
    inside = np.array([a in chosen for a in mixture.addresses(name)])
    shape = (-1 if mixture.stacked(name) else 1,) + (1,) * (x.ndim - 1)
    out[name] = jnp.where(jnp.asarray(inside).reshape(shape[: x.ndim]), x != 0, True)
    out[name] = out[name].astype(jnp.float32)
  return out


def _dealt(batches: list[Any], copies: int, steps: int, *, seed: int) -> list[Any]:
  """Give every copy the batches in an order of its own, one step after another."""
  orders = []
  for copy in range(copies):
    rng = np.random.default_rng([seed, copy])
    epochs = -(-steps // len(batches))
    orders.append(np.concatenate([rng.permutation(len(batches)) for _ in range(epochs)]))
  return [
    jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *(batches[o[t]] for o in orders))
    for t in range(steps)
  ]


def _check_shapes(batches: Sequence[Any]) -> None:
  found = {str(jax.tree.map(np.shape, b)) for b in batches}
  if len(found) > 1:
    first, second = sorted(found)[:2]
    raise ValueError(f"batches must have one shape; these have {first} and {second}")


@functools.lru_cache(maxsize=32)
def _falling(rate: float, steps: int) -> optax.GradientTransformation:
  return optax.adam(optax.linear_schedule(rate, 0.0, steps))
