# SPDX-License-Identifier: Apache-2.0
"""Products with group-quantized matrices in plain XLA, without ever making the matrix dense.

XLA materialises `x @ dequantize(codes)` on every platform: for a 4096x4096 matrix 64 MiB of
temporaries and ten times the time of a dense product on a CPU. Two formulations avoid it.

`chunked` scans over runs of about 128 rows whose decoded tile stays in a cache. `grouped` is one
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
from treesurgeon.kernels.matmul import reference

ROWS = 128  # decoded tile of a chunk: 128 rows of 4096 float32 columns are 2 MiB
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
  flat = x.reshape(-1, leaf.rows).astype(jnp.float32)
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


def integers(
  x: Float[Array, "*batch rows"], leaf: leaves.ActivationQuantized
) -> Float[Array, "*batch cols"]:
  """Quantize the inputs and multiply; 8-bit integers by 8-bit integers stay integers till the end.

  Args:
    x: activations.
    leaf: a kernel with quantized inputs.

  Returns:
    The product in float32.

  Example:
    >>> leaf = leaves.ActivationQuantized(jnp.ones((2, 1)), None)
    >>> integers(jnp.array([[127.5, 0.0]]), leaf).tolist()
    [[127.0]]
  """
  scales = leaf.scales_of(x)
  units = leaf.codes_of(x, scales)
  w = leaf.weight
  exact = isinstance(w, leaves.QuantizedTensor) and w.plain and w.bits == 8 and w.zeros is None
  if exact and leaf.format == "int" and leaf.bits == 8 and w.group_size >= w.rows:
    codes = (w.integers() ^ 128).astype(jnp.uint8)  # unsigned to two's complement
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    total = jax.lax.dot_general(
      units.astype(jnp.int8), signed, contract, preferred_element_type=jnp.int32
    )
    y = total.astype(jnp.float32) * w.scales.astype(jnp.float32).reshape(
      (1,) * (x.ndim - 1) + (w.cols,)
    )
    return y * scales
  return reference.dot(units, leaves.dense(w).astype(jnp.float32)) * scales


def _by_group(x: jax.Array, leaf: leaves.QuantizedTensor) -> jax.Array:
  """Scan over chunks that hold whole groups, or lie within one."""
  step = packing.period(leaf.bits)
  size = min(leaf.group_size, leaf.rows)
  if size >= leaf.rows:  # one group: any chunk lies within it
    inner = _round_up(min(ROWS, leaf.rows), step)
  elif size > 2 * ROWS:
    inner = max(d for d in range(step, 2 * ROWS + 1, step) if size % d == 0)
  else:
    inner = size
  per_chunk = max(1, ROWS // inner) if inner == size else 1
  chunk = inner * per_chunk
  whole = leaf.rows // chunk
  scales = leaf.scales.astype(jnp.float32)
  zeros = None if leaf.zeros is None else leaf.zeros.astype(jnp.float32)

  def scales_of(first: int, count: int) -> tuple[jax.Array, jax.Array | None]:
    """Return one row of scales and zeros for each run of `inner` rows."""
    index = jnp.minimum((first + jnp.arange(count)) * inner // size, scales.shape[0] - 1)
    return scales[index], None if zeros is None else zeros[index]

  def part(x_MxK: jax.Array, stream: jax.Array, s: jax.Array, z: jax.Array | None) -> jax.Array:
    runs = s.shape[0]
    x_RxMxK = jnp.moveaxis(x_MxK.reshape(x.shape[0], runs, inner), 1, 0)
    y_RxMxN = _planes_dot(x_RxMxK, stream.reshape(runs, -1, leaf.cols), leaf.bits)
    y = (y_RxMxN * s[:, None, :]).sum(axis=0)
    return y - _offset(x_RxMxK.sum(axis=-1).T, s, z, leaf.bits)

  y = jnp.zeros((x.shape[0], leaf.cols), jnp.float32)
  per_stream = chunk * leaf.bits // 8
  if whole:
    s, z = scales_of(0, whole * per_chunk)
    xs = (
      jnp.moveaxis(x[:, : whole * chunk].reshape(-1, whole, chunk), 1, 0),
      leaf.codes[: whole * per_stream].reshape(whole, per_stream, leaf.cols),
      s.reshape(whole, per_chunk, leaf.cols),
      None if z is None else z.reshape(whole, per_chunk, leaf.cols),
    )
    y = _scan(part, y, xs)
  rest = leaf.rows - whole * chunk
  if rest:
    runs = -(-rest // inner)
    s, z = scales_of(whole * per_chunk, runs)
    x_rest = _pad(x[:, whole * chunk :], runs * inner, axis=1)
    stream = _pad(leaf.codes[whole * per_stream :], runs * inner * leaf.bits // 8, axis=0)
    y = y + part(x_rest, stream, s, z)
  return y


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
  return _scan(part, jnp.zeros((x.shape[0], leaf.cols), jnp.float32), xs)


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


def _offset(
  sums_MxG: jax.Array, scales_GxN: jax.Array, zeros: jax.Array | None, bits: int
) -> jax.Array:
  shift = 2.0 ** (bits - 1) if zeros is None else zeros.astype(jnp.float32)
  return jnp.dot(sums_MxG, scales_GxN * shift, precision="highest")


def _pad(x: jax.Array, size: int, *, axis: int) -> jax.Array:
  missing = size - x.shape[axis]
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


def _round_up(n: int, to: int) -> int:
  return -(-n // to) * to
