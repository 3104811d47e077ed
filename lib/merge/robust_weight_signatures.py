# SPDX-License-Identifier: Apache-2.0
"""Robust weight signatures: what training on shifted data adds, beside ordinary training.

Cai et al., "Robust weight signatures: gaining robustness as easy as patching weights?", 2023
(arXiv 2302.12480). From one pretrained model come a standard model and robust ones, each trained
on one corruption. A signature is the robust change without its projection on the standard change,
for every tensor of the first layers: δ = r - ⟨r, s⟩ / ⟨s, s⟩ s with r = θ_rob - θ_pre and
s = θ_std - θ_pre. The base is the standard model, the first donor the pretrained one, the others
robust; the result is θ_std + α Σ w_i δ_i, with w_i = 1/n by default as in the authors' code (which
multiplies by α / n twice). They also replace batch-norm statistics, which these models do not have;
all tensors of the selected layers are treated alike, and what is in no layer, embeddings say, is
left alone unless `select` names it.

`weight_patch` stores signatures as small files and takes them off again to the bit. Computed in
float32, returned in the storage dtype; compressed leaves come back dense. Neutral at alpha=0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import consensus
from treesurgeon.merge import weights as weights_lib


def extract(
  robust: Float[Array, "*shape"],
  pretrained: Float[Array, "*shape"],
  standard: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
  """Extract one tensor's signature.

  Args:
    robust: θ_rob.
    pretrained: θ_pre.
    standard: θ_std.

  Returns:
    δ in float32, orthogonal to the standard change; where that is zero, the whole robust change.

  Example:
    >>> extract(jnp.array([3.0, 2.0]), jnp.zeros(2), jnp.array([1.0, 0.0])).tolist()
    [0.0, 2.0]
  """
  origin = pretrained.astype(jnp.float32)
  r = robust.astype(jnp.float32) - origin
  s = standard.astype(jnp.float32) - origin
  scale = jnp.max(jnp.abs(s))  # keeps the squares of tiny changes from vanishing
  s = s / jnp.where(scale > 0, scale, 1.0)
  length = jnp.sum(s * s)
  return r - jnp.sum(r * s) / jnp.where(length > 0, length, 1.0) * s


def patch(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  alpha: ArrayLike = 1.0,
  weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
  """Add signatures to the standard model's array.

  Args:
    w: θ_std.
    donors: θ_pre, then the robust arrays.
    alpha: α, multiplies what is added.
    weights: w_i, one number a robust array; None means 1/n each.

  Returns:
    The patched array, in the dtype of `w`.

  Raises:
    ValueError: without a robust array.

  Example:
    >>> donors = (jnp.zeros(2), jnp.array([3.0, 2.0]))
    >>> patch(jnp.array([1.0, 0.0]), donors, alpha=0.5).tolist()
    [1.0, 1.0]
  """
  _check(len(donors), weights=weights)
  pretrained, *robust = donors
  if weights is None:
    weights = (1.0 / len(robust),) * len(robust)
  found = [extract(r, pretrained, w) for r in robust]
  return consensus.add(w.astype(jnp.float32), found, weights=weights, lam=alpha).astype(w.dtype)


@step.method("merge.robust_weight_signatures")
def robust_weight_signatures(
  *,
  models: Sequence[str] = (),
  layers: int = 4,
  alpha: varied.Varied = 1.0,
  weights: Sequence[varied.Varied] | None = None,
  select: str | None = None,
) -> step.Step:
  """Patch a standard model with the signatures of robust ones.

  Args:
    models: directories of the pretrained model and of the robust ones, in this order; empty takes
      the donors handed to the driver.
    layers: how many of the first layers to patch.
    alpha: multiplies what is added.
    weights: one number a robust model; None means 1/n each.
    select: regular expression over addresses in the place of `layers`.

  Returns:
    A transform; applying it raises ValueError without a robust model.

  Raises:
    ValueError: for fewer than one layer.

  Example:
    >>> robust_weight_signatures(layers=2, alpha=0.5)
    (merge.robust_weight_signatures(layers=2, alpha=0.5),)

  Reference:
    Cai et al., Robust weight signatures, 2023, arXiv 2302.12480.
  """
  return lifting.over_leaves(
    patch,
    hyper={},
    knobs={"alpha": alpha, "weights": weights},
    check=_check,
    select=select,
    default=first_layers(layers),
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def first_layers(count: int) -> str:
  """Write the regular expression of the first layers' addresses.

  Args:
    count: number of layers, at least one.

  Returns:
    A regular expression.

  Raises:
    ValueError: for fewer than one layer.

  Example:
    >>> first_layers(2)
    'layers/(0|1)/.*'
  """
  if count < 1:
    raise ValueError(f"layers={count} must be at least 1")
  return f"layers/({'|'.join(map(str, range(count)))})/.*"


def _check(donors: int, *, weights: Sequence[ArrayLike] | None, **rest: ArrayLike) -> None:
  del rest
  if donors < 2:
    raise ValueError(
      f"{donors} donors: give the pretrained model first, then one or more robust models"
    )
  weights_lib.resolve(weights, donors - 1, of="robust models")
