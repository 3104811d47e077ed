# SPDX-License-Identifier: Apache-2.0
"""OptMerge: minimise interference between task vectors denoised by truncated decompositions.

L(τ) = Σ_i ‖(τ − τ̃_i) (S_k V_kᵀ)_iᵀ‖² / ‖τ_i‖² with k = r // T of the r singular directions of each
of the T changes: like `merge.wudi`, but what a donor reads is the leading part of its change, and
what it should answer is τ̃_i, a truncated change. Wei et al., "OptMerge: unifying multimodal LLM
capabilities and modalities via model merging", 2025 (arXiv 2505.19892), and MLLMerging's two
scripts. `variant="full"`, for full fine-tunes: τ̃_i is the leading part of the difference from the
mean change, plus the mean; 300 steps of Adam at 1e-5 from the sum. `variant="lora"`: the leading
part of τ_i itself; 300 steps of SGD at 1e-4 with momentum 0.9 from the mean. Leaves that are no
matrices, and the output head, receive the mean of the changes, as there.

Where we differ: as in `merge.wudi`, in the order of sums and for donors that changed nothing; null
directions stay out; at least one direction is kept however many donors there are. The scripts leave
embeddings, norms and biases at the base's values by a list of names: `select` does that. Computed
in float32, returned in the storage dtype; compressed leaves come back dense. Neutral at lam=0; one
donor with lam=1 gives that donor.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import subspaces

VARIANTS = ("full", "lora")
MATRICES = "(?!.*lm_head).*"
_RATES = {"full": 1e-5, "lora": 1e-4}


def denoised_interference(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  variant: str = "full",
  steps: int = 300,
  lr: ArrayLike | None = None,
  lam: ArrayLike = 1.0,
  axis: int = -1,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by OptMerge.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    variant: "full" (centred, Adam from the sum) or "lora" (SGD from the mean).
    steps: updates; static.
    lr: learning rate; None means the variant's.
    lam: multiplies the merged change.
    axis: the axis along which one output neuron's weights lie, 0 or -1.
    matrix: whether an array of two axes is taken as a matrix; otherwise changes are averaged.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: without donors.

  Example:
    >>> donor = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> denoised_interference(jnp.zeros((2, 2)), (donor,), steps=3).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
  """
  tau = subspaces.task_vectors(w, donors)
  mean = tau.mean(axis=0)
  if not matrix or w.ndim != 2:
    return subspaces.added(w, mean, lam)
  tau, mean = subspaces.oriented(tau, axis), subspaces.oriented(mean, axis)
  k = max(1, min(w.shape) // len(donors))
  center = mean if variant == "full" else jnp.zeros_like(mean)
  u, s, v = (x[..., :k] for x in subspaces.svd(tau - center[None]))
  wanted = center[None] + subspaces.einsum("tok,tk,tik->toi", u, s, v)
  _, s, v = (x[..., :k] for x in subspaces.svd(tau))
  square = jnp.square(tau).sum(axis=(1, 2))
  share = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1.0), 0.0)
  reads = v * (s * jnp.sqrt(share)[:, None])[:, None, :]
  start = tau.sum(axis=0) if variant == "full" else mean
  c = subspaces.einsum("tik,tjk->ij", reads, reads)
  e = subspaces.einsum("toi,tik,tjk->oj", start[None] - wanted, reads, reads)
  rate = jnp.asarray(_RATES[variant] if lr is None else lr)
  optimizer = optax.adam(rate) if variant == "full" else optax.sgd(rate, momentum=0.9)
  x = subspaces.descend(c, e, optimizer=optimizer, steps=steps)
  return subspaces.added(w, subspaces.oriented(start + x, axis), lam)


@step.method("merge.optmerge")
def optmerge(
  *,
  models: Sequence[str] = (),
  variant: str = "full",
  steps: int = 300,
  lr: varied.Varied | None = None,
  lam: varied.Varied = 1.0,
  matrices: str = MATRICES,
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors by minimizing the interference of denoised changes (OptMerge).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    variant: "full" for full fine-tunes, "lora" for merged low-rank adapters.
    steps: updates of the optimizer.
    lr: learning rate, in units of the weights for "full"; None means 1e-5 for "full" and 1e-4
      for "lora".
    lam: multiplies the merged change.
    matrices: regular expression over addresses, all but the output head by default; other
      leaves, and leaves that do not have two axes, receive the mean of the changes.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for an unknown variant, a negative number of steps or rate, or a pattern that does
      not compile.

  Example:
    >>> optmerge(variant="lora", select="layers/.*")
    (merge.optmerge(variant='lora', select='layers/.*'),)

  Reference:
    Wei et al., OptMerge, 2025, arXiv 2505.19892.
  """
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r}; valid: {', '.join(VARIANTS)}")
  for name, value in (("steps", steps), ("lr", lr)):
    if any(x is not None and x < 0 for x in varied.values(value)):
      raise ValueError(f"{name}={value} must not be negative")
  return lifting.over_leaves(
    denoised_interference,
    hyper={
      **subspaces.hyper(matrices),
      "variant": variant,
      "steps": steps,
      "axis": subspaces.AXES,
    },
    knobs={"lr": lr, "lam": lam},
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
