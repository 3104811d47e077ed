# SPDX-License-Identifier: Apache-2.0
"""Optimal brain surgeon for units of several rows: which go first, and what the others become.

Hassibi and Stork (1992) for blocks of rows, as ZipLM has it (Kurtic et al., arXiv:2302.04089): with
H the second moment of a kernel's inputs, removing the rows S adds tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S) to the
output error, the other rows making up for it. Updates one after another arrive at the least squares
solution on the rows kept, so any level is computed from its rows alone. Float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def removal(
  w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], *, block: int, damping: float
) -> tuple[Int[Array, " units"], Float[Array, " levels"]]:
  """Remove units one at a time, each time the cheapest.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    block: rows of a unit.
    damping: added to the diagonal of `h`, relative to its mean.

  Returns:
    (units in the order they go, relative output error after 0, 1, ... all are gone), float32.

  Example:
    >>> order, errors = removal(jnp.array([[1.0], [3.0]]), jnp.eye(2), block=1, damping=0.0)
    >>> order.tolist(), jnp.square(errors).round(3).tolist()[::2]
    ([0, 1], [0.0, 1.0])
  """
  w, h = w.astype(jnp.float32), damped(h, damping)
  rows, cols = w.shape
  count = rows // block
  whole = jnp.einsum("ic,ij,jc->", w, h, w, precision="highest")
  places = jnp.arange(count)

  def one(k: jax.Array, state: tuple) -> tuple:
    w, inverse, gone, order, errors = state
    own = inverse.reshape(count, block, count, block)[places, :, places, :]
    parts = w.reshape(count, block, cols)
    weighted = jnp.linalg.solve(own, parts)
    costs = jnp.where(gone, jnp.inf, (parts * weighted).sum(axis=(1, 2)))
    unit = jnp.argmin(costs)
    columns = jax.lax.dynamic_slice_in_dim(inverse, unit * block, block, axis=1)
    w = w - jnp.matmul(columns, weighted[unit], precision="highest")
    factor = jnp.linalg.solve(own[unit], columns.T)
    inverse = inverse - jnp.matmul(columns, factor, precision="highest")
    gone = gone.at[unit].set(True)
    out = jnp.repeat(gone, block, total_repeat_length=rows)
    w = jnp.where(out[:, None], 0.0, w)
    inverse = jnp.where(out[:, None] | out[None, :], 0.0, inverse)
    inverse = inverse + jnp.diag(out.astype(jnp.float32))  # so that what is gone can be solved
    order, errors = order.at[k].set(unit), errors.at[k + 1].set(jnp.maximum(costs[unit], 0.0))
    return w, inverse, gone, order, errors

  start = w, jnp.linalg.inv(h), jnp.zeros(count, bool), jnp.zeros(count, int), jnp.zeros(count + 1)
  *_, order, errors = jax.lax.fori_loop(0, count, one, start)
  return order, jnp.sqrt(jnp.cumsum(errors) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny))


def refit(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  kept: Int[Array, " kept"],
  *,
  damping: float,
) -> Float[Array, "kept cols"]:
  """Let the rows that stay do as well as they can what all rows did.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    kept: rows that stay.
    damping: as for `removal`, whose updates arrive here.

  Returns:
    Their weights, float32.

  Example:
    >>> h = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    >>> refit(jnp.array([[1.0], [2.0]]), h, jnp.array([1]), damping=0.0).tolist()
    [[3.0]]
  """
  h = damped(h, damping)[kept]
  right = jnp.matmul(h, w.astype(jnp.float32), precision="highest")
  return jnp.linalg.solve(h[:, kept], right)


def damped(h: Float[Array, "n n"], damping: float) -> Float[Array, "n n"]:
  """Add to the diagonal of a second moment.

  Args:
    h: the second moment.
    damping: relative to the mean diagonal.

  Returns:
    float32.

  Example:
    >>> damped(jnp.ones((1, 1)), 0.5).item()
    1.5
  """
  h = h.astype(jnp.float32)
  return h + damping * jnp.mean(jnp.diag(h)) * jnp.eye(h.shape[0], dtype=jnp.float32)
