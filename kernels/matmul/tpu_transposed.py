# SPDX-License-Identifier: Apache-2.0
"""The product with the transpose of a prepared matrix: what gradients of activations need.

  dx = sum_g (dy s_g) @ (u_g - z_g)^T

from the same packed bytes as the forward product: no dense matrix is made, so an adapter beside a
frozen quantized kernel trains in its memory. With few tokens `dy s` is rounded to bfloat16, and the
correction for zero points sums the rounded values; with many the weights are scaled, as in the
forward product. The grid's last axis runs over blocks of columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from treesurgeon.kernels.matmul import chunks, layouts, prepared, tpu_block

UNIT = layouts.GROUP
TOKENS = 256  # of a block
ROWS = 2048  # of a block, where the groups allow: its sums are as wide
VMEM = 32 << 20


def matmul(
  dy: Float[Array, "tokens cols"],
  leaf: prepared.PreparedTensor,
  *,
  dtype: Any,
  width: int,
  pre: bool = False,
) -> Float[Array, "tokens rows"]:
  """Multiply by the transpose of a prepared leaf that takes floating-point activations.

  Args:
    dy: gradient of the product.
    leaf: what `prepare` returned.
    dtype: of the result.
    width: columns of a block.
    pre: whether to scale the weights.

  Returns:
    The gradient of the activations, accumulated in float32.
  """
  tokens, cols = dy.shape[0], leaf.codes.shape[-1]
  dy = jnp.pad(
    dy.astype(jnp.bfloat16 if pre else jnp.float32),
    [(0, 0), (0, -(-cols // width) * width - dy.shape[1])],
  )
  rows_of_block = min(tokens, TOKENS)
  steps = leaf.steps
  units = leaf.step if steps > 1 else -(-leaf.rows // UNIT)
  cuts = _cuts(leaf, units)
  units //= cuts
  one_group = leaf.group_size >= leaf.rows
  if one_group:
    groups, scale_at = 1, lambda m, k, n: (0, 0, n)
  else:
    groups = leaf.scales.shape[-2] // cuts
    scale_at = lambda m, k, n: (k // cuts, k % cuts, n)
  parts = [leaf.scales] if leaf.zeros is None else [leaf.scales, leaf.zeros]
  block = (rows_of_block, units * UNIT)
  kernel = functools.partial(
    _kernel,
    units=units,
    decode=functools.partial(tpu_block.decoder, line=leaf.line, layout=leaf.layout),
    size=units * UNIT if one_group else leaf.group_size,
    zero=leaf.line.zero,
    factor=leaf.line.factor,
    pre=pre,
    has_zeros=leaf.zeros is not None,
    left=cols % width,
  )
  dx = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(tokens, rows_of_block), steps * cuts, pl.cdiv(cols, width)),
    in_specs=[
      pl.BlockSpec((rows_of_block, width), lambda m, k, n: (m, n)),
      pl.BlockSpec((leaf.codes.shape[0] // steps // cuts, width), lambda m, k, n: (k, n)),
      *(pl.BlockSpec((None, groups, width), scale_at) for _ in parts),
    ],
    out_specs=pl.BlockSpec(block, lambda m, k, n: (m, k)),
    out_shape=chunks.like((tokens, steps * cuts * units * UNIT), dtype, dy, leaf),
    scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    name=f"matmul_transposed_{leaf.format}{leaf.bits}",
  )(dy, leaf.codes, *parts)
  return dx[:, : leaf.rows]


def _cuts(leaf: prepared.PreparedTensor, units: int) -> int:
  """Cut a step over the rows into parts of whole words, groups, and tiles of eight scales."""
  fields = layouts.tile(leaf.layout, leaf.width)[0]
  if leaf.step != units:  # the only step, and not all of its words are full
    return 1
  for cuts in range(-(-units * UNIT // ROWS), 1, -1):
    fits = units % (cuts * fields) == 0
    if leaf.group_size < leaf.rows:
      fits &= leaf.scales.shape[-2] % (8 * cuts) == 0
      fits &= units * UNIT % (cuts * leaf.group_size) == 0
      fits &= leaf.scales.shape[-2] * leaf.group_size == units * UNIT
    if fits:
      return cuts
  return 1


def _kernel(
  dy_ref: Any,
  codes_ref: Any,
  scales_ref: Any,
  *refs: Any,
  units: int,
  decode: Any,
  size: int,
  zero: float,
  factor: float,
  pre: bool,
  has_zeros: bool,
  left: int,
) -> None:
  """Add one block of columns. `size` is the rows of a group, `left` the last block's columns."""
  refs_left = list(refs)
  zeros_ref = refs_left.pop(0) if has_zeros else None
  out_ref, total_ref = refs_left
  n = pl.program_id(2)
  dy = dy_ref[...]
  scales = scales_ref[...].astype(jnp.float32)
  zeros = None if zeros_ref is None else zeros_ref[...].astype(jnp.float32)
  if left:  # what lies beyond the last column is anything, not a number included
    inside = jax.lax.broadcasted_iota(jnp.int32, (1, scales.shape[1]), 1) < jnp.where(
      n == pl.num_programs(2) - 1, left, scales.shape[1]
    )
    scales = jnp.where(inside, scales, 0)
    zeros = None if zeros is None else jnp.where(inside, zeros, 0)
  unit_of = decode(codes_ref, dtype=jnp.bfloat16)
  contract = (((1,), (1,)), ((), ()))
  depth = UNIT if pre else min(size, UNIT)
  weights = tpu_block.scaled(unit_of, scales, zeros, size=size, zero=zero)
  scaled, sums, zero_sums, last = dy, dy, dy, -1

  @pl.when(n == 0)
  def _() -> None:
    total_ref[...] = jnp.zeros_like(total_ref)

  for unit in range(units):
    if pre:
      at = slice(unit * UNIT, (unit + 1) * UNIT)
      total_ref[:, at] += jax.lax.dot_general(
        dy, weights(unit), contract, preferred_element_type=jnp.float32
      )
      continue
    w, base = unit_of(unit)
    for first in range(0, UNIT, depth):
      group = (unit * UNIT + first) // size
      if group != last:
        scaled = (dy * scales[group : group + 1, :]).astype(jnp.bfloat16)
        exact = scaled.astype(jnp.float32)
        sums = exact.sum(axis=1, keepdims=True)
        if zeros is not None:
          zero_sums = (exact * zeros[group : group + 1, :]).sum(axis=1, keepdims=True)
        else:
          zero_sums = sums * zero
        last = group
      y = jax.lax.dot_general(
        scaled, w[first : first + depth], contract, preferred_element_type=jnp.float32
      )
      if zeros is not None or base + zero:
        y = y - (sums * base + zero_sums)
      at = unit * UNIT + first
      total_ref[:, at : at + depth] += y

  @pl.when(n == pl.num_programs(2) - 1)
  def _() -> None:
    out_ref[...] = (total_ref[...] * factor).astype(out_ref.dtype)
