# SPDX-License-Identifier: Apache-2.0
"""Twin-Merging: a shared expert, and what is exclusive to each expert as a low-rank change.

Lu et al., "Twin-Merging: dynamic integration of modular expertise in model merging", 2024 (arXiv
2406.15479). The shared expert is θ_s = θ₀ + λ Σ w_t τ_t; what is exclusive to an expert,
θ_t - θ_s, is cut to its int(rank · min(rows, cols)) largest singular directions, and router weights
put the parts back: θ = θ_s + Σ r_t v_t. The authors route every input by a trained network; here
`router` is given, one number an expert, so a step makes the model for one mixture. As in their
code arrays of one axis are kept whole unless rank is 0.

With a one-hot router at rank 1 the result is that expert up to rounding. `factors` gives the
exclusive parts as they are stored, `size_ratio` their share of full copies. Computed in float32,
returned in the storage dtype; compressed leaves come back dense. Neutral at lam=0 with a router of
zeros.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import leaves, lifting, needs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib


def mix(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  router: Sequence[ArrayLike] | None = None,
  rank: float = 0.1,
  lam: ArrayLike = 0.3,
  weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
  """Put a shared array and the experts' exclusive parts together.

  Args:
    w: the base's array θ₀.
    donors: the experts' arrays.
    router: r_t, one number an expert; None means 1 / T each.
    rank: fraction of the singular directions that the exclusive parts keep.
    lam: λ, of the shared expert.
    weights: w_t, one number an expert in the shared one; None means ones.

  Returns:
    The array of the mixture, in the dtype of `w`.

  Example:
    >>> experts = (jnp.eye(2), 3 * jnp.eye(2))
    >>> mix(jnp.zeros((2, 2)), experts, router=(0.0, 1.0), rank=1.0, lam=0.5).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
  """
  router = weights_lib.resolve(
    (1.0 / len(donors),) * len(donors) if router is None else router, len(donors), of="donors"
  )
  common = shared(w, donors, lam=lam, weights=weights)
  out = common
  for r, donor in zip(router, donors, strict=True):
    part = cut(donor.astype(jnp.float32) - common, rank=rank)
    out = out + consensus.times(r, part)
  return out.astype(w.dtype)


def shared(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  lam: ArrayLike = 0.3,
  weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
  """Merge the shared expert's array by task arithmetic.

  Args:
    w: the base's array θ₀.
    donors: the experts' arrays.
    lam: λ, multiplies the summed task vectors.
    weights: one number an expert; None means ones.

  Returns:
    The float32 array θ_s.

  Example:
    >>> shared(jnp.zeros(1), (jnp.ones(1), jnp.full(1, 3.0)), lam=0.5).tolist()
    [2.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  base = w.astype(jnp.float32)
  changes = [d.astype(jnp.float32) - base for d in donors]
  return consensus.add(base, changes, weights=weight, lam=lam)


def cut(part: Float[Array, "*shape"], *, rank: float) -> Float[Array, "*shape"]:
  """Keep the largest singular directions of a matrix, or of each matrix in a stack.

  Args:
    part: float32 array; one of fewer than two axes is kept whole.
    rank: fraction of the directions to keep; 0 keeps nothing of any array.

  Returns:
    The array of lower rank.

  Example:
    >>> cut(jnp.diag(jnp.array([3.0, 1.0])), rank=0.5).round().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
  """
  if rank <= 0:
    return jnp.zeros_like(part)
  if rank >= 1 or part.ndim < 2:
    return part
  return leaves.dense(factors(part, rank=rank))


def factors(part: Float[Array, "*batch rows cols"], *, rank: float) -> leaves.LowRank:
  """Factor an exclusive part into the two thin matrices that are stored.

  Args:
    part: float32 matrix, or a stack of them.
    rank: fraction of the singular directions to keep.

  Returns:
    The factors, the singular values in the first.

  Example:
    >>> factors(jnp.eye(4), rank=0.5).a.shape
    (4, 2)
  """
  u, s, vh = jnp.linalg.svd(part, full_matrices=False)
  k = int(rank * s.shape[-1])
  return leaves.LowRank(u[..., :, :k] * s[..., None, :k], vh[..., :k, :])


def size_ratio(base: needs.Source, experts: int, *, rank: float) -> float:
  """Compare the entries of a shared expert and exclusive parts with those of all experts.

  Args:
    base: a model of the experts' shapes.
    experts: how many.
    rank: fraction of the singular directions that are kept.

  Returns:
    Entries stored / entries of the experts' full copies.

  Example:
    >>> from treesurgeon.core import model
    >>> round(size_ratio(model.Model(None, {"w": jnp.ones((8, 8))}), 4, rank=0.125), 4)
    0.5
  """
  whole, kept = 0, 0
  for address in base.addresses():
    shape = base.struct(address).shape
    size = math.prod(shape)
    thin = size if rank > 0 else 0
    if 0 < rank < 1 and len(shape) >= 2:
      rows, cols = shape[-2:]
      thin = math.prod(shape[:-2]) * int(rank * min(rows, cols)) * (rows + cols)
    whole, kept = whole + size, kept + thin
  return (whole + experts * kept) / (experts * whole)


@step.method("merge.twin")
def twin(
  *,
  models: Sequence[str] = (),
  router: Sequence[varied.Varied] | None = None,
  rank: varied.Varied = 0.1,
  lam: varied.Varied = 0.3,
  weights: Sequence[varied.Varied] | None = None,
  select: str | None = None,
) -> step.Step:
  """Mix a shared expert with the low-rank exclusive parts of its experts.

  Args:
    models: directories of the experts; empty takes those handed to the driver.
    router: one number an expert; None means 1 / T each.
    rank: fraction of the singular directions that the exclusive parts keep, 0 to 1.
    lam: of the shared expert, multiplies the summed task vectors.
    weights: one number an expert in the shared one; None means ones.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a rank outside 0 to 1.

  Example:
    >>> twin(router=(0.9, 0.1))
    (merge.twin(router=(0.9, 0.1)),)

  Reference:
    Lu et al., Twin-Merging, 2024, arXiv 2406.15479.
  """
  weights_lib.check_shares(rank, name="rank")
  return lifting.over_leaves(
    mix,
    hyper={"rank": rank},
    knobs={"router": router, "lam": lam, "weights": weights},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _check(
  donors: int, *, router: Sequence[float] | None, weights: Sequence[float] | None, **rest: float
) -> None:
  del rest
  weights_lib.check(donors, weights=weights)
  if router is not None and len(router) != donors:
    raise ValueError(f"router={tuple(router)} has {len(router)} entries for {donors} donors")
