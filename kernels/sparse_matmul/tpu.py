# SPDX-License-Identifier: Apache-2.0
r"""Products with N of every M weights on a TPU: expanded in registers, never in memory.

Values and marks (`prepared.py`) are read as 32-bit words of two bfloat16 or four int8. A mark is
shifted to the lowest bit of its place, t, and `(t << width) - t` fills the place with it. Value j
and that mask is the part of the value that lies in row j + i of its run; what is left of it when
all those are taken away lies in row j + M - N. For 2:4, 26 operations on words give four lanes of
dense weights, each of which goes into the matrix unit whole. int8 is expanded as int8 and converted
afterwards, and scaled in the sum.

The compiler's counts are in docs/results/kernels.md: the vector units take about as long as the
transfers, so N:M pays on every chip, and most in bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import chunks, layouts, sliced
from treesurgeon.kernels.sparse_matmul import prepared

UNIT = layouts.GROUP
TOKENS = 256  # of a block
WIDTH = 1024  # columns of a block
VALUES = 13 << 19  # bytes of a block of values, of which two are in the chip's fast memory
VMEM = 32 << 20  # of 64 or 128 MiB; XLA counts this and what is used, and needs some itself


def unsupported(x: jax.Array, leaf: Any) -> str:
  """Say why the kernel cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes N:M weights that kernels.prepare made for a TPU, not LowRank'
  """
  if not isinstance(leaf, prepared.PreparedSparse):
    reason = f"it takes N:M weights that kernels.prepare made for a TPU, not {type(leaf).__name__}"
    refused = prepared.unsupported(leaf) if isinstance(leaf, leaves.SparseTensor) else ""
    return f"{reason}, and prepare leaves this one: {refused}" if refused else reason
  if x.dtype.name not in ("bfloat16", "float32"):
    return f"it takes activations in bfloat16 or float32, not {x.dtype.name}"
  if x.size == 0:
    return f"it takes at least one token, not x of shape {x.shape}"
  return ""


def matmul(
  x: Float[Array, "*batch rows"],
  leaf: prepared.PreparedSparse,
  *,
  dtype: Any = jnp.float32,
  block: tuple[int, int] | None = None,
) -> Float[Array, "*batch cols"]:
  """Multiply by a prepared leaf. The gradient reaches `x`, values and scales.

  Args:
    x: activations; rounded to bfloat16, as XLA's default precision on a TPU does.
    leaf: what `prepare` returned.
    dtype: of the result.
    block: tokens and columns of a block; None takes `blocks`.

  Returns:
    The product, accumulated in float32.
  """
  flat = x.reshape(-1, leaf.rows)
  block = block or blocks(flat.shape[0], leaf)
  y: jax.Array = _product(jnp.dtype(dtype).name, block, flat, leaf)  # pyright: ignore
  return y.reshape(*x.shape[:-1], leaf.cols)


def blocks(tokens: int, leaf: prepared.PreparedSparse) -> tuple[int, int]:
  """Choose the block of the grid: narrow where many words would leave the registers.

  Args:
    tokens: rows of the activations.
    leaf: the matrix, arrays or their shapes.

  Returns:
    (tokens, columns) of a block.
  """
  cols = leaf.values.shape[-1]
  column = leaf.step * leaf.n * UNIT * leaf.values.dtype.itemsize
  narrow = tokens > 64 and not leaf.bits and not devices.find(leaf.target).converts
  most = min(WIDTH // 4 if narrow else WIDTH, VALUES // column, cols // 4)
  return min(tokens, TOKENS), max(UNIT, most // UNIT * UNIT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
  dtype: str, block: tuple[int, int], x: jax.Array, leaf: prepared.PreparedSparse
) -> jax.Array:
  return _call(x.astype(jnp.bfloat16), leaf, jnp.dtype(dtype), block)


def _forward(
  dtype: str, block: tuple[int, int], x: jax.Array, leaf: prepared.PreparedSparse
) -> tuple[jax.Array, Any]:
  return _product(dtype, block, x, leaf), (x, leaf)


def _backward(dtype: str, block: tuple[int, int], kept: Any, g: jax.Array) -> tuple[Any, Any]:
  del dtype, block
  x, leaf = kept
  plain = lambda x, leaf: sliced.matmul(x, leaf.restore())
  return jax.vjp(plain, x, leaf)[1](g.astype(jnp.float32))


_product.defvjp(_forward, _backward)


def _call(
  x: jax.Array, leaf: prepared.PreparedSparse, dtype: Any, block: tuple[int, int]
) -> jax.Array:
  tokens, cols, lanes = x.shape[0], leaf.values.shape[-1], leaf.m * UNIT
  steps = leaf.tiles // leaf.step
  x = jnp.pad(x, [(0, 0), (0, leaf.tiles * lanes - leaf.rows)])
  x = jnp.swapaxes(x.reshape(tokens, leaf.tiles, UNIT, leaf.m), 2, 3).reshape(tokens, -1)
  value_rows, mark_rows = (a.shape[0] // steps for a in (leaf.values, leaf.marks))
  rows_of_block, width = block
  parts, scale_specs, per_group = [], [], 0
  if leaf.scales is not None:
    one = leaf.group_size >= leaf.rows // leaf.m * leaf.n
    per_group = 0 if one else leaf.group_size // (leaf.n * UNIT)  # tiles of a group
    parts = [leaf.scales]
    scale_specs = [pl.BlockSpec((leaf.scales.shape[0], width), lambda m, n, k: (0, n))]
  kernel = functools.partial(
    _kernel, n=leaf.n, m=leaf.m, tiles=leaf.step, steps=steps, per_group=per_group,
    scaled=bool(parts),
  )  # fmt: skip
  y = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(tokens, rows_of_block), pl.cdiv(cols, width), steps),
    in_specs=[
      pl.BlockSpec((rows_of_block, leaf.step * lanes), lambda m, n, k: (m, k)),
      pl.BlockSpec((value_rows, width), lambda m, n, k: (k, n)),
      pl.BlockSpec((mark_rows, width), lambda m, n, k: (k, n)),
      *scale_specs,
    ],
    out_specs=pl.BlockSpec((rows_of_block, width), lambda m, n, k: (m, n)),
    out_shape=chunks.like((tokens, cols), dtype, x, leaf),
    scratch_shapes=[pltpu.VMEM((rows_of_block, width), jnp.float32)] if steps > 1 else [],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    name=f"sparse_matmul_{leaf.n}_{leaf.m}",
  )(x, leaf.values, leaf.marks, *parts)
  return y[:, : leaf.cols]


def _kernel(
  x_ref: Any,
  values_ref: Any,
  marks_ref: Any,
  *refs: Any,
  n: int,
  m: int,
  tiles: int,
  steps: int,
  per_group: int,
  scaled: bool,
) -> None:
  refs_left = list(refs)
  scales_ref = refs_left.pop(0) if scaled else None
  out_ref, *scratch = refs_left
  k = pl.program_id(2)
  total = part = None
  for tile in range(tiles):
    w = jnp.concatenate(_expand(values_ref, marks_ref, tile, n, m))
    x = x_ref[:, tile * w.shape[0] : (tile + 1) * w.shape[0]]
    y = jnp.dot(x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    part = y if part is None else part + y
    if per_group and scales_ref is not None:
      group = (k * tiles + tile) // per_group
      group = jnp.minimum(group, scales_ref.shape[0] - 1)  # of tiles that fill up
      part = part * scales_ref[pl.ds(group, 1), :]
      total, part = (part if total is None else total + part), None
  if part is not None:
    total = part if scales_ref is None else part * scales_ref[...]
  assert total is not None
  if steps == 1:
    out_ref[...] = total.astype(out_ref.dtype)
    return
  (total_ref,) = scratch

  @pl.when(k == 0)
  def _() -> None:
    total_ref[...] = total

  @pl.when(k > 0)
  def _() -> None:
    total_ref[...] += total

  @pl.when(k == steps - 1)
  def _() -> None:
    out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _expand(values_ref: Any, marks_ref: Any, tile: int, n: int, m: int) -> list[jax.Array]:
  """Spread the values of a tile over its lanes, in their dtype."""
  dtype = values_ref.dtype
  width = 8 * dtype.itemsize
  ones = 0x01010101 if width == 8 else 0x00010001
  count, free = n * (m - n), m - n
  entry, field = divmod(tile, width // count)
  marks = pltpu.bitcast(marks_ref[entry * UNIT : (entry + 1) * UNIT, :], jnp.int32)
  lanes: list[Any] = [None] * m

  def put(lane: int, word: jax.Array) -> None:
    lanes[lane] = word if lanes[lane] is None else lanes[lane] | word

  for j in range(n):
    first = (tile * n + j) * UNIT
    left = pltpu.bitcast(values_ref[first : first + UNIT, :], jnp.int32)
    for i in range(free):
      shift = field * count + j * free + i
      bit = lax.shift_right_logical(marks, jnp.int32(shift)) if shift else marks
      bit = bit & jnp.int32(ones)
      word = left & ((bit << width) - bit)
      put(j + i, word)
      left = left ^ word
    put(j + free, left)
  return [pltpu.bitcast(word, dtype) for word in lanes]
