# SPDX-License-Identifier: Apache-2.0
"""DARE: drop most entries of every task vector at random, rescale the rest, merge.

Yu et al., "Language models are Super Mario: absorbing abilities from homologous models as a free
lunch", 2023 (arXiv 2311.03099). `dare_linear` adds the sparse changes, `dare_ties` elects signs
first. `density` is the fraction that is kept, 1 - p of the paper. `rescale="expected"` is the
paper's, 1 / density; mergekit's is `rescale="l1"`, which restores each tensor's sum of magnitudes
exactly instead of in expectation; given equal masks the result is then mergekit's. Its defaults
differ: density 1, rescale "l1"; `normalize` is false in both.

Masks depend on the seed, the leaf's address and the donor's place alone, so a streamed, sharded or
partial merge draws the same ones (mergekit's depend on the order in which tensors are visited).
Computed in float32, returned in the storage dtype; compressed leaves come back dense. Neutral at
lam=0; with one donor, density 1 and lam 1 the result is that donor up to rounding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib

RESCALES = ("expected", "l1", "none")


def drop_and_merge(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  masks: tuple[Bool[Array, "*shape"], ...] | None = None,
  key: jax.Array | None = None,
  *,
  weights: Sequence[ArrayLike] | None = None,
  density: ArrayLike | Sequence[ArrayLike] = 0.1,
  lam: ArrayLike = 1.0,
  rescale: str = "expected",
  normalize: bool = False,
  elect: bool = False,
) -> Float[Array, "*shape"]:
  """Merge arrays by DARE.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    masks: what to keep of each donor's change; None draws it from `key`.
    key: random key; donor i draws from `fold_in(key, i)`.
    weights: one number a donor; None means ones.
    density: probability of an entry to be kept, or one a donor.
    lam: λ, multiplies the merged change.
    rescale: "expected" divides what is kept by `density`, "l1" restores the sum of magnitudes,
      "none" leaves it.
    normalize: whether to divide by the summed weights (of agreeing entries, with `elect`).
    elect: whether to elect signs before adding.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> mask = jnp.array([True, False])
    >>> drop_and_merge(jnp.zeros(2), (jnp.ones(2),), (mask,), density=0.5).tolist()
    [2.0, 0.0]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  shares = weights_lib.each(density, len(donors), name="density")
  base = w.astype(jnp.float32)
  deltas = []
  for i, (donor, share) in enumerate(zip(donors, shares, strict=True)):
    delta = donor.astype(jnp.float32) - base
    mask = draw(key, i, share, w.shape) if masks is None else masks[i]
    deltas.append(rescaled(delta, mask, share, rescale=rescale))
  merge = consensus.elect if elect else consensus.add
  return merge(base, deltas, weights=weight, lam=lam, normalize=normalize).astype(w.dtype)


def draw(
  key: jax.Array | None, index: int, p: ArrayLike, shape: tuple[int, ...]
) -> Bool[Array, "..."]:
  """Draw which entries of a donor's change to keep.

  Args:
    key: the leaf's random key.
    index: the donor's place.
    p: probability to keep an entry, a number or an array of `shape`.
    shape: of the mask.

  Returns:
    The mask.

  Raises:
    ValueError: without a key.

  Example:
    >>> draw(jax.random.key(0), 0, 1.0, (3,)).tolist()
    [True, True, True]
  """
  if key is None:
    raise ValueError("give masks, or a key to draw them from")
  return jax.random.bernoulli(jax.random.fold_in(key, index), p, shape)


def rescaled(
  delta: Float[Array, "*shape"],
  mask: Bool[Array, "*shape"],
  p: ArrayLike,
  *,
  rescale: str,
) -> Float[Array, "*shape"]:
  """Drop what a mask does not keep of a change and make up for it.

  Args:
    delta: the change, float32.
    mask: what to keep.
    p: the probability with which it was kept, a number or an array of the change's shape.
    rescale: "l1" restores the sum of magnitudes; "none" does nothing; anything else divides by p.

  Returns:
    The sparse change.

  Example:
    >>> rescaled(jnp.ones(2), jnp.array([True, False]), 0.25, rescale="expected").tolist()
    [4.0, 0.0]
  """
  kept = jnp.where(mask, delta, 0.0)
  if rescale == "none":
    return kept
  if rescale == "l1":
    return consensus.rescale_l1(delta, kept)
  p = jnp.asarray(p, jnp.float32)
  return kept / jnp.where(p > 0, p, 1.0)


@step.method("merge.dare_linear")
def dare_linear(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.1,
  lam: varied.Varied = 1.0,
  rescale: str = "expected",
  normalize: bool = False,
  select: str | None = None,
) -> step.Step:
  """Add randomly thinned, rescaled task vectors of donors to the model they started from.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    lam: multiplies the merged change.
    rescale: "expected" (the paper's 1 / density), "l1" (mergekit's), or "none".
    normalize: whether to divide by the sum of the weights.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a density outside 0 to 1 or an unknown rescale.

  Example:
    >>> dare_linear(density=0.5)
    (merge.dare_linear(density=0.5),)

  Reference:
    Yu et al., Language models are Super Mario, 2023, arXiv 2311.03099.
  """
  return _step(False, models, weights, density, lam, rescale, normalize, select)


@step.method("merge.dare_ties")
def dare_ties(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  density: varied.Varied | Sequence[varied.Varied] = 0.1,
  lam: varied.Varied = 1.0,
  rescale: str = "expected",
  normalize: bool = False,
  select: str | None = None,
) -> step.Step:
  """Merge randomly thinned, rescaled task vectors of donors with sign election.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor; None means ones.
    density: fraction of each donor's changes to keep, 0 to 1, or one fraction a donor.
    lam: multiplies the merged change.
    rescale: "expected" (the paper's 1 / density), "l1" (mergekit's), or "none".
    normalize: whether to divide by the summed weights of the agreeing entries.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a density outside 0 to 1 or an unknown rescale.

  Example:
    >>> dare_ties(rescale="l1", density=(0.5, 0.2))
    (merge.dare_ties(density=(0.5, 0.2), rescale='l1'),)

  Reference:
    Yu et al., Language models are Super Mario, 2023, arXiv 2311.03099.
  """
  return _step(True, models, weights, density, lam, rescale, normalize, select)


def _step(
  elect: bool,
  models: Sequence[str],
  weights: Any,
  density: Any,
  lam: Any,
  rescale: str,
  normalize: bool,
  select: str | None,
) -> step.Step:
  if rescale not in RESCALES:
    raise ValueError(f"rescale={rescale!r}; valid: {', '.join(RESCALES)}")
  weights_lib.check_shares(density, name="density")
  return lifting.over_leaves(
    drop_and_merge,
    hyper={"rescale": rescale, "normalize": normalize, "elect": elect},
    knobs={"weights": weights, "density": density, "lam": lam},
    check=weights_lib.check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
    random=True,
  )
