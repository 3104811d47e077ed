# SPDX-License-Identifier: Apache-2.0
"""PELA: factorize a network, then go on pre-training the factors beside the network they came from.

Guo et al., "PELA: Learning parameter-efficient models with low-rank approximation" (arXiv
2310.10700). Kernels become truncated SVDs, of half the numbers in their code; then the small
network trains on

  task loss + a mean_l ||h_l - h'_l||² + p mean_k (max |A_k B_k - W_k| - e)²,

where h are the outputs of the blocks, mean squares over their entries, and W the kernels factorized
of the frozen original. The last term keeps the product within a bound of what it stands for. As in
the code a = 1, p = 1, and e = 0. The task loss is the cross entropy of the batches' labels. Adam at
a constant rate, float32 masters; all of the small network trains. Neutral at a full rank and
steps=0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress.distill import losses, student
from treesurgeon.compress.low_rank import svd
from treesurgeon.core import descend, leaves, needs, paths, step, tuning
from treesurgeon.core import model as model_lib


def perturbation(
  factors: Mapping[str, leaves.LowRank], originals: Mapping[str, Array], *, bound: float
) -> Float[Array, ""]:
  """Compute how far products stray from the bound around the kernels they stand for.

  Args:
    factors: thin factors by name, with or without a leading layer axis.
    originals: the kernels.
    bound: e, the largest change of an entry that is aimed at.

  Returns:
    The mean over kernels of the squared excess, float32.

  Example:
    >>> thin = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> float(perturbation({"w": thin}, {"w": jnp.full((2, 2), 3.0)}, bound=0.5))
    2.25
  """
  each = []
  for name, thin in factors.items():
    change = jnp.abs(thin.dense().astype(jnp.float32) - originals[name].astype(jnp.float32))
    each.append(jnp.square(change.max(axis=(-2, -1)) - bound).reshape(-1))
  return jnp.concatenate(each).mean() if each else jnp.float32(0)


def loss(
  plan: tuple[Any, float], train: Any, batch: Any, key: jax.Array, rest: Any, given: Any
) -> jax.Array:
  """Compute the loss of the factorized network.

  Args:
    plan: (architecture, bound).
    train: stored name to what trains.
    batch: tokens or images.
    key: unused.
    rest: stored name to what does not train.
    given: the original's parameters, its kernels under the factors' names, the terms' weights.

  Returns:
    The loss.
  """
  del key
  spec, bound = plan
  teacher, originals, (features, pull) = given
  params = paths.nest({**rest, **train})
  thin = {n: x for n, x in train.items() if n in originals}
  near = losses.difference(spec, params, teacher, models.inputs(batch))
  return (
    models.nll(spec, params, batch)
    + features * near
    + pull * perturbation(thin, originals, bound=bound)
  )


@step.method("compress.low_rank.pela")
def pela(
  *,
  rank: int | None = None,
  ratio: float = 0.5,
  features: float = 1.0,
  perturbation: float = 1.0,
  bound: float = 0.0,
  steps: int = 500,
  rate: float = 1e-4,
  select: str | None = None,
) -> step.Step:
  """Factorize kernels and train the small network beside the one it came from.

  Args:
    rank: inner dimension; one that is full leaves a kernel as it is.
    ratio: share of a kernel's numbers that its factors hold, where there is no rank.
    features: a, weight of the difference of the blocks' outputs.
    perturbation: p, weight of the bound on the change of kernels.
    bound: e, the largest change of an entry that is aimed at.
    steps: updates; 0 only factorizes.
    rate: Adam's step.
    select: which addresses are factorized; None is every kernel inside the layers.

  Returns:
    A transform. It reads the batches in turn, as often as the steps ask.

  Raises:
    ValueError: for values out of range; when applied, without data.

  Example:
    >>> pela(ratio=0.67)
    (compress.low_rank.pela(ratio=0.67),)

  Reference:
    Guo et al., PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, 2023,
    arXiv:2310.10700.
  """
  svd.check(rank=rank, ratio=ratio)
  tuning.check(features=features, perturbation=perturbation, bound=bound, steps=steps, rate=rate)
  (factorize,) = svd.svd(rank=rank, ratio=ratio, select=select)

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    thin = factorize.apply(m, {}, key)
    batches = list(evidence["batches"])
    if not steps or not tuning.learnable(m, batches):
      return thin
    train, rest = student.masters(thin)
    given = m.params, _originals(m, train), (jnp.float32(features), jnp.float32(perturbation))
    train, course = descend.minimize(
      loss, train, batches, rest, given, optimizer=tuning.adam(rate), steps=steps,
      spec=(m.spec, bound),
    )  # fmt: skip
    told = {"first_loss": float(course[0]), "last_loss": float(course[-1])} if len(course) else {}
    return tuning.noted(student.put(thin, train), {"steps": steps, **told})

  return tuning.over_model(apply, {"batches": needs.Batches()})


def _originals(m: model_lib.Model, train: Mapping[str, Any]) -> dict[str, Any]:
  """Find the kernels that factors stand for, stacked as the factors are."""
  out = {}
  for name in (n for n, x in train.items() if isinstance(x, leaves.LowRank)):
    parts = name.split("/", 2)
    if parts[0] == "layers":
      start, stop = map(int, parts[1].split(":"))
      out[name] = paths.stack([m.leaf(f"layers/{i}/{parts[2]}") for i in range(start, stop)])
    else:
      out[name] = m.leaf(name)
  return {n: leaves.dense(x) for n, x in out.items()}
