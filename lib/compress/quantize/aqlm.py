# SPDX-License-Identifier: Apache-2.0
"""AQLM: vectors of weights as sums of table entries, chosen by beam search on the output error.

A kernel (in, out) is cut into vectors of `length` inputs of one output. Each is a sum of one entry
of each of M tables, times a scale of its output. Residual k-means of the weights, divided by the
norm of their output, begins; then by turns, until the output error tr(dWᵀ H dW) stops falling:

* the tables become the least-squares solution for their codes, by conjugate gradients, which need
  nothing but products with H; then the scales, in closed form;
* the codes are searched anew: vector after vector and table after table, every entry is tried in
  each of `beam` hypotheses of an output, and the best `beam` of all are kept.

No part raises the error. With `epochs` the tables and scales of a block are then tuned together by
gradient descent on the block's output. In float32; stored in the dtype of the kernel.

Where we differ from the paper's code: least squares instead of 100 steps of Adam; vectors and
tables in order instead of a random one; tables grow with the kernel until they have 65536 entries;
norms and biases are not tuned, and what tuning found best is kept (its `finetune_keep_best`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import additive, vptq
from treesurgeon.compress.quantize import tune as tuning
from treesurgeon.core import leaves, lifting, needs, packing, step

ROUNDS = 1000  # at most; the error stops falling long before


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  key: jax.Array,
  length: int = 8,
  entries: int | None = None,
  tables: int = 1,
  beam: int = 1,
  tolerance: float = 0.01,
  iterations: int = 100,
) -> Any:
  """Quantize vectors of a matrix so that its outputs on the calibration inputs change least.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    key: draws first centroids.
    length: inputs that a vector covers; the last vector of an output may be shorter.
    entries: vectors in a table; None is a power of two that grows with the matrix.
    tables: how many entries are added.
    beam: hypotheses kept for each output.
    tolerance: stop when a round lowers the error by less than this part of it.
    iterations: of k-means, at most.

  Returns:
    A `Codebook` with scales; with several tables a `Sum` of them.

  Example:
    >>> w = jnp.array([[1.0, 4.0], [1.0, 4.0], [-1.0, 2.0], [-1.0, 2.0]])
    >>> leaf = quantize(w, jnp.eye(4), key=jax.random.key(0), length=2, entries=4)
    >>> bool(jnp.allclose(leaf.dense(), w))
    True
  """
  rows, cols = w.shape
  more = -rows % length
  padded = jnp.pad(w.astype(jnp.float32), [(0, more), (0, 0)])
  h = jnp.pad(h.astype(jnp.float32), [(0, more), (0, more)])
  mean = jnp.diag(h).sum() / rows
  h = jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1.0), jnp.eye(rows + more))
  k = entries or vptq.default_entries((rows + more) // length * cols)
  state = additive.start(padded, key=key, length=length, k=k, tables=tables, iterations=iterations)

  def better(carry: tuple) -> jax.Array:
    _, now, before, count = carry
    return (count < ROUNDS) & (now < (1 - tolerance) * before)

  def again(carry: tuple) -> tuple:
    state, now, _, count = carry
    state = additive.fit_tables(padded, h, state)
    state = additive.fit_scales(padded, h, state)
    state = additive.search(padded, h, state, beam=beam)
    return state, additive.error(padded, h, state), now, count + 1

  first = additive.error(padded, h, state)
  state, *_ = jax.lax.while_loop(better, again, (state, first, jnp.float32(jnp.inf), 0))
  parts = [
    _leaf(code, table.astype(w.dtype), state.scales.astype(w.dtype), rows)
    for code, table in zip(state.codes, state.tables, strict=True)
  ]
  return parts[0] if tables == 1 else leaves.Sum(tuple(parts))


@step.method("compress.quantize.aqlm")
def aqlm(
  *,
  length: int = 8,
  entries: int | None = None,
  tables: int = 1,
  beam: int = 1,
  tolerance: float = 0.01,
  iterations: int = 100,
  epochs: int = 5,
  rate: float = 1e-5,
  batch: int = 1,
  select: str | None = None,
) -> step.Step:
  """Quantize vectors of kernels to sums of table entries, and tune these over blocks.

  Args:
    length: inputs that a vector covers; the last vector of an output may be shorter.
    entries: vectors in a table, at most 65536; None grows with the kernel until then.
    tables: how many entries are added.
    beam: hypotheses kept for each output.
    tolerance: a round that lowers the error by less than this part of it is the last.
    iterations: of k-means, at most.
    epochs: times that the calibration data is gone through to tune a block; 0 does not.
    rate: Adam's step size then.
    batch: rows of the calibration data a step.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> aqlm(tables=2, entries=256)
    (compress.quantize.aqlm(entries=256, tables=2),)

  Reference:
    Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization,
    2024, arXiv:2401.06118.
  """
  vptq.check(length=length, entries=entries)
  for name, value in (("tables", tables), ("beam", beam), ("batch", batch)):
    if value < 1:
      raise ValueError(f"{name}={value}: valid is 1 or more")
  if epochs < 0:
    raise ValueError(f"epochs={epochs}: valid is 0 (do not tune blocks) or more")
  if not 0 <= tolerance < 1:
    raise ValueError(f"tolerance={tolerance}: valid is 0 to below 1, a part of the error")
  how = {
    "length": length, "entries": entries, "tables": tables, "beam": beam,
    "tolerance": tolerance, "iterations": iterations,
  }  # fmt: skip
  wants = {"hessian": needs.Statistic("second_moment")}
  if not epochs:
    return lifting.over_leaves(
      _kernel, hyper=how, select=select, wants=wants, raw=True, random=True, scope="block"
    )
  hyper = {**how, "epochs": epochs, "rate": rate, "batch": batch}
  return lifting.over_blocks(_block, hyper=hyper, wants=wants, select=select, raw=True, random=True)


def _kernel(w: Any, hessian: Any, key: jax.Array, **how: Any) -> Any:
  return w if _done(w, how["length"]) else quantize(leaves.dense(w), hessian.moment, key=key, **how)


def _block(
  w: Mapping[str, Any],
  *,
  inputs: jax.Array,
  targets: jax.Array,
  forward: Any,
  hessian: Mapping[str, Any],
  key: jax.Array,
  epochs: int,
  rate: float,
  batch: int,
  **how: Any,
) -> dict[str, Any]:
  fresh = [n for n, x in w.items() if not _done(x, how["length"])]
  if not fresh:
    return dict(w)
  made = {n: _kernel(x, hessian[n], step.leaf_key(key, n), **how) for n, x in w.items()}
  return tuning.kernels(
    made, only=lambda name: name in fresh, inputs=inputs, targets=targets, forward=forward,
    optimizer=optax.adam(rate, b1=0.9, b2=0.95), epochs=epochs, batch=batch,
  )  # fmt: skip


def _done(leaf: Any, length: int) -> bool:
  part = leaf.parts[0] if isinstance(leaf, leaves.Sum) else leaf
  return (
    isinstance(part, leaves.Codebook)
    and (part.length, part.width) == (length, 1)
    and part.scales is not None
  )


def _leaf(codes: jax.Array, table: jax.Array, scales: jax.Array, rows: int) -> leaves.Codebook:
  bits = max(1, (len(table) - 1).bit_length())
  packed = packing.pack(codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16), bits=bits)
  return leaves.Codebook(packed, table, rows, codes.shape[1], bits, table.shape[1], scales)
