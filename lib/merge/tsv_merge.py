# SPDX-License-Identifier: Apache-2.0
"""Merge by task singular vectors (TSV-M): the top directions of each task, made orthogonal.

Of every donor's change τ_i the leading r // T singular directions are kept, r being the matrix'
smaller side and T the number of donors; all donors' left vectors side by side, and all right ones,
are replaced by the nearest orthonormal set (Procrustes), and the change is put together again with
the old singular values. Gargiulo et al., "Task singular vectors: reducing task interference in
model merging", 2024 (arXiv 2412.00081), and their code. Leaves that are no matrices receive the
mean of the changes, as there.

Where we differ: null directions of a donor, and linear dependences between donors, are left out.
The official code keeps their singular vectors, which are arbitrary, and these push the others
aside: two donors of rank one in orthogonal subspaces do not give their sum there, and do here. At
least one direction is kept however many donors there are. Computed in float32, returned in the
storage dtype; compressed leaves come back dense. Neutral at lam=0; one donor with lam=1 gives that
donor.
"""

from collections.abc import Sequence

from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, step, varied
from treesurgeon.merge import subspaces
from treesurgeon.merge import weights as weights_lib


def merge_singular_vectors(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike = 1.0,
  matrix: bool = True,
) -> Float[Array, "*shape"]:
  """Merge arrays by TSV-M.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change.
    matrix: whether an array of two axes is taken as a matrix; otherwise changes are averaged.

  Returns:
    The merged array, in the dtype of `w`.

  Raises:
    ValueError: for a wrong number of weights.

  Example:
    >>> import jax.numpy as jnp
    >>> a, b = jnp.zeros((2, 2)).at[0, 0].set(3.0), jnp.zeros((2, 2)).at[1, 1].set(1.0)
    >>> bool(jnp.allclose(merge_singular_vectors(jnp.zeros((2, 2)), (a, b)), a + b, atol=1e-6))
    True
  """
  tau = subspaces.task_vectors(w, donors, weights)
  if not matrix or w.ndim != 2:
    return subspaces.added(w, tau.mean(axis=0), lam)
  k = max(1, min(w.shape) // len(donors))
  u, s, v = subspaces.svd(tau)
  left = subspaces.polar(subspaces.side_by_side(u[:, :, :k]))
  right = subspaces.polar(subspaces.side_by_side(v[:, :, :k]))
  merged = subspaces.matmul(left * s[:, :k].reshape(1, -1), right.T)
  return subspaces.added(w, merged, lam)


@step.method("merge.tsv_merge")
def tsv_merge(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied = 1.0,
  matrices: str = ".*",
  select: str | None = None,
) -> step.Step:
  """Merge fine-tuned donors by their orthogonalized leading singular directions (TSV-M).

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, which multiplies its change first; None means ones.
    lam: multiplies the merged change.
    matrices: regular expression over addresses; other leaves, and leaves that do not have two
      axes, receive the mean of the changes.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Raises:
    ValueError: for a pattern that does not compile.

  Example:
    >>> tsv_merge(matrices="layers/.*")
    (merge.tsv_merge(matrices='layers/.*'),)

  Reference:
    Gargiulo et al., Task singular vectors, 2024, arXiv 2412.00081.
  """
  return lifting.over_leaves(
    merge_singular_vectors,
    hyper=subspaces.hyper(matrices),
    knobs={"weights": weights, "lam": lam},
    check=weights_lib.check,
    select=select,
    default=".*",
    domain=".*",
    wants={"donors": needs.Donors(tuple(models))},
  )
