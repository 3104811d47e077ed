# SPDX-License-Identifier: Apache-2.0
"""Linear algebra that several methods share, in float32, all of it jit-able."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def damped_cholesky(
  h: Float[Array, "n n"], damping: float | Float[Array, ""], *, tries: int = 6
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
  """Factor `h + d * mean(diag h) * I`, raising d tenfold while the factorization fails.

  Args:
    h: symmetric positive semi-definite matrix.
    damping: first d to try, relative to the mean diagonal.
    tries: how often to try.

  Returns:
    (lower factor, the d that was used). The factor holds NaN if every try failed.

  Example:
    >>> factor, used = damped_cholesky(jnp.eye(2), 0.01)
    >>> round(float(used), 3)
    0.01
  """
  scale = jnp.maximum(jnp.mean(jnp.diag(h)), jnp.finfo(jnp.float32).tiny)
  eye = jnp.eye(h.shape[0], dtype=h.dtype)

  def failed(state: tuple) -> jax.Array:
    _, _, n, fine = state
    return ~fine & (n < tries)

  def once(state: tuple) -> tuple:  # the first try too, which then is compiled but once
    _, d, n, _ = state
    low = jax.lax.linalg.cholesky(h + d * scale * eye, symmetrize_input=False)
    fine = jnp.isfinite(low).all()
    return low, jnp.where(fine, d, jnp.maximum(d * 10, 1e-6)), n + 1, fine

  start = jnp.zeros_like(h), jnp.asarray(damping, jnp.float32), 0, jnp.asarray(False)
  low, d, _, _ = jax.lax.while_loop(failed, once, start)
  return low, d


def gram(x: Float[Array, "rows n"]) -> Float[Array, "n n"]:
  """Multiply a matrix by itself, xᵀ x, computing three of the four quarters.

  Args:
    x: float32.

  Returns:
    The symmetric product.

  Example:
    >>> gram(jnp.array([[1.0, 2.0, 3.0]])).tolist()
    [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]
  """
  n = x.shape[1] // 2
  low = x[:, n:]
  top = jnp.matmul(x[:, :n].T, x, precision="highest")
  bottom = jnp.matmul(low.T, low, precision="highest")
  return jnp.block([[top], [jnp.concatenate([top[:, n:].T, bottom], axis=1)]])


def inverse_from_cholesky(low: Float[Array, "n n"]) -> Float[Array, "n n"]:
  """Invert a symmetric matrix from its lower Cholesky factor.

  Args:
    low: lower factor L, the matrix being L Lᵀ.

  Returns:
    The symmetric inverse.

  Example:
    >>> inverse_from_cholesky(2 * jnp.eye(2))[0, 0].item()
    0.25
  """
  eye = jnp.eye(low.shape[0], dtype=low.dtype)
  half = jax.scipy.linalg.solve_triangular(low, eye, lower=True)
  return half.T @ half


def inverse_factor(
  h: Float[Array, "n n"], damping: float | Float[Array, ""], *, tries: int = 6
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
  """Factor the inverse of a damped matrix, (h + d I)⁻¹ = Uᵀ U, without forming the inverse.

  With J the reversal, J h J = L Lᵀ gives h = R Rᵀ for the upper R = J L J, and U = R⁻¹: one
  Cholesky factorization and one triangular solve, where inverting and factoring again takes
  two of each and squares the rounding error.

  Args:
    h: symmetric positive semi-definite matrix.
    damping: as in `damped_cholesky`.
    tries: as in `damped_cholesky`.

  Returns:
    (upper factor U, the damping that was used). U holds NaN if every try failed.

  Example:
    >>> inverse_factor(4 * jnp.eye(2), 0.0)[0][0, 0].item()
    0.5
  """
  low, used = damped_cholesky(h[::-1, ::-1], damping, tries=tries)
  eye = jnp.eye(h.shape[0], dtype=low.dtype)
  upper = jax.scipy.linalg.solve_triangular(low[::-1, ::-1], eye, lower=False)
  return upper, used
