# SPDX-License-Identifier: Apache-2.0
"""D-Pruner: keep what a domain needs and what language needs in general, from two texts.

Zhang et al., "Pruning as a domain-specific LLM extractor", 2024 (arXiv 2405.06275). The loss on the
domain's text is regularized by how important each weight is in general, L + lam sum G (w' - w)^2,
and a weight's importance is what its removal, w' = 0, changes of that to second order:
|g w - half (F + 2 lam G) w^2|, where g is the mean gradient and F the mean squared gradient of the
domain's examples. Every matrix loses its least important weights.

Here G is the Fisher information of the general text, so that lam G w^2 is what that text loses in
nats (elastic weight consolidation), and lam = 1/2 counts both texts alike. Where we differ from
the authors: their G is the error of SparseGPT's score, a square of a layer's output; they put it
into the gradient of a training step, as 2 lam lr^2 G g^2 / N, which at their learning rate is next
to nothing, and fine-tune meanwhile; the importance in their code is |g w + half F w^2 + w^3|, with
the sign of the second term against Taylor's and the order of the remainder as a third. Computed in
float32.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.prune import masks
from treesurgeon.core import lifting, needs, step

PER = ("matrix", "column")


def importance(
  w: Float[Array, "*shape"],
  gradient: Float[Array, "*shape"],
  fisher: Float[Array, "*shape"],
  general: Float[Array, "*shape"],
  *,
  lam: float,
) -> Float[Array, "*shape"]:
  """Compute what removing each weight changes of the regularized loss.

  Args:
    w: weights.
    gradient: mean gradient on the domain's text.
    fisher: Fisher information of the domain's text.
    general: Fisher information of the general text, G.
    lam: weight of the general text; 1/2 counts it like the domain's.

  Returns:
    The magnitude of the change, in nats, float32.

  Example:
    >>> w, f, g = jnp.array([2.0, 2.0]), jnp.array([0.5, 0.0]), jnp.array([0.0, 0.5])
    >>> importance(w, jnp.zeros(2), f, g, lam=0.5).tolist()
    [1.0, 1.0]
  """
  w = w.astype(jnp.float32)
  return jnp.abs(gradient * w - 0.5 * (fisher + 2 * lam * general) * jnp.square(w))


@step.method("compress.prune.d_pruner")
def d_pruner(
  *,
  sparsity: float = 0.5,
  pattern: str | None = None,
  packed: bool = False,
  lam: float = 0.5,
  per: str = "matrix",
  select: str | None = None,
) -> step.Step:
  """Prune weights that neither a general text nor a domain's text needs.

  Args:
    sparsity: fraction to prune; 0 is the neutral setting. Unused with a pattern.
    pattern: "n:m" keeps n of every m consecutive inputs of each output.
    packed: hold the result as a `SparseTensor`; needs a pattern.
    lam: weight of the general text, not negative; 0 looks at the domain alone.
    per: "matrix" or "column" (output): within what importances are compared.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. It needs two calibration texts: the general one first, then the domain's
    (`--calibration` twice; `Materials.donor_batches`).

  Raises:
    ValueError: for values out of range, and, when applied, for another number of texts.

  Example:
    >>> d_pruner(lam=1.0)
    (compress.prune.d_pruner(lam=1.0),)

  Reference:
    Zhang et al., Pruning as a Domain-specific LLM Extractor, 2024, arXiv:2405.06275.
  """
  n_m = masks.read(sparsity=sparsity, pattern=pattern, packed=packed)
  if lam < 0:
    raise ValueError(f"lam={lam} must not be negative")
  if per not in PER:
    raise ValueError(f"per={per!r}: valid are {', '.join(PER)}")
  hyper = {"sparsity": sparsity, "pattern": n_m, "packed": packed, "per": per, "lam": lam}
  wants = {
    "gradient": needs.Statistic("gradient", of="sets"),
    "fisher": needs.Statistic("fisher", of="sets"),
  }
  return lifting.over_leaves(_leaf, hyper=hyper, select=select, wants=wants)


def _leaf(
  w: Any, gradient: tuple[Any, ...], fisher: tuple[Any, ...], *, lam: float, **hyper: Any
) -> Any:
  if len(fisher) != 2:
    raise ValueError(
      f"d_pruner needs two calibration texts, a general one and then the domain's; {len(fisher)} "
      "given"
    )
  score = importance(w, gradient[1], fisher[1], fisher[0], lam=lam)
  return masks.apply(w, score, **hyper)
