# SPDX-License-Identifier: Apache-2.0
"""Operands that tests and benchmarks share, and programs to compile ahead of time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import leaves, packing
from treesurgeon.kernels.matmul import api, arrange
from treesurgeon.kernels.matmul import tpu as dense_tpu
from treesurgeon.kernels.sparse_matmul import tpu


@functools.partial(jax.jit, static_argnames=("rows", "cols", "n", "m", "bits", "group_size"))
def sparse(
  rows: int, cols: int, n: int, m: int, *, key: jax.Array, bits: int = 0, group_size: int = 0
) -> leaves.SparseTensor:
  """Draw an N:M matrix.

  Args:
    rows, cols: of the matrix.
    n, m: pattern.
    key: random key.
    bits: of quantized values; 0 is bfloat16.
    group_size: kept rows that share a scale; 0 is all.

  Returns:
    The leaf.

  Example:
    >>> sparse(8, 3, 2, 4, key=jax.random.key(0)).values.shape
    (4, 3)
  """
  kept = rows // m * n
  kv, kp, ks = jax.random.split(key, 3)
  order = jnp.argsort(jax.random.uniform(kp, (rows // m, m, cols)), axis=1)[:, :n]
  place = jnp.sort(order, axis=1).astype(jnp.uint8).reshape(kept, cols)
  positions = packing.pack(place, bits=max(1, (m - 1).bit_length()))
  if not bits:
    values: Any = jax.random.normal(kv, (kept, cols)).astype(jnp.bfloat16)
  else:
    group_size = group_size or kept
    codes = jax.random.randint(kv, (kept, cols), 0, 2**bits).astype(jnp.uint8)
    scales = jax.random.uniform(ks, (-(-kept // group_size), cols), minval=0.5) / 2**bits
    values = leaves.QuantizedTensor(
      packing.pack(codes, bits=bits), scales, None, None, rows=kept, cols=cols, bits=bits,
      group_size=group_size,
    )  # fmt: skip
  return leaves.SparseTensor(values, positions, rows, cols, n, m)


@functools.partial(jax.jit, static_argnames=("rows", "cols", "bits", "group", "sparsity", "zeros"))
def group_sparse(
  rows: int,
  cols: int,
  *,
  key: jax.Array,
  bits: int = 4,
  group: int = 16,
  sparsity: float = 0.5,
  zeros: bool = False,
) -> leaves.GroupSparse:
  """Draw a matrix of kept groups, as GQSA makes it.

  Args:
    rows, cols: of the matrix.
    key: random key.
    bits: of a code.
    group: rows in a group.
    sparsity: fraction of groups pruned.
    zeros: whether there are zero points.

  Returns:
    The leaf.

  Example:
    >>> group_sparse(64, 3, key=jax.random.key(0)).kept.shape
    (32, 3)
  """
  kc, km, ks, kz = jax.random.split(key, 4)
  groups = -(-rows // group)
  kept = groups - int(sparsity * groups)
  rank = jnp.argsort(jnp.argsort(jax.random.uniform(km, (groups, cols)), axis=0), axis=0)
  codes = jax.random.randint(kc, (kept * group, cols), 0, 2**bits).astype(jnp.uint8)
  points = jax.random.randint(kz, (kept, cols), 0, 2**bits).astype(jnp.uint8) if zeros else None
  held = leaves.QuantizedTensor(
    packing.pack(codes, bits=bits), jax.random.uniform(ks, (kept, cols), minval=0.5), points, None,
    rows=kept * group, cols=cols, bits=bits, group_size=group,
  )  # fmt: skip
  return leaves.GroupSparse(
    held, packing.pack((rank < kept).astype(jnp.uint8), bits=1), rows, group
  )


def takes(format: str) -> bool:
  """Tell whether a format is one that `product` describes.

  Args:
    format: of a matrix.

  Returns:
    Whether it is.

  Example:
    >>> takes("2:4-int8"), takes("int8")
    (True, False)
  """
  return ":" in format or format in ("gqsa", "vectors")


def product(
  format: str,
  tokens: int,
  rows: int,
  cols: int,
  target: str,
  block: Sequence[int] | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe a product for `static_cost`: bfloat16 activations by a matrix as a device has it.

  Args:
    format: "2:4" or another pattern of bfloat16 values, "2:4-int8" of 8-bit ones; "-g512" behind
      that is the number of kept rows that share a scale. "gqsa" is half of the groups of 16, with
      4 bits, "vectors" 256 vectors of four rows.
    tokens, rows, cols: the product is (tokens, rows) @ (rows, cols).
    target: name of the device.
    block: tokens and columns of a block of the kernel; None lets it choose.

  Returns:
    (function, shapes of its arguments).

  Example:
    >>> product("2:4-int8", 1, 4096, 256, "tpu-v5e")[1][1].values.shape
    (2048, 256)
  """
  x = jax.ShapeDtypeStruct((tokens, rows), jnp.bfloat16)
  if format in ("gqsa", "vectors"):
    vectors = lambda: leaves.Codebook(
      jnp.zeros((rows // 4, cols), jnp.uint8), jnp.zeros((256, 4)), rows, cols, 8, 4
    )
    groups = lambda: group_sparse(rows, cols, key=jax.random.key(0))
    make = vectors if format == "vectors" else groups
    leaf = jax.eval_shape(lambda: arrange.prepare(make(), target=target))
    if block is not None:
      fn = functools.partial(dense_tpu.matmul, dtype=jnp.bfloat16, block=(block[0], block[1]))
      return fn, (x, leaf.weight)
    return api.matmul, (x, leaf)
  pattern, _, values = format.partition("-")
  values, _, size = values.partition("-g")
  n, m = (int(word) for word in pattern.split(":"))
  bits = int(values.removeprefix("int") or 0)
  draw = lambda key: arrange.prepare(
    sparse(rows, cols, n, m, key=key, bits=bits, group_size=int(size or 0)), target=target
  )
  leaf = jax.eval_shape(draw, jax.random.key(0))
  if block is not None:
    fn = functools.partial(tpu.matmul, dtype=jnp.bfloat16, block=(block[0], block[1]))
    return fn, (x, leaf)
  return api.matmul, (x, leaf)
