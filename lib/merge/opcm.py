# SPDX-License-Identifier: Apache-2.0
"""OPCM: merge models one after another, each cleaned of what the merge already holds.

The first donor's change begins the total S. Of each further change τ the part is removed that lies
in the leading singular block of S (the r directions that carry the share alpha of its singular
values), and the rest of the diagonal, so that what is added is orthogonal to S; the sum is brought
to the mean norm of the changes seen so far. Tang et al., "Merging models on the fly without
retraining: a sequential approach to scalable continual model merging", 2025 (arXiv 2501.09522),
after FusionBench's official code. Leaves other than linear layers' matrices are added plainly, as
there. Only S and one donor's leaf are in memory at a time, however many donors there are.

There the running merge is λ_t-scaled at each step and scaled back at the next. The projection does
not see the scale, so this cancels but for the last: S is kept as it is and scaled once. The norm is
the whole model's (`granularity="global"`, the step then sees whole models); "tensor" gives
each tensor the mean norm of its own changes, and streams.

Where we differ: directions in which S is null are left alone. There a donor that finds a leaf
unchanged still loses the diagonal of its change, in arbitrary bases. alpha=1 removes the
whole block, where the official code removes none. Nothing is rounded to the storage dtype between
donors. The order of donors matters; it is that in which they are given. Computed in float32,
returned in the storage dtype; compressed leaves come back dense. Neutral at lam=0; one donor with
lam=1 gives that donor.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import leaves, model, needs, paths, programs, step, varied
from treesurgeon.merge import subspaces
from treesurgeon.merge import weights as weights_lib

GRANULARITIES = ("global", "tensor")


def fold_in(
  total: Float[Array, "*shape"],
  delta: Float[Array, "*shape"],
  *,
  alpha: ArrayLike = 0.5,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Add a change to a running total, cleaned of what the total holds.

  With S = U diag(s) Vᵀ, what is taken from τ is U (M ∘ Uᵀ τ V) Vᵀ; M marks the diagonal and the
  leading r x r block, r being the first index at which the running sum of s exceeds alpha's share.

  Args:
    total: S, the sum of the first change and the cleaned ones since.
    delta: τ, the next donor's change.
    alpha: share of the singular values that protects its directions, 0 to 1.
    matrix: whether an array of two axes is taken as a matrix; otherwise τ is added as it is.

  Returns:
    The new total.

  Example:
    >>> fold_in(jnp.diag(jnp.array([2.0, 1.0])), jnp.ones((2, 2)), alpha=0.5).tolist()
    [[2.0, 1.0], [1.0, 1.0]]
  """
  if not matrix or total.ndim != 2:
    return total + delta
  u, s, v = subspaces.svd(total)
  share = jnp.cumsum(s) / jnp.maximum(s.sum(), jnp.finfo(jnp.float32).tiny)
  leading = share <= alpha
  mask = (leading[:, None] & leading[None, :]) | jnp.eye(s.size, dtype=bool)
  held = jnp.where(mask, subspaces.einsum("mr,mn,nk->rk", u, delta, v), 0.0)
  return total + delta - subspaces.einsum("mr,rk,nk->mn", u, held, v)


@step.method("merge.opcm")
def opcm(
  *,
  models: Sequence[str] = (),
  alpha: varied.Varied = 0.5,
  lam: varied.Varied = 1.0,
  granularity: str = "global",
  matrices: str = subspaces.LINEAR,
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors one after another, each orthogonal to those before (OPCM).

  Args:
    models: directories of the donors, in order; empty takes those handed to the driver.
    alpha: share of the running merge's singular values whose directions are protected, 0 to 1.
    lam: multiplies the merged change.
    granularity: "global" scales the model's change to the mean norm of the donors' changes,
      "tensor" each tensor's, which streams.
    matrices: regular expression over addresses, linear layers by default; changes of other
      leaves, and of leaves that do not have two axes, are added as they are.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a share outside 0 to 1, an unknown granularity, or a pattern that does not
      compile.

  Example:
    >>> opcm(alpha=0.6)
    (merge.opcm(alpha=0.6),)

  Reference:
    Tang et al., Merging models on the fly without retraining, 2025, arXiv 2501.09522.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity={granularity!r}; valid: {', '.join(GRANULARITIES)}")
  if not all(0 <= share <= 1 for share in varied.values(alpha)):
    raise ValueError(f"alpha={alpha} must lie between 0 and 1")
  knobs = {"alpha": alpha, "lam": lam, **subspaces.hyper(matrices)}
  return _step(needs.Donors(tuple(models), lazy=True), granularity, knobs, select or ".*")


def _step(
  donors: needs.Donors, granularity: str, knobs: Mapping[str, Any], pattern: str
) -> step.Step:
  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    del key  # nothing is random
    chosen = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    sums = {a: _sum(m, evidence["donors"][a], a, knobs) for a in chosen}
    if granularity == "global" and sums:
      whole = programs.compiled(_scale, ())([squares for _, squares in sums.values()], {})
      scales = dict.fromkeys(sums, whole)
    else:
      scales = {a: programs.compiled(_scale, ())([squares], {}) for a, (_, squares) in sums.items()}
    changes = {}
    for address in chosen:
      total, _ = sums.pop(address)
      lam = jnp.float32(varied.at(knobs["lam"], address))
      given = {"delta": total, "scale": scales[address], "lam": lam}
      changes[address] = programs.compiled(_added, ())(leaves.dense(m.leaf(address)), given)
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    found = paths.select(names, pattern)
    return [tuple(found)] if granularity == "global" else [(n,) for n in found]

  return step.Step(
    {"donors": donors},
    apply,
    "model" if granularity == "global" else "leaf",
    {},
    units,
    lambda narrower: _step(donors, granularity, knobs, step.both(pattern, narrower)),
  )


def _sum(
  m: model.Model, donors: Sequence[Any], address: str, knobs: Mapping[str, Any]
) -> tuple[jax.Array, list[jax.Array]]:
  """Fold one donor's leaf after another; return S and the squared norms, that of S last."""
  weights_lib.resolve(None, len(donors), of="donors")
  w = leaves.dense(m.leaf(address))
  hyper = (("matrix", varied.at(knobs["matrix"], address)),)
  alpha = jnp.float32(varied.at(knobs["alpha"], address))
  total: Any = None
  size: Any = None
  squares = []
  for i in range(len(donors)):
    donor = donors[i]
    step.check_donors(address, w, [donor], first=i)
    given = {"donor": leaves.dense(donor), "total": total, "alpha": alpha}
    del donor
    total, square, size = programs.compiled(_next, hyper)(w, given)
    squares.append(square)
    # Programs run behind the loop: unless it waits, donors queue up in memory.
    jax.block_until_ready(total)
    del given
  return total, [*squares, size]


def _next(
  w: jax.Array, donor: jax.Array, total: jax.Array | None, alpha: jax.Array, matrix: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  delta = donor.astype(jnp.float32) - w.astype(jnp.float32)
  total = delta if total is None else fold_in(total, delta, alpha=alpha, matrix=matrix)
  return total, jnp.square(delta).sum(), jnp.square(total).sum()


def _scale(squares: Sequence[Sequence[jax.Array]]) -> jax.Array:
  """Divide the mean norm of the donors' changes by the norm of S, all leaves taken together."""
  *each, size = (jnp.sqrt(sum(column)) for column in zip(*squares, strict=True))
  return jnp.where(size > 0, sum(each) / len(each) / jnp.where(size > 0, size, 1.0), 1.0)


def _added(w: jax.Array, delta: jax.Array, scale: jax.Array, lam: jax.Array) -> jax.Array:
  return subspaces.added(w, delta, lam * scale)
