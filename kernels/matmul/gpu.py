# SPDX-License-Identifier: Apache-2.0
"""Products with prepared quantized matrices on a Hopper GPU: decoded in registers, never in memory.

Here are the choice of tiles, the call, and the gradient; the arithmetic is in `gpu_block.py`, which
is imported when it is first needed: Mosaic's GPU part is not loaded where there is no use for it.

Few tokens make few tiles, so several blocks share the rows of one, each with a sum of its own
that XLA adds up together with whatever comes next. A sum across blocks within the kernel would save
that pass; it would also have blocks wait for each other, which no interpreter checks yet.
"""

import functools
import importlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import arrange, layouts, prepared, reference, stacked

if TYPE_CHECKING:
  from treesurgeon.kernels.matmul import gpu_block

UNIT = layouts.GROUP
FEW = 64  # tokens up to which partial products are scaled instead of weights
SHARED = 220 << 10  # bytes of a multiprocessor's shared memory that blocks may take
START = 1.0  # microseconds until a block's first tiles have come
SUM = 2.0  # microseconds for adding up the sums of several blocks, besides their bytes
SLOTS, SLOTS_MANY = 8, 5  # steps whose copies are in flight, at most; more spill with many tokens
DECODED = 110e3  # weights a microsecond that a multiprocessor turns into bfloat16


def unsupported(x: jax.Array, leaf: Any) -> str:
  """Say why the kernel cannot multiply by a leaf.

  Args:
    x: activations.
    leaf: compressed leaf.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(jnp.ones((1, 2)), leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes what kernels.prepare made for a GPU, not LowRank'
  """
  leaf = stacked.matrix(leaf)
  if not isinstance(leaf, prepared.PreparedTensor):
    reason = f"it takes what kernels.prepare made for a GPU, not {type(leaf).__name__}"
    refused = ""
    if isinstance(leaf, leaves.QuantizedTensor):
      refused = arrange.unsupported(leaf, target=next(iter(devices.GPUS)))
    return f"{reason}, and prepare leaves this one: {refused}" if refused else reason
  if leaf.target not in devices.GPUS:
    return f"it takes what kernels.prepare made for a GPU, not for {leaf.target}"
  if jax.default_backend() == "gpu" and devices.here() != leaf.target:
    return f"it takes what kernels.prepare made for this GPU, not for {leaf.target}"
  if x.dtype.name != leaf.inputs:
    return f"it takes activations in {leaf.inputs}, not {x.dtype.name}"
  if x.size == 0:
    return f"it takes at least one token, not x of shape {x.shape}"
  return ""


def matmul(
  x: Num[Array, "*batch rows"],
  leaf: prepared.PreparedTensor | stacked.LayerOf,
  *,
  dtype: Any = jnp.float32,
  tile: "gpu_block.Tile | None" = None,
  interpreted: bool = False,
) -> Float[Array, "*batch cols"]:
  """Multiply by a prepared leaf. The gradient reaches `x`, scales and zero points.

  Args:
    x: activations in the leaf's `inputs`, bfloat16 or int8.
    leaf: what `prepare` returned, or a layer of a stack of such.
    dtype: of the result.
    tile: the work of a block of threads; None takes what `choose` says.
    interpreted: whether an interpreter runs it, which knows no layouts of registers and takes both
      operands of the tensor core from shared memory.

  Returns:
    The product, accumulated in float32.
  """
  flat = x.reshape(-1, leaf.rows)
  tile = tile or choose(flat.shape[0], stacked.matrix(leaf), dtype)
  y: jax.Array = _product(jnp.dtype(dtype).name, tile, interpreted, flat, leaf)  # pyright: ignore
  return y.reshape(*x.shape[:-1], leaf.cols)


def choose(tokens: int, leaf: prepared.PreparedTensor, dtype: Any = jnp.float32) -> Any:
  """Choose the work of a block: all multiprocessors busy, few starts, few sums.

  Args:
    tokens: rows of the activations.
    leaf: the matrix, arrays or their shapes.
    dtype: of the result.

  Returns:
    A `gpu_block.Tile`.

  Example:
    >>> w = leaves.QuantizedTensor(jnp.zeros((512, 4096), jnp.uint8), jnp.ones((8, 4096)), None,
    ...                            None, rows=1024, cols=4096, bits=4, group_size=128)
    >>> choose(16, arrange.prepare(w, target="gpu-sm90"))
    Tile(tokens=16, groups=4, depth=128, steps=1, splits=8, slots=2)
  """
  block = _block()
  device = devices.GPUS[leaf.target]
  columns, rows = leaf.codes.shape[-2:]
  group = 0 if leaf.group_size >= leaf.rows else leaf.group_size
  bits = 4 if leaf.codes.dtype == jnp.int4 else 8
  sizes = [t for t in (8, 16, 32, FEW) if t >= tokens][:1] or [128, 256]
  integers = leaf.inputs == "int8"
  if integers and group:
    sizes = sizes[:1]  # both a group's sums and the total are in registers
  best = None
  for size in sizes:
    # More warpgroups decode faster and share activations; fewer have registers for more tokens.
    groups = 4 if size <= FEW and columns % (4 * block.WARPGROUP) == 0 else 2
    width = groups * block.WARPGROUP
    half = group == UNIT // 2 or size >= FEW and not (integers and bits == 8)
    depth = UNIT // 2 if half else UNIT
    steps = rows // depth
    tiles = -(-tokens // size) * (columns // width)
    copied = (width * bits // 8 + size * jnp.dtype(leaf.inputs).itemsize) * depth + 8 * width
    flops = 2 * size * width * depth
    step_us = max(
      device.sms * width * depth * bits / 8 / device.bandwidth,
      device.sms * flops / device.peak + width * depth / DECODED / 2,  # half of it overlaps
    )
    for splits in range(1, steps + 1):
      part = steps // splits
      if steps % splits or not _whole_groups(part * depth, group):
        continue
      us = -(-tiles * splits // device.sms) * (part * step_us + START)
      if splits > 1:
        us += SUM + 8 * splits * tokens * columns / device.bandwidth
      wide = 4 if splits > 1 else jnp.dtype(dtype).itemsize
      room = SHARED - groups * min(size, FEW) * block.WARPGROUP * wide
      slots = max(2, min(SLOTS if size <= FEW else SLOTS_MANY, room // copied, part))
      if best is None or us < best[0]:
        best = us, block.Tile(size, groups, depth, part, splits, slots)
  assert best is not None
  return best[1]


def _whole_groups(rows: int, group: int) -> bool:
  """Tell whether so many rows are whole groups or lie within one."""
  return not group or rows % group == 0 or group % rows == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(dtype: str, tile: Any, interpreted: bool, x: jax.Array, leaf: Any) -> jax.Array:
  x = x.astype(stacked.matrix(leaf).inputs)
  return _call(x, leaf, jnp.dtype(dtype), tile, interpreted)


def _forward(
  dtype: str, tile: Any, interpreted: bool, x: jax.Array, leaf: Any
) -> tuple[jax.Array, Any]:
  return _product(dtype, tile, interpreted, x, leaf), (x, leaf)


def _backward(dtype: str, tile: Any, interpreted: bool, kept: Any, g: jax.Array) -> tuple[Any, Any]:
  del dtype, tile, interpreted
  # It materialises the matrix, which for the many tokens of training costs little beside products.
  return jax.vjp(reference.matmul, *kept)[1](g.astype(jnp.float32))


_product.defvjp(_forward, _backward)


def _call(x: jax.Array, leaf: Any, dtype: Any, tile: Any, interpreted: bool) -> jax.Array:
  block = _block()
  layer = leaf.index.reshape(1) if isinstance(leaf, stacked.LayerOf) else None
  leaf = stacked.matrix(leaf)
  one_group = leaf.group_size >= leaf.rows
  integers = leaf.inputs == "int8"
  tokens = x.shape[0]
  # Transfers fill up what a tile lacks, but count tokens beyond eight in eights.
  more = (-tokens % 8 if tokens > 8 else 0, leaf.codes.shape[-1] - leaf.rows)
  x = jnp.pad(x, [(0, more[0]), (0, more[1])]) if any(more) else x
  zeros = ""
  if leaf.zeros is not None:
    zeros = "integers" if jnp.issubdtype(leaf.dtypes[1], jnp.integer) else "floats"
  kind = block.Codes(
    zero=2.0 ** (leaf.width - 1) if zeros else leaf.line.zero - 2.0 ** (leaf.width - 1),
    factor=leaf.line.factor,
    group=0 if one_group else leaf.group_size,
    zeros=zeros,
    pre=tile.tokens > FEW and not one_group and not integers,
    integers=integers,
  )
  y = block.multiply(
    x,
    leaf.codes,
    leaf.scales.squeeze(-3),  # one step
    None if leaf.zeros is None else leaf.zeros.squeeze(-3),
    layer,
    tile=tile,
    kind=kind,
    sms=devices.GPUS[leaf.target].sms,
    dtype=jnp.float32 if tile.splits > 1 else dtype,
    interpreted=interpreted,
  )
  y = y.sum(axis=0) if tile.splits > 1 else y[0]
  return y[:tokens, : leaf.cols].astype(dtype)


def _block() -> Any:
  return importlib.import_module("treesurgeon.kernels.matmul.gpu_block")
