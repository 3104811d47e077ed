# SPDX-License-Identifier: Apache-2.0
"""Reinforced Agent Merging: keep what one model alone changed, average what several did.

"Reinforced Agent Merging", 2026 (arXiv 2601.13572), as mergekit 0.1.5 has it in `ram` and
`ramplus_tl`: a change counts where it exceeds ε in magnitude; at every position the changes that
count are averaged over the models that made one. `ramplus_tl` multiplies what model i alone changed
by 1 + r clip(shared_i / unique_i, 0, α), the ratio of how many of the leaf's entries it changed
along with others and alone ("tensor-local"). Computed in float32, returned in the storage dtype;
compressed leaves come back dense. Neutral at an epsilon above every change.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import weights as weights_lib


def merge_changes(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  r: ArrayLike | None = None,
  alpha: ArrayLike = 0.2,
  epsilon: ArrayLike = 1e-5,
) -> Float[Array, "*shape"]:
  """Average the changes that count, over the models that made them.

  Args:
    w: the base's array.
    donors: the fine-tuned arrays.
    r: how much to strengthen what one model alone changed; None leaves it as it is.
    alpha: bound on the ratio of shared to unique entries that strengthens it.
    epsilon: changes up to this magnitude do not count.

  Returns:
    The merged array, in the dtype of `w`.

  Example:
    >>> merge_changes(jnp.zeros(2), (jnp.array([2.0, 4.0]), jnp.array([4.0, 0.0]))).tolist()
    [3.0, 4.0]
  """
  base = w.astype(jnp.float32)
  changes = [d.astype(jnp.float32) - base for d in donors]
  counted = [jnp.abs(d) > epsilon for d in changes]
  makers = jnp.asarray(sum(c.astype(jnp.int32) for c in counted))
  merged = jnp.zeros_like(base)
  for d, c in zip(changes, counted, strict=True):
    # Where one model alone made it, the divisor is 1.
    part = jnp.where(c, d, 0.0) / jnp.maximum(makers, 1).astype(jnp.float32)
    if r is not None:
      shared = jnp.sum(c & (makers > 1), dtype=jnp.int32).astype(jnp.float32)
      unique = jnp.sum(c & (makers == 1), dtype=jnp.int32).astype(jnp.float32)
      lam = 1 + r * jnp.clip(shared / jnp.maximum(unique, epsilon), 0.0, alpha)
      part = jnp.where(makers == 1, lam * part, part)
    merged += part
  return (base + merged).astype(w.dtype)


@step.method("merge.ram")
def ram(
  *, models: Sequence[str] = (), epsilon: varied.Varied = 1e-5, select: str | None = None
) -> step.Step:
  """Add what one donor alone changed, and the average of what several did.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    epsilon: changes up to this magnitude do not count.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Example:
    >>> ram(epsilon=1e-4)
    (merge.ram(epsilon=0.0001),)

  Reference:
    Reinforced Agent Merging, 2026, arXiv 2601.13572.
  """
  return _lift({"epsilon": epsilon}, models, select)


@step.method("merge.ramplus_tl")
def ramplus_tl(
  *,
  models: Sequence[str] = (),
  r: varied.Varied = 0.1,
  alpha: varied.Varied = 0.2,
  epsilon: varied.Varied = 1e-5,
  select: str | None = None,
) -> step.Step:
  """Add what one donor alone changed, strengthened, and the average of what several did.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    r: how much to strengthen what one donor alone changed.
    alpha: bound on the ratio of shared to unique entries that strengthens it.
    epsilon: changes up to this magnitude do not count; above 0.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for an epsilon that is not positive.

  Example:
    >>> ramplus_tl(r=0.2)
    (merge.ramplus_tl(r=0.2),)

  Reference:
    Reinforced Agent Merging, 2026, arXiv 2601.13572.
  """
  if not all(e > 0 for e in varied.values(epsilon)):
    raise ValueError(f"epsilon={epsilon} must be positive")
  return _lift({"r": r, "alpha": alpha, "epsilon": epsilon}, models, select)


def _lift(knobs: dict[str, varied.Varied], models: Sequence[str], select: str | None) -> step.Step:
  return lifting.over_leaves(
    merge_changes,
    hyper={},
    knobs=knobs,
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _check(donors: int, **rest: object) -> None:
  del rest
  weights_lib.resolve(None, donors, of="donors")
