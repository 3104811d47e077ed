# SPDX-License-Identifier: Apache-2.0
r"""Products with prepared quantized matrices on a TPU: decoded in registers, never in memory.

One step of the grid takes a block of columns and some dozens of units of 128 rows. A unit of
integers becomes bfloat16 `base + code` in a handful of vector instructions and goes to the matrix
unit. What scale and zero point do to it depends on the number of tokens:

* few, or a chip that computes no bfloat16 (post): each group's partial product is corrected and
  scaled, `y += s (x_g @ (base + u) - (base + z) sum(x_g))`. Exact but for the sums' order: the
  operands are the bfloat16 activations and integers, and the sum is over the same activations.
* many (pre): the weights are made whole first, `w = (u - z) s` in bfloat16, and two units go into
  one product, which a matrix unit of 256 rows needs. Scale and weight are rounded to bfloat16.

Words of `gs32` hold a code in any place of the half-word. A bfloat16 has seven mantissa bits, so
codes of b bits may stay at places 0 to 7 - b: at place p, or-ing the exponent of 2^(7 - p) in gives
`2^(7 - p) + code`. Units that differ by less than that share one shift.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import prepared, reference

UNIT = prepared.UNIT
TOKENS = 256  # of a block
PRE = 96  # from so many tokens on weights are scaled, where the chip computes with bfloat16
VMEM = 60 << 20
_MANTISSA = 7


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
  if not isinstance(leaf, prepared.PreparedTensor):
    return f"it takes what kernels.prepare made for a TPU, not {type(leaf).__name__}"
  if x.dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float32")):
    return f"it takes activations in bfloat16 or float32, not {x.dtype.name}"
  if x.size == 0:
    return f"it takes at least one token, not x of shape {x.shape}"
  return ""


def matmul(
  x: Float[Array, "*batch rows"],
  leaf: prepared.PreparedTensor,
  *,
  dtype: Any = jnp.float32,
  block: tuple[int, int] | None = None,
) -> Float[Array, "*batch cols"]:
  """Multiply by a prepared leaf. The gradient reaches `x`, scales and zero points.

  Args:
    x: activations; rounded to bfloat16, as XLA's default precision on a TPU does.
    leaf: what `prepare` returned.
    dtype: of the result.
    block: tokens and columns of a block; None takes `blocks`.

  Returns:
    The product, accumulated in float32.
  """
  flat = x.reshape(-1, leaf.rows)
  block = block or blocks(flat.shape[0], leaf.cols)
  y: jax.Array = _product(jnp.dtype(dtype).name, block, flat, leaf)  # pyright: ignore
  return y.reshape(*x.shape[:-1], leaf.cols)


def blocks(tokens: int, cols: int) -> tuple[int, int]:
  """Choose the block of the grid: long transfers, yet a first one that is a small part.

  Args:
    tokens: rows of the activations.
    cols: of the matrix.

  Returns:
    (tokens, columns) of a block.

  Example:
    >>> blocks(16, 4096), blocks(300, 4096), blocks(1, 14336)
    ((16, 1024), (256, 512), (1, 2048))
  """
  most = 512 if tokens > 64 else 1024 if cols < 8192 else 2048
  width = max(UNIT, min(most, cols // 4 // UNIT * UNIT))
  return min(tokens, TOKENS), cols if cols <= UNIT else width


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
  dtype: str, block: tuple[int, int], x: jax.Array, leaf: prepared.PreparedTensor
) -> jax.Array:
  return _call(x.astype(jnp.bfloat16), leaf, jnp.dtype(dtype), block)


def _forward(
  dtype: str, block: tuple[int, int], x: jax.Array, leaf: prepared.PreparedTensor
) -> tuple[jax.Array, Any]:
  return _product(dtype, block, x, leaf), (x, leaf)


def _backward(dtype: str, block: tuple[int, int], kept: Any, g: jax.Array) -> tuple[Any, Any]:
  del dtype, block
  x, leaf = kept
  pull = jax.vjp(reference.matmul, x, leaf)[1]
  return pull(g.astype(jnp.float32))


_product.defvjp(_forward, _backward)


def _call(
  x: jax.Array, leaf: prepared.PreparedTensor, dtype: Any, block: tuple[int, int]
) -> jax.Array:
  tokens, cols = x.shape[0], leaf.cols
  rows_of_block, width = block
  steps = leaf.steps
  units = leaf.step if steps > 1 else -(-leaf.rows // UNIT)
  padded = steps * units * UNIT
  x = jnp.pad(x, [(0, 0), (0, padded - leaf.rows)]) if padded > leaf.rows else x
  one_group = leaf.group_size >= leaf.rows
  scale_block = (None, leaf.scales.shape[-2], width)
  scale_at = (lambda m, n, k: (0, 0, n)) if one_group else (lambda m, n, k: (k, 0, n))
  code_rows = leaf.codes.shape[0] // steps
  parts = [leaf.scales] if leaf.zeros is None else [leaf.scales, leaf.zeros]
  device = devices.find(leaf.target)
  kernel = functools.partial(
    _kernel,
    units=units,
    width=leaf.width,
    layout=leaf.layout,
    size=units * UNIT if one_group else leaf.group_size,
    zero=leaf.zero,
    factor=leaf.factor,
    pre=device.converts and rows_of_block >= PRE,
    steps=steps,
    has_zeros=leaf.zeros is not None,
  )
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(tokens, rows_of_block), pl.cdiv(cols, width), steps),
    in_specs=[
      pl.BlockSpec((rows_of_block, units * UNIT), lambda m, n, k: (m, k)),
      pl.BlockSpec((code_rows, width), lambda m, n, k: (k, n)),
      *(pl.BlockSpec(scale_block, scale_at) for _ in parts),
    ],
    out_specs=pl.BlockSpec((rows_of_block, width), lambda m, n, k: (m, n)),
    out_shape=jax.ShapeDtypeStruct((tokens, cols), dtype),
    scratch_shapes=[pltpu.VMEM((rows_of_block, width), jnp.float32)] if steps > 1 else [],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    name=f"matmul_{leaf.format}{leaf.bits}",
  )(x, leaf.codes, *parts)


def _kernel(
  x_ref: Any,
  codes_ref: Any,
  scales_ref: Any,
  *refs: Any,
  units: int,
  width: int,
  layout: str,
  size: int,
  zero: float,
  factor: float,
  pre: bool,
  steps: int,
  has_zeros: bool,
) -> None:
  """Multiply one block. `size` is the rows of a group."""
  refs_left = list(refs)
  zeros_ref = refs_left.pop(0) if has_zeros else None
  out_ref, *scratch = refs_left
  scales = scales_ref[...].astype(jnp.float32)
  zeros = None if zeros_ref is None else zeros_ref[...].astype(jnp.float32)
  decode = _words(codes_ref, width) if layout == "gs32" else _native(codes_ref, width)
  if pre:
    y = _pre(x_ref, decode, scales, zeros, units, size, zero)
  else:
    y = _post(x_ref, decode, scales, zeros, units, size, zero)
  if steps == 1:
    out_ref[...] = (y * factor if factor != 1 else y).astype(out_ref.dtype)
    return
  (total_ref,) = scratch
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _() -> None:
    total_ref[...] = y

  @pl.when(k > 0)
  def _() -> None:
    total_ref[...] += y

  @pl.when(k == steps - 1)
  def _() -> None:
    total = total_ref[...]
    out_ref[...] = (total * factor if factor != 1 else total).astype(out_ref.dtype)


def _post(
  x_ref: Any, decode: Any, scales: Any, zeros: Any, units: int, size: int, zero: float
) -> jax.Array:
  """Scale partial products of groups."""
  depth = min(size, UNIT)
  total = part = None
  for unit in range(units):
    w, base = decode(unit)
    x_unit = x_ref[:, unit * UNIT : (unit + 1) * UNIT]
    for first in range(0, UNIT, depth):
      group = (unit * UNIT + first) // size
      x = x_unit[:, first : first + depth]
      y = jnp.dot(x, w[first : first + depth], preferred_element_type=jnp.float32)
      shift = base + (zero if zeros is None else zeros[group : group + 1, :])
      if zeros is not None or shift:
        y = y - x.astype(jnp.float32).sum(axis=1, keepdims=True) * shift
      part = y if part is None else part + y
      ends = (unit * UNIT + first + depth) % size == 0 or unit == units - 1 and size > UNIT
      if ends:
        part = part * scales[group : group + 1, :]
        total = part if total is None else total + part
        part = None
  assert total is not None
  return total


def _pre(
  x_ref: Any, decode: Any, scales: Any, zeros: Any, units: int, size: int, zero: float
) -> jax.Array:
  """Scale weights; two units a product."""

  def spread(rows: jax.Array, unit: int) -> jax.Array:
    """Take the unit's groups and repeat them to its rows, in bfloat16."""
    if size >= UNIT:
      group = unit * UNIT // size
      return rows[group : group + 1, :].astype(jnp.bfloat16)
    count = UNIT // size
    few = rows[unit * count : (unit + 1) * count, :].astype(jnp.bfloat16)
    return jnp.concatenate(
      [jnp.broadcast_to(few[i : i + 1, :], (size, few.shape[1])) for i in range(count)]
    )

  total = None
  for first in range(0, units, 2):
    made = []
    for unit in range(first, min(first + 2, units)):
      w, base = decode(unit)
      if zeros is None:
        shift = base + zero
        if shift != math.floor(shift):  # of signs: exact in two steps only
          w, shift = w - jnp.bfloat16(base), zero
        w = w - jnp.bfloat16(shift) if shift else w
      else:
        w = (w - jnp.bfloat16(base) if base else w) - spread(zeros, unit)
      made.append(w * spread(scales, unit))
    w = jnp.concatenate(made) if len(made) > 1 else made[0]
    x = x_ref[:, first * UNIT : first * UNIT + w.shape[0]]
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    total = y if total is None else total + y
  assert total is not None
  return total


def _native(ref: Any, width: int) -> Any:
  """Convert signed codes: base + code with base = -2^(width - 1)."""

  def decode(unit: int) -> tuple[jax.Array, float]:
    return ref[unit * UNIT : (unit + 1) * UNIT, :].astype(jnp.bfloat16), -(2.0 ** (width - 1))

  return decode


def _words(ref: Any, width: int) -> Any:
  """Take codes out of gs32 words."""
  fields = 16 // width
  apart = ((_MANTISSA - width) // width + 1) * width  # shifts are multiples of this
  shifted: dict[tuple[int, int], jax.Array] = {}

  def decode(unit: int) -> tuple[jax.Array, float]:
    tile, field = divmod(unit, fields)
    shift = width * field // apart * apart
    place = width * field - shift
    if (tile, shift) not in shifted:
      word = ref[tile * (UNIT // 2) : (tile + 1) * (UNIT // 2), :]
      shifted[tile, shift] = lax.shift_right_logical(word, jnp.int32(shift)) if shift else word
    exponent = (127 + _MANTISSA - place) << _MANTISSA
    pair = shifted[tile, shift] & _both((2**width - 1) << place) | _both(exponent)
    return pltpu.bitcast(pair, jnp.bfloat16), 2.0 ** (_MANTISSA - place)

  return decode


def _both(half: int) -> jax.Array:
  """Put a positive half-word into both halves of an int32."""
  return jnp.int32(half << 16 | half)
