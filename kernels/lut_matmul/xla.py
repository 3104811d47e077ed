# SPDX-License-Identifier: Apache-2.0
r"""Products by table lookup: sums of a few activations are made once, codes choose among them.

*Codebooks.* A vector of `length` weights in a column is one of E entries, so its product with the
activations is one of E numbers, made for all columns at once:

  y[m, c] = sum_r T[m, r, code[r, c]],   T[m, r, e] = sum_i x[m, r length + i] book[e, i].

A lookup replaces `length` multiplications; the table costs as much as a product with E columns.

*Bit planes* (T-MAC). A code of b bits is a sum of b bits, so a product with codes is a sum of
products with signs that are 0 or 1; of four rows' bits there are 16 sums,

  y[m, c] = sum_p 2^p sum_g T[m, g, index_p[g, c]],  T[m, g, i] = sum_{j: bit j of i} x[m, 4g + j],

whatever the codes' width. T-MAC keeps tables in registers, quantized to 8 bits, and looks 16 or 32
up with one byte shuffle, out of planes stored apart. XLA has no byte shuffle: here tables are
float32, a lookup is a load, and the four bits are taken out of the stream as they come. On a CPU
this is slower than decoding (`docs/results/kernels_cpu.md`), so it is chosen by name only.

Reference:
  Wei et al., T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge, 2024,
  arXiv:2407.00088.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treesurgeon.core import leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import chunks

FEW = 4  # activations whose sums a table of bit planes holds
TABLE = 1 << 20  # bytes of the tables of a run, which stay in a core's cache
INDICES = 2 << 20  # and of what is looked up


def unsupported(x: jax.Array, leaf: Any) -> str:
  """Say why `matmul` cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes Codebook and QuantizedTensor, not LowRank'
  """
  del x
  if isinstance(leaf, leaves.Codebook):
    return ""
  if not isinstance(leaf, leaves.QuantizedTensor):
    return f"it takes Codebook and QuantizedTensor, not {type(leaf).__name__}"
  if not leaf.plain or leaf.group_index is not None:
    return "it takes integers in groups of consecutive rows with plain scales"
  step = math.lcm(FEW, packing.period(leaf.bits))
  if leaf.group_size < leaf.rows and leaf.group_size % step:
    return f"it takes groups of a multiple of {step} rows, not {leaf.group_size}"
  return ""


def unsupported_few(x: jax.Array, leaf: Any) -> str:
  """Say why lookups are not worth while: what the default choice asks.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> leaf = leaves.Codebook(jnp.zeros((8, 512), jnp.uint8), jnp.ones((256, 4)), 32, 512, 8, 4)
    >>> unsupported_few(jnp.ones((1, 32)), leaf)
    ''
    >>> unsupported_few(jnp.ones((64, 32)), leaf)
    'it takes fewer tokens than a vector has rows (4), not 64'
  """
  if not isinstance(leaf, leaves.Codebook):
    return f"it takes Codebook, not {type(leaf).__name__}"
  tokens = math.prod(x.shape[:-1])
  if tokens >= max(2, leaf.length):
    return f"it takes fewer tokens than a vector has rows ({leaf.length}), not {tokens}"
  entries = leaf.codebook.shape[-2]
  if leaf.width > 1 or leaf.length == 1 or entries > leaf.cols:
    return "it takes vectors of several rows and fewer of them in the table than columns"
  return ""


def matmul(x: Float[Array, "*batch rows"], leaf: Any) -> Float[Array, "*batch cols"]:
  """Multiply by looking partial sums up, run by run of rows.

  Args:
    x: activations.
    leaf: Codebook, or QuantizedTensor of integers in groups of consecutive rows.

  Returns:
    The product in float32.

  Example:
    >>> leaf = leaves.Codebook(jnp.ones((1, 1), jnp.uint8), jnp.array([[0.0, 0.0], [2.0, 3.0]]),
    ...                        2, 1, 8, 2)
    >>> matmul(jnp.array([[1.0, 10.0]]), leaf).tolist()
    [[32.0]]
  """
  flat = x.reshape(-1, leaf.rows)
  y = _codebook(flat, leaf) if isinstance(leaf, leaves.Codebook) else _planes(flat, leaf)
  return y.reshape(*x.shape[:-1], leaf.cols)


def _codebook(x: jax.Array, leaf: leaves.Codebook) -> jax.Array:
  tokens = x.shape[0]
  book = leaf.codebook.astype(x.dtype).reshape(-1, leaf.length, leaf.width)
  down, across = -(-leaf.rows // leaf.length), leaf.codes.shape[-1]
  step = packing.period(leaf.bits)
  per_row = 4 * tokens * book.shape[0] * leaf.width
  most = min(TABLE // per_row, INDICES // (4 * tokens * across * leaf.width))
  run = min(max(1, most // step) * step, -(-down // step) * step)
  count = -(-down // run)
  x_CxMxRxL = _runs(x, count, run, leaf.length)
  stream = _bytes(leaf.codes, count, run * leaf.bits // 8)

  def part(x_MxRxL: jax.Array, stream: jax.Array) -> jax.Array:
    table = jnp.einsum("mrl,elw->mrew", x_MxRxL, book, preferred_element_type=jnp.float32)
    index = _offset_books(leaf, packing.unpack(stream, bits=leaf.bits, rows=run))
    index = index[None, :, :, None]  # row for row in its own table
    found = jnp.take_along_axis(table, index, axis=2, mode="promise_in_bounds")
    return found.sum(axis=1).reshape(tokens, across * leaf.width)

  y = jnp.zeros((tokens, across * leaf.width), jnp.float32)
  y = chunks.add_up(part, y, (x_CxMxRxL, stream))[:, : leaf.cols]
  return y if leaf.scales is None else y * base.dense(leaf.scales).astype(jnp.float32)


def _offset_books(leaf: leaves.Codebook, index: jax.Array) -> jax.Array:
  """Count entries through all tables."""
  index = index.astype(jnp.int32)
  if leaf.books == 1:
    return index
  across, entries = index.shape[-1], leaf.codebook.shape[-2] // leaf.books
  return index + (entries * (jnp.arange(across) // -(-across // leaf.books)))[None]


def _planes(x: jax.Array, leaf: leaves.QuantizedTensor) -> jax.Array:
  size, step = min(leaf.group_size, leaf.rows), math.lcm(FEW, packing.period(leaf.bits))
  size = -(-size // step) * step  # of one group of all rows, to whole tables
  count = -(-leaf.rows // size)
  x_CxMxRxF = _runs(x, count, size // FEW, FEW).astype(jnp.float32)
  stream = _bytes(leaf.codes, count, size * leaf.bits // 8)
  scales = leaf.scales.astype(jnp.float32)
  zeros = 2.0 ** (leaf.bits - 1) if leaf.zeros is None else leaf.zeros.astype(jnp.float32)
  zeros = jnp.broadcast_to(zeros, scales.shape)
  which = (np.arange(2**FEW) >> np.arange(FEW)[:, None]) & 1  # (FEW, 16): rows of each sum

  def part(x_MxRxF: jax.Array, stream: jax.Array, s: jax.Array, z: jax.Array) -> jax.Array:
    table = jnp.matmul(x_MxRxF, jnp.asarray(which, jnp.float32), precision="highest")
    codes = packing.unpack(stream, bits=leaf.bits, rows=size).reshape(size // FEW, FEW, leaf.cols)
    y = -z[None] * x_MxRxF.sum(axis=(1, 2))[:, None]
    for p in range(leaf.bits):
      bits = (codes >> p) & 1
      index = bits[:, 0] | bits[:, 1] << 1 | bits[:, 2] << 2 | bits[:, 3] << 3
      index = index[None].astype(jnp.int32)
      found = jnp.take_along_axis(table, index, axis=2, mode="promise_in_bounds")
      y = y + 2.0**p * found.sum(axis=1)
    return y * s[None]

  y = jnp.zeros((x.shape[0], leaf.cols), jnp.float32)
  return chunks.add_up(part, y, (x_CxMxRxF, stream, scales, zeros))


def _runs(x: jax.Array, count: int, run: int, length: int) -> jax.Array:
  """Cut activations into runs of vectors, zeros behind the last."""
  filled = jnp.pad(x, [(0, 0), (0, count * run * length - x.shape[1])])
  return jnp.moveaxis(filled.reshape(x.shape[0], count, run, length), 1, 0)


def _bytes(stream: jax.Array, count: int, size: int) -> jax.Array:
  """Cut a bitstream into as many runs."""
  filled = jnp.pad(stream, [(0, count * size - stream.shape[0]), (0, 0)])
  return filled.reshape(count, size, stream.shape[1])
