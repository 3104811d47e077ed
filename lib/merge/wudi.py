# SPDX-License-Identifier: Apache-2.0
"""WUDI: the task vector whose difference from each donor's is orthogonal to what that donor reads.

The inputs on which a donor was trained lie nearly in the row space of its own task vector, so
L(τ) = Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖² measures without data how far the merged layer's outputs are
from each donor's. Cheng et al., "Whoever started the interference should end it: guiding data-free
model merging via task vectors", 2025 (arXiv 2503.08099). `solver="adam"` is the published one: 300
steps of Adam at 1e-5 from Στ_i, which moves no weight by more than about 3e-3 and so stops early
where donors moved far. `solver="closed"` is the exact minimum that is nearest to Στ_i; with `time`
it is where gradient flow is at that time, the filter 1 − exp(−t λ) over the eigenvalues of
C = Σ τ_iᵀτ_i / ‖τ_i‖² by which SWUDI (MLLMerging's `swudi_aswudi.py`) succeeds WUDI, here without
its truncation of the spectrum.

Where we differ: the gradient is accumulated as x C + E for the displacement x from Στ_i, which is
the same up to rounding, costs one product a step and keeps one donor to the bit; the closed form
comes from the singular values of the stacked τ_i / ‖τ_i‖, for forming C would square its
condition; a donor that changed nothing is left out, where the official code divides by zero.
Leaves that are no matrices receive the mean of the changes, as in FusionBench. Computed in
float32, returned in the storage dtype; compressed leaves come back dense. Neutral at lam=0; one
donor with lam=1 gives that donor.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import subspaces

SOLVERS = ("adam", "closed")


def least_interference(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  solver: str = "adam",
  steps: int = 300,
  lr: ArrayLike = 1e-5,
  time: ArrayLike | None = None,
  lam: ArrayLike = 1.0,
  axis: int = -1,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by WUDI.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    solver: "adam" or "closed".
    steps: updates of Adam; static.
    lr: learning rate of Adam.
    time: of the closed form, when to stop the gradient flow; None means never.
    lam: multiplies the merged change.
    axis: the axis along which one output neuron's weights lie, 0 or -1.
    matrix: whether an array of two axes is taken as a matrix; otherwise changes are averaged.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: without donors.

  Example:
    >>> a, b = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0]])
    >>> out = least_interference(jnp.zeros((1, 2)), (a, b), solver="closed")
    >>> bool(jnp.allclose(out, b, atol=1e-5))  # b answers as a does where a reads
    True
  """
  tau = subspaces.task_vectors(w, donors)
  if not matrix or w.ndim != 2:
    return subspaces.added(w, tau.mean(axis=0), lam)
  tau = subspaces.oriented(tau, axis)
  start = tau.sum(axis=0)
  square = jnp.square(tau).sum(axis=(1, 2), keepdims=True)
  reads = tau * jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
  others = start[None] - tau
  if solver == "closed":
    x = _nearest_minimum(others, reads, time)
  else:
    c = subspaces.einsum("toi,toj->ij", reads, reads)
    e = subspaces.einsum("toi,tpi,tpj->oj", others, reads, reads)
    x = subspaces.descend(c, e, optimizer=optax.adam(jnp.asarray(lr)), steps=steps)
  return subspaces.added(w, subspaces.oriented(start + x, axis), lam)


@step.method("merge.wudi")
def wudi(
  *,
  models: Sequence[str] = (),
  solver: str = "adam",
  steps: int = 300,
  lr: varied.Varied = 1e-5,
  time: varied.Varied | None = None,
  lam: varied.Varied = 1.0,
  matrices: str = ".*",
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors by minimizing their interference without data (WUDI).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    solver: "adam" as published, "closed" for the exact minimum.
    steps: updates of Adam.
    lr: learning rate of Adam, in units of the weights.
    time: of the closed form, when to stop the gradient flow (SWUDI's filter, 300 there); None
      means never.
    lam: multiplies the merged change.
    matrices: regular expression over addresses; other leaves, and leaves that do not have two
      axes, receive the mean of the changes.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for an unknown solver, a number of steps, rate or time below zero, a time for
      Adam, or a pattern that does not compile.

  Example:
    >>> wudi(solver="closed", time=300.0)
    (merge.wudi(solver='closed', time=300.0),)

  Reference:
    Cheng et al., Whoever started the interference should end it, 2025, arXiv 2503.08099.
  """
  if solver not in SOLVERS:
    raise ValueError(f"solver={solver!r}; valid: {', '.join(SOLVERS)}")
  if time is not None and solver != "closed":
    raise ValueError(f"time={time} is of the gradient flow; it takes solver='closed'")
  for name, value in (("steps", steps), ("lr", lr), ("time", time)):
    if any(x is not None and x < 0 for x in varied.values(value)):
      raise ValueError(f"{name}={value} must not be negative")
  return lifting.over_leaves(
    least_interference,
    hyper={
      **subspaces.hyper(matrices),
      "solver": solver,
      "steps": steps,
      "axis": subspaces.AXES,
    },
    knobs={"lr": lr, "time": time, "lam": lam},
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )


def _nearest_minimum(others: jax.Array, reads: jax.Array, time: ArrayLike | None) -> jax.Array:
  """Return x of least norm that minimises Σ ‖x A_iᵀ + R_i‖², R_i = others_i A_iᵀ, A_i = reads_i.

  With the A_i stacked to P diag(s) Qᵀ, x = −(Σ others_i A_iᵀ P_i) diag(1 / s) Qᵀ.
  """
  count, rows, cols = reads.shape
  p, s, q = subspaces.svd(reads.reshape(count * rows, cols))
  g = subspaces.einsum("toi,tpi,tpk->ok", others, reads, p.reshape(count, rows, -1))
  live = s > 0
  gain = jnp.where(live, 1 / jnp.where(live, s, 1.0), 0.0)
  if time is not None:
    gain = gain * -jnp.expm1(-jnp.asarray(time) * jnp.square(s))
  return subspaces.matmul(-g * gain[None, :], q.T)
