# SPDX-License-Identifier: Apache-2.0
"""KnOTS: bring task vectors into one basis by a joint decomposition, then merge their coordinates.

[τ_1 … τ_T] = U diag(s) [V_1 … V_T]ᵀ, side by side along the input, gives all donors the same output
directions U; the blocks diag(s) V_iᵀ are merged by TIES or linearly, and U times the result is the
merged change. Meant for LoRA fine-tunes, whose task vectors align badly as they are. Stoica et al.,
"Model merging with SVD to tie the knots", 2024 (arXiv 2410.19735), and their code.

Donors that carry their adapters (`LowRank` beside the base's own leaf) are decomposed from the
factors: QR decompositions of these and one of a matrix as wide as the ranks together, where the
dense way takes one of the weight's size times T. Others are compared with the base densely, to the
same result.

Where we differ: entries are trimmed tensor by tensor, as `merge.ties` does, not over the model as
one vector, and int(density n) of a block's entries are kept, one fewer than there; n counts the
directions that are not null, which are told by their size beside the largest, not beside 1e-5.
Coordinates that are zero but for rounding are zero, and have no vote in the mean.
Leaves that are no matrices, which the official code leaves alone or merges by TIES as they are,
are merged unrotated. Linear merging commutes with the rotation: method="linear" is the weighted
mean of the changes. Computed in float32, returned in the storage dtype; compressed leaves come back
dense. Neutral at lam=0; one donor with density 1 and lam=1 gives that donor.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

from treesurgeon.core import leaves, lifting, needs, step, varied
from treesurgeon.merge import consensus, low_rank, subspaces
from treesurgeon.merge import weights as weights_lib

METHODS = ("ties", "linear")
Aligned = tuple[Float[Array, "rows k"], Float[Array, "donors k cols"], Int32[Array, ""]]


def align(tau: Float[Array, "donors rows cols"]) -> Aligned:
  """Bring task vectors into one output basis.

  Args:
    tau: float32 task vectors; rows are output neurons.

  Returns:
    (U, blocks, rank) with τ_i = U blocks_i; rows of the blocks from `rank` on are zero.

  Example:
    >>> tau = jnp.arange(12.0).reshape(2, 2, 3)
    >>> u, blocks, _ = align(tau)
    >>> bool(jnp.allclose(u @ blocks[1], tau[1], atol=1e-5))
    True
  """
  count, _, cols = tau.shape
  u, s, v = subspaces.svd(subspaces.side_by_side(tau))
  blocks = jnp.moveaxis((v * s[None, :]).reshape(count, cols, -1), 1, 2)
  return u, _clean(blocks, s), (s > 0).sum(dtype=jnp.int32)


def align_factors(
  outs: Sequence[Float[Array, "rows _"]], ins: Sequence[Float[Array, "cols _"]]
) -> Aligned:
  """Bring task vectors that are products, τ_i = outs_i ins_iᵀ, into one output basis.

  Args:
    outs: float32 factors, one a donor; ranks may differ.
    ins: the other factors.

  Returns:
    As `align` returns, with as many directions as the ranks have together.

  Example:
    >>> u, blocks, rank = align_factors([jnp.ones((2, 1))], [jnp.ones((3, 1))])
    >>> bool(jnp.allclose(u @ blocks[0], 1.0)), int(rank)
    (True, 1)
  """
  q, r = jnp.linalg.qr(jnp.concatenate(outs, axis=1))
  bases, cores = zip(*(jnp.linalg.qr(x) for x in ins), strict=True)
  ends = np.cumsum([x.shape[1] for x in ins])[:-1]
  mixed = [
    subspaces.matmul(part, core.T)
    for part, core in zip(jnp.split(r, ends, axis=1), cores, strict=True)
  ]
  u, s, v = subspaces.svd(jnp.concatenate(mixed, axis=1))
  widths = np.cumsum([x.shape[1] for x in mixed])[:-1]
  blocks = [
    subspaces.matmul((part * s[None, :]).T, base.T)
    for part, base in zip(jnp.split(v, widths, axis=0), bases, strict=True)
  ]
  return subspaces.matmul(q, u), _clean(jnp.stack(blocks), s), (s > 0).sum(dtype=jnp.int32)


def merge_aligned(
  w: Any,
  donors: tuple[Any, ...],
  *,
  method: str = "ties",
  weights: Sequence[ArrayLike] | None = None,
  density: float = 0.2,
  lam: ArrayLike = 1.0,
  axis: int = -1,
  matrix: bool = True,
) -> Array:
  """Merge arrays in their joint basis.

  Args:
    w: the base's array or compressed leaf.
    donors: the fine-tuned arrays; or adapters, `LowRank` leaves, which are changes of `w`.
    method: "ties" or "linear".
    weights: one number a donor; None means ones.
    density: fraction of each donor's entries that TIES keeps; static.
    lam: multiplies the merged change.
    axis: the axis along which one output neuron's weights lie, 0 or -1.
    matrix: whether an array of two axes is rotated; otherwise it is merged as it is.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: for a wrong number of weights.

  Example:
    >>> low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> merge_aligned(jnp.zeros((2, 3)), (low,), method="linear").round(3).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  w = leaves.dense(w)
  if not matrix or w.ndim != 2:
    tau = low_rank.changes(w, donors)
    return subspaces.added(w, _merge(tau, None, method, weight, density), lam)
  if all(isinstance(d, leaves.LowRank) for d in donors):
    outs, ins = zip(*(low_rank.factors(d, axis) for d in donors), strict=True)
    u, blocks, rank = align_factors(outs, ins)
  else:
    u, blocks, rank = align(subspaces.oriented(low_rank.changes(w, donors), axis))
  merged = subspaces.matmul(u, _merge(blocks, rank, method, weight, density))
  return subspaces.added(w, subspaces.oriented(merged, axis), lam)


@step.method("merge.knots")
def knots(
  *,
  models: Sequence[str] = (),
  method: str = "ties",
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied = 0.2,
  lam: varied.Varied = 1.0,
  matrices: str = subspaces.LINEAR,
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors in the basis of their joint decomposition, above all LoRA (KnOTS).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    method: how coordinates are merged, "ties" or "linear".
    weights: one number a donor; None means ones. The weighted mean is taken.
    density: fraction of each donor's coordinates that TIES keeps, 0 to 1.
    lam: multiplies the merged change; 0.4 to 0.7 in the authors' settings, found by validation.
    matrices: regular expression over addresses, linear layers by default; other leaves, and
      leaves that do not have two axes, are merged unrotated.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for an unknown method, a density outside 0 to 1, or a pattern that does not
      compile.

  Example:
    >>> knots(lam=0.6)
    (merge.knots(lam=0.6),)

  Reference:
    Stoica et al., Model merging with SVD to tie the knots, 2024, arXiv 2410.19735.
  """
  if method not in METHODS:
    raise ValueError(f"method={method!r}; valid: {', '.join(METHODS)}")
  if not all(0 <= share <= 1 for share in varied.values(density)):
    raise ValueError(f"density={density} must lie between 0 and 1")
  return low_rank.with_adapters(
    lifting.over_leaves(
      merge_aligned,
      hyper={
        **subspaces.hyper(matrices),
        "method": method,
        "density": density,
        "axis": subspaces.AXES,
      },
      knobs={"weights": weights, "lam": lam},
      check=_check,
      select=select,
      default=".*",
      domain=".*",
      wants={"donors": needs.Donors(tuple(models))},
      raw=True,
    )
  )


def _check(donors: int, *, weights: tuple[float, ...] | None, **rest: Any) -> None:
  weights_lib.check(donors, weights=weights, **rest)
  if weights is not None and abs(sum(weights)) < 1e-8:
    raise ValueError(f"weights={weights} sum to zero, so their mean cannot be taken")


def _merge(
  blocks: jax.Array, rank: jax.Array | None, method: str, weight: tuple[Any, ...], density: float
) -> jax.Array:
  """Merge the donors' coordinates; of each block the first `rank` rows count, None means all."""
  zero = jnp.zeros(blocks.shape[1:], jnp.float32)
  if method == "linear":
    return consensus.add(zero, list(blocks), weights=weight, normalize=True)
  return consensus.elect(zero, [_trim(x, rank, density) for x in blocks], weights=weight)


def _trim(x: jax.Array, rank: jax.Array | None, density: float) -> jax.Array:
  """Zero all but the largest entries. How many depends on the rank, which no shape tells."""
  if density >= 1 or x.size == 0:
    return x
  if density <= 0:
    return jnp.zeros_like(x)
  keep: Any = max(1, int(density * x.size))
  if rank is not None:
    table = [max(1, int(density * r * x.shape[1])) for r in range(x.shape[0] + 1)]
    keep = jnp.asarray(table, jnp.int32)[rank]
  magnitudes = jnp.sort(jnp.abs(x).reshape(-1))
  return jnp.where(jnp.abs(x) >= magnitudes[x.size - keep], x, 0.0)


def _clean(blocks: jax.Array, s: jax.Array) -> jax.Array:
  """Zero what is rounding: a donor that changed nothing would still vote."""
  least = 4 * jnp.finfo(jnp.float32).eps * s.max(initial=0.0)
  return jnp.where(jnp.abs(blocks) > least, blocks, 0.0)
