# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices of any order whose entries are of one size, or nearly, as fast products.

Order n = m 2^k is the Kronecker product of a core of order m and Sylvester's matrix. The core is a
Hadamard matrix by Paley's constructions where a prime gives one (p + 1 for p = 3 mod 4, 2 (p + 1)
for p = 1 mod 4); m takes as many twos as that needs. Else it is Hartley's matrix of the odd part,
(cos + sin)(2 pi i j / m), which is orthogonal for every m and has no entry above sqrt(2).

QuaRot's code has tables of Hadamard matrices for some orders that no prime gives (52, 156, 172) and
no matrix for others (Ashkboos et al., arXiv:2404.00456); here those are Hartley's.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 32  # order of the Sylvester factors that a product goes through one by one
TWOS = 4  # that a core takes at most, so that it stays small


def transform(x: Float[Array, "*batch n"], *, back: bool = False) -> Float[Array, "*batch n"]:
  """Multiply by `matrix(n)` from the right, in n log n.

  Args:
    x: any vectors.
    back: multiply by the transposed matrix, its inverse.

  Returns:
    x H or x Hᵀ, in the dtype of `x`; computed in float32.

  Example:
    >>> transform(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
  """
  n, batch = x.shape[-1], x.shape[:-1]
  parts = factors(n)
  y = x.astype(jnp.float32).reshape(*batch, *(len(f) for f in parts))
  for f in parts:  # the first factor's axis goes last, so after all of them they stand in order
    y = jnp.tensordot(y, jnp.asarray(f), axes=((len(batch),), (int(back),)), precision="highest")
  return (y.reshape(x.shape) * n**-0.5).astype(x.dtype)


def matrix(n: int) -> Float[Array, "n n"]:
  """Compute the orthogonal matrix of an order.

  Args:
    n: order.

  Returns:
    H in float32; its entries are +-1 / sqrt(n) where it is a Hadamard matrix.

  Example:
    >>> (matrix(2) * 2**0.5).round(6).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
  """
  return transform(jnp.eye(n, dtype=jnp.float32))


@functools.lru_cache(maxsize=64)
def factors(n: int) -> tuple[np.ndarray, ...]:
  """List the matrices whose Kronecker product is `matrix(n)`, but for its scale.

  Args:
    n: order.

  Returns:
    Square matrices in float32 with rows of norm sqrt(order), the core first.

  Raises:
    ValueError: for an order below 1.

  Example:
    >>> [len(f) for f in factors(1536)], [len(f) for f in factors(33)]
    ([12, 32, 4], [33])
  """
  if n < 1:
    raise ValueError(f"there is no matrix of order {n}; valid: 1 and above")
  odd, twos = n, 0
  while odd % 2 == 0:
    odd, twos = odd // 2, twos + 1
  found: list[np.ndarray] = []
  if odd > 1:
    orders = [odd << k for k in range(2, min(twos, TWOS) + 1) if paley(odd << k) is not None]
    core = paley(orders[0]) if orders else None
    twos -= (orders[0] // odd).bit_length() - 1 if orders else 0
    found.append(_hartley(odd) if core is None else core)
  while twos:
    step = min(twos, BLOCK.bit_length() - 1)
    found.append(_sylvester(step))
    twos -= step
  return tuple(found) or (np.ones((1, 1), np.float32),)


def paley(n: int) -> np.ndarray | None:
  """Construct a Hadamard matrix from the squares modulo a prime.

  Args:
    n: order, a multiple of 4.

  Returns:
    A matrix of +-1 in float32, or None where n - 1 is no prime of the form 4 i + 3 and n / 2 - 1
    none of the form 4 i + 1.

  Reference:
    Paley, On Orthogonal Matrices, 1933.

  Example:
    >>> h = paley(12)
    >>> bool((h @ h.T == 12 * np.eye(12)).all()), paley(92) is None
    (True, True)
  """
  for p, kind in ((n - 1, 3), (n // 2 - 1, 1)):
    if p % 4 != kind or any(p % d == 0 for d in range(2, int(p**0.5) + 1)):
      continue
    squares = -np.ones(p)
    squares[(np.arange(1, p) ** 2) % p] = 1
    squares[0] = 0
    border = np.ones((p + 1, p + 1))
    border[0, 0] = 0
    border[1:, 1:] = squares[(np.arange(p)[:, None] - np.arange(p)[None, :]) % p]
    if kind == 3:
      border[1:, 0] = -1
      return (border + np.eye(p + 1)).astype(np.float32)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(border, plus) + np.kron(np.eye(p + 1), minus)).astype(np.float32)
  return None


def _hartley(n: int) -> np.ndarray:
  angle = 2 * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n
  return (np.cos(angle) + np.sin(angle)).astype(np.float32)


def _sylvester(k: int) -> np.ndarray:
  return functools.reduce(np.kron, [np.array([[1, 1], [1, -1]], np.float32)] * k)
