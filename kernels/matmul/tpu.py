# SPDX-License-Identifier: Apache-2.0
"""Products with prepared quantized matrices on a TPU: decoded in registers, never in memory.

Here are the choice of blocks, the call, and the gradient; the arithmetic is in `tpu_block.py`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from treesurgeon.core import leaves
from treesurgeon.kernels import devices, tuning
from treesurgeon.kernels.matmul import (
  arrange,
  chunks,
  layouts,
  prepared,
  reference,
  stacked,
  tpu_block,
  tpu_transposed,
)

UNIT = layouts.GROUP
TOKENS = 256  # of a block
PRE = 96  # from so many tokens on weights are scaled, where the chip computes with bfloat16
SMALL = 16  # and in groups of so many rows always: their partial products are eight a unit,
SMALL_EXACT = 32  # or so many, where scales are of bfloat16 anyway
CODES = 13 << 19  # bytes of a block of codes, of which two are in the chip's fast memory
VMEM = 32 << 20  # of 64 or 128 MiB; XLA counts this and what is used, and needs some itself


def unsupported(x: jax.Array, leaf: Any) -> str:
  """Say why the kernel cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> from treesurgeon.core import leaves
    >>> unsupported(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes what kernels.prepare made for a TPU, not LowRank'
  """
  leaf = stacked.matrix(leaf)
  if not isinstance(leaf, prepared.PreparedTensor):
    reason = f"it takes what kernels.prepare made for a TPU, not {type(leaf).__name__}"
    refused = arrange.unsupported(leaf) if isinstance(leaf, leaves.QuantizedTensor) else ""
    return f"{reason}, and prepare leaves this one: {refused}" if refused else reason
  wanted = ("bfloat16", "float32") if leaf.inputs == "bfloat16" else (leaf.inputs,)
  if x.dtype.name not in wanted:
    return f"it takes activations in {' or '.join(wanted)}, not {x.dtype.name}"
  if leaf.target in devices.GPUS:
    return f"it takes what kernels.prepare made for a TPU, not for {leaf.target}"
  if x.size == 0:
    return f"it takes at least one token, not x of shape {x.shape}"
  return ""


def matmul(
  x: Num[Array, "*batch rows"],
  leaf: prepared.PreparedTensor | stacked.LayerOf,
  *,
  dtype: Any = jnp.float32,
  block: tuple[int, int] | None = None,
) -> Float[Array, "*batch cols"]:
  """Multiply by a prepared leaf. The gradient reaches `x`, scales and zero points.

  Args:
    x: activations; rounded to bfloat16, as XLA's default precision on a TPU does. int8 where the
      leaf was prepared for quantized inputs.
    leaf: what `prepare` returned, or one layer of it.
    dtype: of the result.
    block: tokens and columns of a block; None takes `blocks`.

  Returns:
    The product, accumulated in float32.
  """
  flat = x.reshape(-1, leaf.rows)
  block = block or blocks(flat.shape[0], stacked.matrix(leaf))
  y: jax.Array = _product(jnp.dtype(dtype).name, block, flat, leaf)  # pyright: ignore
  return y.reshape(*x.shape[:-1], leaf.cols)


def blocks(tokens: int, leaf: prepared.PreparedTensor) -> tuple[int, int]:
  """Choose the block of the grid: what tuning found for the device, or else by `rule`.

  Args:
    tokens: rows of the activations.
    leaf: the matrix, arrays or their shapes.

  Returns:
    (tokens, columns) of a block.

  Example:
    >>> from treesurgeon.core import leaves
    >>> w = leaves.QuantizedTensor(jnp.zeros((512, 4096), jnp.uint8), jnp.ones((1, 4096)), None,
    ...                            None, rows=1024, cols=4096, bits=4, group_size=1024)
    >>> from treesurgeon.kernels.matmul import arrange
    >>> blocks(300, arrange.prepare(w, target="tpu-v6e"))
    (256, 1024)
  """
  case = tuning.case_of(leaf.layout, leaf.width, leaf.group_size, tokens, leaf.rows, leaf.cols)
  found = tuning.lookup(leaf.target, "matmul", case)
  return rule(tokens, leaf) if found is None else (min(tokens, found[0]), found[1])


def rule(tokens: int, leaf: prepared.PreparedTensor) -> tuple[int, int]:
  """Choose a block untuned: long transfers, yet a first one that is a small part.

  Args:
    tokens: rows of the activations.
    leaf: the matrix, arrays or their shapes.

  Returns:
    (tokens, columns) of a block.
  """
  cols = leaf.codes.shape[-1]
  most = 2048 if tokens <= 64 and cols >= 8192 else 1024
  width = min(most, widest(leaf), cols // 4) // UNIT * UNIT
  return min(tokens, TOKENS), max(UNIT, width)


def widest(leaf: prepared.PreparedTensor) -> int:
  """Count the columns whose codes fit a block."""
  per_column = leaves.nbytes(leaf.codes) // leaf.codes.shape[-1] // math.prod(leaf.batch)
  return CODES // (per_column // leaf.steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dtype: str, block: tuple[int, int], x: jax.Array, leaf: Any) -> jax.Array:
  x = x.astype(stacked.matrix(leaf).inputs)
  return _call(x, leaf, jnp.dtype(dtype), block)


def _forward(dtype: str, block: tuple[int, int], x: jax.Array, leaf: Any) -> tuple[jax.Array, Any]:
  return _product(dtype, block, x, leaf), (x, leaf)


def _backward(dtype: str, block: tuple[int, int], kept: Any, g: jax.Array) -> tuple[Any, Any]:
  del dtype
  x, leaf = kept
  # The scales' gradients materialise the matrix; where nobody asks for them they are not compiled.
  dx, dleaf = jax.vjp(reference.matmul, x, leaf)[1](g.astype(jnp.float32))
  leaf = leaf.take() if isinstance(leaf, stacked.LayerOf) else leaf
  if leaf.inputs == "bfloat16":
    pre = scales_weights(block[0], leaf)
    dx = tpu_transposed.matmul(g, leaf, dtype=x.dtype, width=min(block[1], 1024), pre=pre)
  return dx, dleaf


_product.defvjp(_forward, _backward)


def scales_weights(tokens: int, leaf: prepared.PreparedTensor) -> bool:
  """Tell whether the kernel scales weights, which it rounds to bfloat16, and not their products.

  Args:
    tokens: of a block.
    leaf: what `prepare` returned.

  Returns:
    Whether it does: with many tokens, or with small groups.
  """
  small = SMALL_EXACT if leaf.scales.dtype == jnp.bfloat16 else SMALL
  many = tokens >= PRE or leaf.group_size <= small < leaf.rows
  return many and devices.find(leaf.target).converts and leaf.inputs == "bfloat16"


def _call(x: jax.Array, leaf: Any, dtype: Any, block: tuple[int, int]) -> jax.Array:
  # A scalar that is fetched ahead says which matrix of a stack the transfers of codes are from.
  chosen = [leaf.index.reshape(1)] if isinstance(leaf, stacked.LayerOf) else []
  leaf = stacked.matrix(leaf)
  tokens, cols = x.shape[0], leaf.codes.shape[-1]
  rows_of_block, width = block
  steps = leaf.steps
  units = leaf.step if steps > 1 else -(-leaf.rows // UNIT)
  padded = steps * units * UNIT
  x = jnp.pad(x, [(0, 0), (0, padded - leaf.rows)]) if padded > leaf.rows else x
  one_group = leaf.group_size >= leaf.rows

  def spec(shape: tuple[int | None, ...], at: Any) -> pl.BlockSpec:
    """Lay a block out that does not depend on the layer."""
    return pl.BlockSpec(shape, lambda m, n, k, *layer: at(m, n, k))

  def of_layer(shape: tuple[int | None, ...], at: Any) -> pl.BlockSpec:
    if not chosen:
      return spec(shape, at)
    return pl.BlockSpec((None, *shape), lambda m, n, k, layer: (layer[0], *at(m, n, k)))

  scale_at = (lambda m, n, k: (0, 0, n)) if one_group else (lambda m, n, k: (k, 0, n))
  code_rows = leaf.codes.shape[-2] // steps
  parts = [leaf.scales] if leaf.zeros is None else [leaf.scales, leaf.zeros]
  kernel = functools.partial(
    tpu_block.multiply,
    units=units,
    line=leaf.line,
    layout=leaf.layout,
    size=units * UNIT if one_group else leaf.group_size,
    pre=scales_weights(rows_of_block, leaf),
    steps=steps,
    has_zeros=leaf.zeros is not None,
  )
  y = pl.pallas_call(
    (lambda layer, *refs: kernel(*refs)) if chosen else kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(chosen),
      grid=(pl.cdiv(tokens, rows_of_block), pl.cdiv(cols, width), steps),
      in_specs=[
        spec((rows_of_block, units * UNIT), lambda m, n, k: (m, k)),
        of_layer((code_rows, width), lambda m, n, k: (k, n)),
        *(of_layer((None, leaf.scales.shape[-2], width), scale_at) for _ in parts),
      ],
      out_specs=spec((rows_of_block, width), lambda m, n, k: (m, n)),
      scratch_shapes=[pltpu.VMEM((rows_of_block, width), jnp.float32)] if steps > 1 else [],
    ),
    out_shape=chunks.like((tokens, cols), dtype, x, leaf),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    name=f"matmul_{leaf.format}{leaf.bits}",
  )(*chosen, x, leaf.codes, *parts)
  return y[:, : leaf.cols]
