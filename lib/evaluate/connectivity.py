# SPDX-License-Identifier: Apache-2.0
"""Are two networks in one basin? The loss along the line between them, before and after matching.

The barrier is the greatest rise of the loss above the straight line between the ends' losses, as in
Entezari et al., 2021 (arXiv 2110.06296) and Ainsworth et al., 2022 (arXiv 2209.04836). Ito, Yamada
and Kumagai, "Analysis of linear mode connectivity via permutation-based weight matching", 2024
(arXiv 2402.04051) find that matching hardly brings weights nearer in L2, but turns the singular
vectors of large singular values towards each other, which they measure by

  R = Σ_l Σ_ij (u_i · u'_j) (v_i · v'_j) / Σ_l n_l

over the vectors whose singular value is at least γ times the layer's largest. The double sum is the
inner product of U Vᵀ and U' V'ᵀ; where the two networks keep different numbers of vectors, n_l is
their geometric mean, which makes R a cosine. Permutations leave singular values as they are.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.core import paths

GAMMAS = (0.0, 0.3)  # the paper's


@dataclasses.dataclass(frozen=True)
class Line:
  """What was found on the line from one network to another.

  Attributes:
    alphas: places; 0 is the first network.
    losses: mean negative log-likelihood there, in nats.
    accuracies: shares of right predictions.
    distance: L2 norm of the difference of all parameters.
    alignment: γ to R over all matrices.
  """

  alphas: np.ndarray
  losses: np.ndarray
  accuracies: np.ndarray
  distance: float
  alignment: Mapping[float, float]

  @property
  def barrier(self) -> float:
    """Greatest rise of the loss above the straight line between its ends, in nats."""
    return float(np.max(self.losses - _chord(self.alphas, self.losses)))

  @property
  def drop(self) -> float:
    """Greatest fall of the accuracy below the straight line between its ends."""
    return float(np.max(_chord(self.alphas, self.accuracies) - self.accuracies))


@jax.jit
def singular_alignment(
  w: Float[Array, "n m"], v: Float[Array, "n m"], gamma: float | Float[Array, ""] = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Measure how far two matrices' dominant singular vectors point the same way.

  Args:
    w: a matrix.
    v: its counterpart.
    gamma: share of the largest singular value below which a pair of vectors is left out.

  Returns:
    (numerator, denominator) of R for this layer; float32.

  Example:
    >>> top, n = singular_alignment(jnp.eye(3), 2 * jnp.eye(3))
    >>> round(float(top), 4), float(n)
    (3.0, 3.0)
  """

  def polar(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, s, vt = jnp.linalg.svd(x.astype(jnp.float32), full_matrices=False)
    # Below float32's resolution the vectors are arbitrary.
    keep = (s >= jnp.maximum(gamma, 1e-6) * s[0]) & (s > 0)
    return jnp.matmul(u * keep[None, :], vt, precision="highest"), keep.sum()

  (p, n), (q, k) = polar(w), polar(v)
  return (p * q).sum(), jnp.sqrt(n * k).astype(jnp.float32)


def line(
  spec: Any, a: Any, b: Any, batches: Iterable[Any], *, points: int = 11,
  gammas: Sequence[float] = GAMMAS,
) -> Line:  # fmt: skip
  """Evaluate the networks on the line between two.

  One program serves all points, for the place on the line is data.

  Args:
    spec: architecture.
    a: parameters of the first network.
    b: parameters of the second.
    batches: as for `models.nll`; gone through once a point, so a list.
    points: on the line, both ends included.
    gammas: for the alignment.

  Returns:
    What was found.

  Raises:
    ValueError: for fewer than three points, or no batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> found = line(spec, params, params, [jnp.array([[1, 2, 3]])], points=3)
    >>> round(found.barrier, 4) + 0.0, found.distance
    (0.0, 0.0)
  """
  if points < 3:
    raise ValueError(f"points={points} must be at least 3: the ends and one between")
  batches = list(batches)
  if not batches:
    raise ValueError("connectivity needs batches to evaluate and none was given")
  alphas = np.linspace(0.0, 1.0, points)
  found = np.zeros((points, 3))
  for i, alpha in enumerate(alphas):
    for batch in batches:
      found[i] += [float(x) for x in _sums(spec, a, b, jnp.float32(alpha), batch)]
  flat, other = paths.flatten(a), paths.flatten(b)
  gaps = [(np.asarray(flat[n], np.float32) - np.asarray(other[n], np.float32)) for n in flat]
  distance = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gaps)))
  aligned = {g: alignment(flat, other, gamma=g) for g in gammas}
  return Line(alphas, found[:, 0] / found[:, 2], found[:, 1] / found[:, 2], distance, aligned)


def alignment(a: Mapping[str, Any], b: Mapping[str, Any], *, gamma: float = 0.0) -> float:
  """Compute R over all matrices of two networks.

  Args:
    a: address to array.
    b: address to array.
    gamma: see `singular_alignment`.

  Returns:
    1 where all retained singular vectors agree, about 0 where they have nothing to do with each
    other.

  Example:
    >>> round(alignment({"w": jnp.eye(2)}, {"w": jnp.eye(2)}), 4)
    1.0
  """
  parts = [
    singular_alignment(a[n], b[n], jnp.float32(gamma)) for n in a if getattr(a[n], "ndim", 0) == 2
  ]
  top, n = (sum(float(p[i]) for p in parts) for i in range(2))
  return top / n if n else 0.0


def table(lines: Mapping[str, Line]) -> str:
  """Write lines below each other as text.

  Args:
    lines: label to line, such as "as trained" and "weight matching".

  Returns:
    A header and one row a line.

  Example:
    >>> one = Line(np.array([0, 0.5, 1]), np.array([1.0, 3.0, 1.0]), np.ones(3), 2.0, {0.3: 0.25})
    >>> print(table({"as trained": one}))
                        barrier  midpoint  accuracy    L2  R(γ=0.3)
    as trained           2.0000    3.0000    1.0000  2.00     0.250
  """
  gammas = next(iter(lines.values())).alignment
  head = ["barrier", "midpoint", "accuracy", "L2", *(f"R(γ={g:g})" for g in gammas)]
  rows = [
    [f"{x.barrier:.4f}", f"{_middle(x.losses):.4f}", f"{_middle(x.accuracies):.4f}",
     f"{x.distance:.2f}", *(f"{r:.3f}" for r in x.alignment.values())]
    for x in lines.values()
  ]  # fmt: skip
  wide = [max(len(r[i]) for r in (head, *rows)) + 2 for i in range(len(head))]
  names = ["", *lines]
  return "\n".join(
    f"{name:<17}" + "".join(cell.rjust(w) for cell, w in zip(row, wide, strict=True))
    for name, row in zip(names, (head, *rows), strict=True)
  )


def plot(lines: Mapping[str, Line], ax: Any, *, quantity: str = "losses") -> None:
  """Draw what was found against the place on the line.

  Args:
    lines: label to line.
    ax: matplotlib axes.
    quantity: "losses" or "accuracies".

  Example:
    >>> import matplotlib.figure
    >>> one = Line(np.array([0, 0.5, 1]), np.ones(3), np.ones(3), 2.0, {})
    >>> plot({"as trained": one}, matplotlib.figure.Figure().add_subplot())
  """
  for label, found in lines.items():
    ax.plot(found.alphas, getattr(found, quantity), marker=".", label=label)
  ax.set_xlabel("place on the line, from the first network to the second")
  ax.set_ylabel("loss (nats)" if quantity == "losses" else "accuracy")
  ax.legend(frameon=False)


@functools.partial(jax.jit, static_argnums=0)
def _sums(spec: Any, a: Any, b: Any, alpha: jax.Array, batch: Any) -> tuple[jax.Array, ...]:
  def blend(x: jax.Array, y: jax.Array) -> jax.Array:
    mixed = (1 - alpha) * x.astype(jnp.float32) + alpha * y.astype(jnp.float32)
    return mixed.astype(x.dtype)

  logits, labels, weights = models.predictions(spec, jax.tree.map(blend, a, b), batch)
  each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
  right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
  return (each * weights).sum(), (right * weights).sum(), weights.sum()


def _chord(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return (1 - x) * y[0] + x * y[-1]


def _middle(y: np.ndarray) -> float:
  return float(y[len(y) // 2])
