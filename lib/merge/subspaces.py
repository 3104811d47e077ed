# SPDX-License-Identifier: Apache-2.0
"""What merges that treat a task vector as a matrix share: singular vectors, polar factors, descent.

Decompositions are of the matrices themselves, in float32. An eigendecomposition of the smaller Gram
matrix would be cheaper, but it squares the singular values: what lies below sqrt(eps) = 3e-4 of the
largest is noise there, with its vectors, and these merges use every direction. In a singular value
decomposition the same directions keep an error of about eps over their distance to the next.

A direction whose singular value is zero up to rounding has arbitrary singular vectors, which differ
between platforms. `svd` hands such directions over as zeros, so that no merge depends on them.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.merge import weights as weights_lib

# Where one output neuron's weights lie: our kernels are (in, out), all else is (out, in).
AXES = ((".*kernel", 0), (".*", -1))
# Linear layers, by our addresses and by common names in files.
LINEAR = r"(?!.*(?:embed|wte|wpe)).*(?:kernel|weight)"

matmul = functools.partial(jnp.matmul, precision="highest")
einsum = functools.partial(jnp.einsum, precision="highest")


def task_vectors(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, "donors *shape"]:
  """Stack the donors' differences from the base, τ_i = c_i (θ_i − θ₀), in float32.

  Args:
    w: the base's array θ₀.
    donors: the fine-tuned arrays θ_i.
    weights: one number c_i a donor; None means ones.

  Returns:
    The differences, donors first.

  Raises:
    ValueError: without donors, or for a wrong number of weights.

  Example:
    >>> task_vectors(jnp.ones(2), (jnp.zeros(2), 3 * jnp.ones(2))).tolist()
    [[-1.0, -1.0], [2.0, 2.0]]
  """
  scale = weights_lib.resolve(weights, len(donors), of="donors")
  base = w.astype(jnp.float32)
  return jnp.stack([c * (d.astype(jnp.float32) - base) for c, d in zip(scale, donors, strict=True)])


def added(
  w: Float[Array, "*shape"], delta: Float[Array, "*shape"], lam: ArrayLike
) -> Float[Array, "*shape"]:
  """Add a merged task vector to the base: θ₀ + λ τ, in float32.

  Args:
    w: the base's array.
    delta: the task vector.
    lam: λ.

  Returns:
    The sum, in the dtype of `w`.

  Example:
    >>> added(jnp.ones(1), jnp.ones(1), 0.5).tolist()
    [1.5]
  """
  return (w.astype(jnp.float32) + lam * delta).astype(w.dtype)


def oriented(x: Float[Array, "*batch a b"], axis: int) -> Float[Array, "*batch c d"]:
  """Turn matrices so that rows are output neurons; turns them back as well.

  Args:
    x: one matrix or several.
    axis: the axis of the matrix along which one output neuron's weights lie, 0 or -1.

  Returns:
    The matrices, transposed where `axis` is 0.

  Example:
    >>> oriented(jnp.ones((3, 2)), 0).shape
    (2, 3)
  """
  return jnp.swapaxes(x, -1, -2) if axis == 0 else x


def svd(
  x: Float[Array, "*batch m n"], scale: Float[Array, "*batch"] | None = None
) -> tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch n r"]]:
  """Decompose matrices into U diag(s) Vᵀ with all null directions set to zero.

  Args:
    x: one float32 matrix or several.
    scale: what counts as one when zero is told from rounding; None means the largest s.

  Returns:
    (U, s, V), r the smaller side; in U and V columns of null directions are zero.

  Example:
    >>> svd(jnp.array([[2.0, 0.0], [0.0, 0.0]]))[1].tolist()
    [2.0, 0.0]
  """
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  one = s[..., :1] if scale is None else scale[..., None]
  least = 4 * jnp.finfo(jnp.float32).eps * max(x.shape[-2:]) ** 0.5 * one
  live = jnp.where(s > least, 1.0, 0.0)
  return u * live[..., None, :], s * live, jnp.swapaxes(vt, -1, -2) * live[..., None, :]


def polar(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
  """Find the nearest partial isometry to a matrix: its singular values all become one.

  Args:
    x: a float32 matrix, such as orthonormal bases side by side.

  Returns:
    U Vᵀ over the directions that are not null (the Procrustes rotation).

  Example:
    >>> polar(jnp.array([[3.0, 0.0], [0.0, 0.5]])).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  u, _, v = svd(x)
  return matmul(u, v.T)


def side_by_side(x: Float[Array, "donors m k"]) -> Float[Array, "m columns"]:
  """Put matrices next to each other.

  Args:
    x: matrices, donors first.

  Returns:
    (m, donors * k).

  Example:
    >>> side_by_side(jnp.ones((2, 3, 4))).shape
    (3, 8)
  """
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def descend(
  c: Float[Array, "n n"],
  e: Float[Array, "m n"],
  *,
  optimizer: optax.GradientTransformation,
  steps: int,
) -> Float[Array, "m n"]:
  """Minimise tr(x C xᵀ) + 2 tr(E xᵀ) from x = 0; the gradient is 2 (x C + E).

  Interference losses Σ_i ‖(τ − t_i) B_iᵀ‖² are of this form with τ = τ₀ + x, C = Σ B_iᵀ B_i and
  E = Σ (τ₀ − t_i) B_iᵀ B_i. One product a step, whatever the number of donors, and a start that is
  the optimum is kept to the bit.

  Args:
    c: symmetric positive semi-definite C.
    e: E.
    optimizer: optax transformation.
    steps: updates; static.

  Returns:
    x after the last step.

  Example:
    >>> x = descend(jnp.eye(1), -jnp.ones((1, 1)), optimizer=optax.sgd(0.25), steps=30)
    >>> round(float(x[0, 0]), 3)
    1.0
  """

  def update(_: jax.Array, state: tuple) -> tuple:
    x, inner = state
    change, inner = optimizer.update(2 * (matmul(x, c) + e), inner, x)
    return x + change, inner

  start = jnp.zeros_like(e)
  return jax.lax.fori_loop(0, steps, update, (start, optimizer.init(start)))[0]


def hyper(matrices: str) -> Mapping[str, Any]:
  """Write the hyper-parameter that tells an array function which leaves to take as matrices.

  Args:
    matrices: regular expression over addresses.

  Returns:
    {"matrix": rules of `varied`}.

  Raises:
    ValueError: for a pattern that does not compile.

  Example:
    >>> hyper("layers/.*")
    {'matrix': (('layers/.*', True), ('.*', False))}
  """
  try:
    re.compile(matrices)
  except re.error as error:
    raise ValueError(f"matrices={matrices!r} is not a regular expression: {error}") from error
  return {"matrix": ((matrices, True), (".*", False))}
