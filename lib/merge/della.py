# SPDX-License-Identifier: Apache-2.0
"""DELLA: drop changes at random, small ones more often than large ones, rescale, merge.

Deep et al., "DELLA-Merging: reducing interference in model merging through magnitude-based
sampling", 2024 (arXiv 2406.11617). Within a row (the weights of one output neuron) a change is
kept with a probability that rises linearly with the rank of its magnitude, from density - epsilon
to density + epsilon. `della` elects signs before adding, `della_linear` adds. `rescale="each"` is
the authors': every kept change is divided by its own probability. mergekit's is `rescale="l1"`,
which restores each tensor's sum of magnitudes; given equal masks the result is then mergekit's. Its
defaults differ: density 1, rescale "l1"; epsilon and `normalize` (true for `della`) are its own.

Equal magnitudes are ranked lowest index first. The only change of a row of one is kept with
probability `density` (mergekit divides zero by zero); a tensor of three or more axes has its rows
along the last (mergekit: the second). Ranks cost one sort of each row and a
scatter, and three arrays of the leaf's size. Masks depend on the seed, the leaf's address and the
donor's place alone. Computed in float32, returned in the storage dtype; compressed leaves come
back dense. Neutral at lam=0; with one donor, density 1 and lam 1 the result is that donor up to
rounding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import consensus, dare, rows
from treesurgeon.merge import weights as weights_lib

RESCALES = ("each", "l1", "none")


def sample_and_merge(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  masks: tuple[Bool[Array, "*shape"], ...] | None = None,
  key: jax.Array | None = None,
  *,
  weights: Sequence[ArrayLike] | None = None,
  density: ArrayLike | Sequence[ArrayLike] = 0.5,
  epsilon: ArrayLike | Sequence[ArrayLike] = 0.15,
  lam: ArrayLike = 1.0,
  rescale: str = "each",
  normalize: bool = True,
  elect: bool = True,
  axis: int = -1,
) -> Float[Array, "*shape"]:
  """Merge arrays by DELLA.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    masks: what to keep of each donor's change; None draws it from `key`.
    key: random key; donor i draws from `fold_in(key, i)`.
    weights: one number a donor; None means ones.
    density: mean probability of an entry to be kept, or one a donor.
    epsilon: half the range of the probabilities, or one a donor.
    lam: λ, multiplies the merged change.
    rescale: "each" divides what is kept by its probability, "l1" restores the sum of
      magnitudes, "none" leaves it.
    normalize: whether to divide by the summed weights (of agreeing entries, with `elect`).
    elect: whether to elect signs before adding.
    axis: along which a row lies.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> mask = jnp.array([False, True])
    >>> changed = jnp.array([1.0, 3.0])
    >>> sample_and_merge(jnp.zeros(2), (changed,), (mask,), rescale="l1").tolist()
    [0.0, 4.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  shares = weights_lib.each(density, len(donors), name="density")
  ranges = weights_lib.each(epsilon, len(donors), name="epsilon")
  base = w.astype(jnp.float32)
  deltas = []
  for i, (donor, share, half) in enumerate(zip(donors, shares, ranges, strict=True)):
    delta = donor.astype(jnp.float32) - base
    p: ArrayLike = share
    if masks is None or rescale == "each":
      p = probabilities(delta, density=share, epsilon=half, axis=axis)
    mask = dare.draw(key, i, p, w.shape) if masks is None else masks[i]
    deltas.append(dare.rescaled(delta, mask, p, rescale=rescale))
  merge = consensus.elect if elect else consensus.add
  return merge(base, deltas, weights=weight, lam=lam, normalize=normalize).astype(w.dtype)


def probabilities(
  delta: Float[Array, "*shape"], *, density: ArrayLike, epsilon: ArrayLike, axis: int = -1
) -> Float[Array, "*shape"]:
  """Give every entry of a change the probability with which to keep it.

  Args:
    delta: the change, float32.
    density: mean probability; at 1 or above everything is kept, at 0 or below nothing.
    epsilon: half the range.
    axis: along which a row lies.

  Returns:
    Probabilities: density - epsilon for the smallest magnitude of a row, density + epsilon for the
    largest.

  Example:
    >>> probabilities(jnp.array([3.0, -1.0, 2.0]), density=0.5, epsilon=0.25).tolist()
    [0.75, 0.25, 0.5]
  """
  size = delta.shape[rows.last(axis, delta.ndim)] if delta.ndim else 1
  rank = rows.over(_ranks, axis, jnp.abs(delta)).astype(jnp.float32)
  normal = rank / (size - 1) if size > 1 else jnp.full_like(delta, 0.5)
  density = jnp.asarray(density, jnp.float32)
  p = (density - epsilon) + normal * 2 * epsilon
  return jnp.where(density >= 1, 1.0, jnp.where(density <= 0, 0.0, p))


@step.method("merge.della")
def della(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.5,
  epsilon: varied.Varied | Sequence[varied.Varied] = 0.15,
  lam: varied.Varied = 1.0,
  rescale: str = "each",
  normalize: bool = True,
  select: str | None = None,
) -> step.Step:
  """Merge task vectors, thinned by magnitude-based sampling, with sign election.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: mean fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    epsilon: half the range of the probabilities; density ± epsilon must lie inside 0 to 1.
    lam: multiplies the merged change.
    rescale: "each" (the authors'), "l1" (mergekit's), or "none".
    normalize: whether to divide by the summed weights of the agreeing entries.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for densities or probabilities out of range, or an unknown rescale.

  Example:
    >>> della(density=0.7, epsilon=0.07)
    (merge.della(density=0.7, epsilon=0.07),)

  Reference:
    Deep et al., DELLA-Merging, 2024, arXiv 2406.11617.
  """
  return _step(True, models, weights, density, epsilon, lam, rescale, normalize, select)


@step.method("merge.della_linear")
def della_linear(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.5,
  epsilon: varied.Varied | Sequence[varied.Varied] = 0.15,
  lam: varied.Varied = 1.0,
  rescale: str = "each",
  normalize: bool = False,
  select: str | None = None,
) -> step.Step:
  """Add task vectors that are thinned by magnitude-based sampling.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: mean fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    epsilon: half the range of the probabilities; density ± epsilon must lie inside 0 to 1.
    lam: multiplies the merged change.
    rescale: "each" (the authors'), "l1" (mergekit's), or "none".
    normalize: whether to divide by the sum of the weights.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for densities or probabilities out of range, or an unknown rescale.

  Example:
    >>> della_linear(rescale="l1")
    (merge.della_linear(rescale='l1'),)

  Reference:
    Deep et al., DELLA-Merging, 2024, arXiv 2406.11617.
  """
  return _step(False, models, weights, density, epsilon, lam, rescale, normalize, select)


def _step(
  elect: bool,
  models: Sequence[str],
  weights: Any,
  density: Any,
  epsilon: Any,
  lam: Any,
  rescale: str,
  normalize: bool,
  select: str | None,
) -> step.Step:
  if rescale not in RESCALES:
    raise ValueError(f"rescale={rescale!r}; valid: {', '.join(RESCALES)}")
  weights_lib.check_shares(density, name="density")
  return lifting.over_leaves(
    sample_and_merge,
    hyper={"rescale": rescale, "normalize": normalize, "elect": elect, "axis": rows.AXIS},
    knobs={"weights": weights, "density": density, "epsilon": epsilon, "lam": lam},
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
    random=True,
  )


def _check(donors: int, *, weights: Any, density: Any, epsilon: Any, **rest: Any) -> None:
  del rest
  weights_lib.check(donors, weights=weights)
  shares = weights_lib.each(density, donors, name="density")
  ranges = weights_lib.each(epsilon, donors, name="epsilon")
  for share, half in zip(shares, ranges, strict=True):
    if 0 < share < 1 and not (0 <= half < min(share, 1 - share)):
      raise ValueError(
        f"epsilon={half} with density={share}: density - epsilon and density + epsilon must lie "
        f"inside 0 to 1, so epsilon below {min(share, 1 - share):.6g}"
      )


def _ranks(row: jax.Array) -> jax.Array:
  """Rank a row's entries, smallest first; equal ones by index."""
  index = jnp.arange(row.shape[0], dtype=jnp.int32)
  _, order = jax.lax.sort((row, index), num_keys=1, is_stable=True)
  return jnp.zeros_like(index).at[order].set(index, unique_indices=True)
