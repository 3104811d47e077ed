# SPDX-License-Identifier: Apache-2.0
"""Products with group-quantized matrices in plain XLA, without ever making the matrix dense.

XLA materialises `x @ dequantize(codes)` on every platform: for a 4096x4096 matrix 64 MiB of
temporaries and ten times the time of a dense product on a CPU. Two formulations avoid it.

`chunked` scans over runs of about 128 rows whose decoded tile stays in a cache; one token is
multiplied as the codes are decoded, without a tile. Codes up to 8 bits are exact in bfloat16, so
that activations in bfloat16 need no wider products. `grouped` is one
batched product over all groups, for accelerators with few tokens. Both read the bitstream as
strided planes (`packing.planes`), so codes are never interleaved: plane j multiplies the inputs
j, j + period, .... Both keep the codes unsigned and correct for the zero point afterwards,

  y = sum_g s_g * (x_g @ u_g)  -  sum_g (s_g * z_g) * sum(x_g),

which is exact because the sums use the same x as the products.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves, packing
from treesurgeon.kernels.matmul import chunks

# Decoded tile of a chunk: 128 rows of 1024 float32 columns are 512 KiB and stay in a core's cache.
ROWS = 128
COLUMNS = 1024
CACHED = 20 << 20  # bytes of codes; more than a last-level cache holds are best read row by row
UNROLLED = 32  # so many rows at most does one fused pass multiply by one token
TOKENS = 64  # up to so many tokens `grouped` keeps its partial products small
# From so many tokens on `chunked` is bound by its products and accumulator, not by decoding: it
# then scales larger tiles before one product each.
MANY = 128
MANY_ROWS = 1024


def unsupported_chunked(x: jax.Array, leaf: Any) -> str:
  """Say why `chunked` cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported_chunked(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes QuantizedTensor, not LowRank'
  """
  del x
  if not isinstance(leaf, leaves.QuantizedTensor):
    return f"it takes QuantizedTensor, not {type(leaf).__name__}"
  if not leaf.plain:
    return f"it takes integers in groups of rows with plain scales, not format {leaf.format!r}"
  return ""


def unsupported_grouped(x: jax.Array, leaf: Any) -> str:
  """Say why `grouped` cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported_grouped(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes QuantizedTensor, not LowRank'
  """
  reason = unsupported_chunked(x, leaf)
  if reason:
    return reason
  if leaf.group_index is not None:
    return "it takes groups of consecutive rows, not a group_index"
  if leaf.rows % leaf.group_size or leaf.group_size % packing.period(leaf.bits):
    return (
      f"it takes whole groups of a multiple of {packing.period(leaf.bits)} rows, "
      f"not {leaf.rows} rows in groups of {leaf.group_size}"
    )
  tokens = math.prod(x.shape[:-1])
  if tokens > TOKENS:
    return f"it takes up to {TOKENS} tokens, not {tokens}"
  return ""


def chunked(
  x: Float[Array, "*batch rows"], leaf: leaves.QuantizedTensor
) -> Float[Array, "*batch cols"]:
  """Multiply chunk by chunk of input rows; the decoded tile never leaves the cache.

  Differentiable in `x` and the scales; the backward pass decodes again instead of keeping tiles.

  Args:
    x: activations.
    leaf: any QuantizedTensor.

  Returns:
    The product in float32.

  Example:
    >>> leaf = leaves.QuantizedTensor(jnp.full((1, 1), 0x9A, jnp.uint8), jnp.ones((1, 1)),
    ...                               None, None, rows=2, cols=1, bits=4, group_size=2)
    >>> chunked(jnp.ones((1, 2)), leaf).tolist()
    [[3.0]]
  """
  flat = x.reshape(-1, leaf.rows)
  if x.dtype != jnp.bfloat16:
    flat = flat.astype(jnp.float32)
  size, step = leaf.group_size, packing.period(leaf.bits)
  if flat.shape[0] >= MANY:
    y = _by_row(flat, leaf, MANY_ROWS)
  elif leaf.group_index is not None or (size < leaf.rows and size % step):
    y = _by_row(flat, leaf, ROWS)
  else:
    y = _by_group(flat, leaf)
  return y.reshape(*x.shape[:-1], leaf.cols)


def grouped(
  x: Float[Array, "*batch rows"], leaf: leaves.QuantizedTensor
) -> Float[Array, "*batch cols"]:
  """Multiply all groups in one batched product, then scale and add the partial products.

  Args:
    x: activations; their dtype is that of the products, which accumulate in float32.
    leaf: QuantizedTensor with whole groups of consecutive rows.

  Returns:
    The product in float32.

  Example:
    >>> leaf = leaves.QuantizedTensor(jnp.full((1, 1), 0x9A, jnp.uint8), jnp.ones((1, 1)),
    ...                               None, None, rows=2, cols=1, bits=4, group_size=2)
    >>> grouped(jnp.ones((1, 2)), leaf).tolist()
    [[3.0]]
  """
  groups = leaf.rows // leaf.group_size
  x_GxMxK = jnp.moveaxis(x.reshape(-1, groups, leaf.group_size), 1, 0)
  stream = leaf.codes.reshape(groups, -1, leaf.cols)
  y_GxMxN = _planes_dot(x_GxMxK, stream, leaf.bits)
  scales = leaf.scales.astype(jnp.float32)
  y = (y_GxMxN * scales[:, None, :]).sum(axis=0)
  sums = x_GxMxK.astype(jnp.float32).sum(axis=-1).T
  y = y - _offset(sums, scales, leaf.zeros, leaf.bits)
  return y.reshape(*x.shape[:-1], leaf.cols)


def exact(leaf: leaves.ActivationQuantized) -> bool:
  """Tell whether a product with quantized inputs can stay in integers till the end.

  Args:
    leaf: a kernel with quantized inputs.

  Returns:
    Whether inputs and weights are 8-bit integers, with a scale a column.

  Example:
    >>> exact(leaves.ActivationQuantized(jnp.ones((2, 1)), None))
    False
  """
  w = leaf.weight
  whole = isinstance(w, leaves.QuantizedTensor) and w.plain and w.bits == 8 and w.zeros is None
  return whole and leaf.format == "int" and leaf.bits == 8 and w.group_size >= w.rows


def integers(
  x: Float[Array, "*batch rows"], w: leaves.QuantizedTensor
) -> Float[Array, "*batch cols"]:
  """Multiply 8-bit integers by 8-bit integers.

  Args:
    x: whole numbers from -128 to 127.
    w: 8-bit integers with a scale a column.

  Returns:
    The product in float32.

  Example:
    >>> w = leaves.QuantizedTensor(jnp.full((2, 1), 129, jnp.uint8), jnp.ones((1, 1)), None, None,
    ...                            rows=2, cols=1, bits=8, group_size=2)
    >>> integers(jnp.array([[127.0, -1.0]]), w).tolist()
    [[126.0]]
  """
  if math.prod(x.shape[:-1]) == 1 and jax.default_backend() == "cpu":
    # XLA multiplies by one vector of integers in 32 bits there, and widens the matrix for it.
    return chunked(x.astype(jnp.float32), w)
  codes = (w.integers() ^ 128).astype(jnp.uint8)  # unsigned to two's complement
  signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
  contract = (((x.ndim - 1,), (0,)), ((), ()))
  total = jax.lax.dot_general(
    x.astype(jnp.int8), signed, contract, preferred_element_type=jnp.int32
  )
  return total.astype(jnp.float32) * w.scales.astype(jnp.float32).reshape(
    (1,) * (x.ndim - 1) + (w.cols,)
  )


def _by_group(x: jax.Array, leaf: leaves.QuantizedTensor) -> jax.Array:
  """Loop over chunks that hold whole groups, or lie within one, for some columns at a time."""
  step = packing.period(leaf.bits)
  size = min(leaf.group_size, leaf.rows)
  unrolled = _divisor(size, UNROLLED, step) if x.shape[0] == 1 and size < leaf.rows else 0
  if 2 * unrolled > UNROLLED:
    inner = unrolled
  elif size >= leaf.rows:  # one group: any chunk lies within it
    inner = _round_up(min(ROWS, leaf.rows), step)
  elif size > 2 * ROWS:
    inner = _divisor(size, 2 * ROWS, step)
  else:
    inner = size
  per_chunk = max(1, ROWS // inner) if inner == size else 1
  chunk = inner * per_chunk
  whole = leaf.rows // chunk
  per_stream = chunk * leaf.bits // 8
  width = _divisor(leaf.cols, COLUMNS, 1)
  # Codes that straddle bytes decode slowly out of a matrix that is cut up (twice the time).
  straddle = 8 % leaf.bits and inner != unrolled
  if 4 * width < COLUMNS or leaf.codes.size > CACHED or straddle:
    width = leaf.cols
  scales = leaf.scales.astype(jnp.float32)

  def part(x_MxK: jax.Array, stream: jax.Array, s: jax.Array) -> jax.Array:
    runs = s.shape[0]
    x_RxMxK = jnp.moveaxis(x_MxK.reshape(x.shape[0], runs, inner), 1, 0)
    dot = _unrolled_dot if inner == unrolled else _planes_dot
    y_RxMxN = dot(x_RxMxK, stream.reshape(runs, -1, s.shape[1]), leaf.bits)
    return (y_RxMxN * s[:, None, :]).sum(axis=0)

  def columns(first: jax.Array) -> jax.Array:
    """Multiply by `width` columns, which are cut out chunk by chunk."""

    def at(x_MxK: jax.Array, i: jax.Array) -> jax.Array:
      cut = jax.lax.dynamic_slice
      stream = cut(leaf.codes, (i * per_stream, first), (per_stream, width))
      s = cut(scales, (i * chunk // size, first), (per_chunk, width))
      # Without the barrier the cut is repeated in whatever reads it, more slowly.
      return part(x_MxK, jax.lax.optimization_barrier(stream), s)

    xs = (x_WxMxK, jnp.arange(whole))
    return _scan(at, chunks.zeros((x.shape[0], width), x, leaf), xs)

  y = chunks.zeros((x.shape[0], leaf.cols), x, leaf)
  x_WxMxK = jnp.moveaxis(x[:, : whole * chunk].reshape(x.shape[0], whole, chunk), 1, 0)
  if whole and width < leaf.cols:
    y_BxMxN = jax.lax.map(columns, jnp.arange(0, leaf.cols, width))
    y = jnp.moveaxis(y_BxMxN, 0, 1).reshape(y.shape)
  elif whole:
    stream = leaf.codes[: whole * per_stream].reshape(whole, per_stream, leaf.cols)
    groups = jnp.arange(whole * per_chunk) * inner // size
    s_WxRxN = scales[groups].reshape(whole, per_chunk, leaf.cols)
    y = (chunks.add_up if straddle else _scan)(part, y, (x_WxMxK, stream, s_WxRxN))
  rest = leaf.rows - whole * chunk
  if rest:
    runs = -(-rest // inner)
    x_rest = _pad(x[:, whole * chunk :], runs * inner, axis=1)
    stream = _pad(leaf.codes[whole * per_stream :], runs * inner * leaf.bits // 8, axis=0)
    groups = (whole * per_chunk + jnp.arange(runs)) * inner // size
    y = y + part(x_rest, stream, scales[groups])
  groups = scales.shape[0]
  sums = _pad(x, groups * size, axis=1).reshape(-1, groups, size).sum(-1, dtype=jnp.float32)
  return y - _offset(sums, scales, leaf.zeros, leaf.bits)


def _by_row(x: jax.Array, leaf: leaves.QuantizedTensor, tile: int) -> jax.Array:
  """Scan over chunks of rows whose groups are arbitrary: each row looks its scale up."""
  if leaf.group_index is None:
    index = jnp.arange(leaf.rows) // leaf.group_size
  else:
    index = leaf.group_index[0]
  step = packing.period(leaf.bits)
  chunk = _round_up(min(tile, leaf.rows), step)
  count = -(-leaf.rows // chunk)
  scales = leaf.scales.astype(jnp.float32)
  half = 2.0 ** (leaf.bits - 1)

  def part(x_MxK: jax.Array, stream: jax.Array, rows: jax.Array) -> jax.Array:
    codes = packing.unpack(stream, bits=leaf.bits, rows=chunk).astype(jnp.float32)
    zeros = half if leaf.zeros is None else leaf.zeros[rows].astype(jnp.float32)
    return jnp.dot(x_MxK, (codes - zeros) * scales[rows])

  xs = (
    jnp.moveaxis(_pad(x, count * chunk, axis=1).reshape(-1, count, chunk), 1, 0),
    _pad(leaf.codes, count * chunk * leaf.bits // 8, axis=0).reshape(count, -1, leaf.cols),
    _pad(index, count * chunk, axis=0).reshape(count, chunk),
  )
  return _scan(part, chunks.zeros((x.shape[0], leaf.cols), x, leaf), xs)


def _scan(part: Any, y: jax.Array, xs: tuple) -> jax.Array:
  """Add up `part` over chunks; the checkpoint keeps decoded tiles out of the residuals."""
  remade = jax.checkpoint(part, prevent_cse=False)
  if xs[0].shape[0] == 1:
    return y + remade(*jax.tree.map(lambda a: a[0], xs))
  return jax.lax.scan(lambda acc, chunk: (acc + remade(*chunk), None), y, xs)[0]


def _planes_dot(x_GxMxK: jax.Array, stream_GxBxN: jax.Array, bits: int) -> jax.Array:
  """Multiply each group's inputs by its unsigned codes, in float32."""
  step = packing.period(bits)
  total = jnp.zeros((), jnp.float32)
  for j, plane in enumerate(packing.planes(stream_GxBxN, bits=bits)):
    contract = (((2,), (1,)), ((0,), (0,)))
    total = total + jax.lax.dot_general(
      x_GxMxK[:, :, j::step], plane.astype(x_GxMxK.dtype), contract,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
  return total


def _unrolled_dot(x_GxMxK: jax.Array, stream_GxBxN: jax.Array, bits: int) -> jax.Array:
  """Do the same in one fused pass over the columns: nothing decoded is written to memory."""
  step = packing.period(bits)
  total = jnp.zeros((), jnp.float32)
  for j, plane in enumerate(packing.planes(stream_GxBxN, bits=bits)):
    for k in range(plane.shape[1]):
      codes = plane[:, k : k + 1].astype(jnp.float32)
      total = total + x_GxMxK[:, :, j + k * step, None] * codes
  return total


def _offset(
  sums_MxG: jax.Array, scales_GxN: jax.Array, zeros: jax.Array | None, bits: int
) -> jax.Array:
  shift = 2.0 ** (bits - 1) if zeros is None else zeros.astype(jnp.float32)
  return jnp.dot(sums_MxG, scales_GxN * shift, precision="highest")


def _pad(x: jax.Array, size: int, *, axis: int) -> jax.Array:
  missing = size - x.shape[axis]
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


def _divisor(n: int, largest: int, step: int) -> int:
  """Find the largest multiple of `step` up to `largest` that divides n, or 0."""
  return max((d for d in range(step, largest + 1, step) if n % d == 0), default=0)


def _round_up(n: int, to: int) -> int:
  return -(-n // to) * to
