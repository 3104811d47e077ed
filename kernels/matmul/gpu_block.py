# SPDX-License-Identifier: Apache-2.0
r"""One tile of a product with a prepared matrix on a Hopper GPU: what `gpu.py` runs in each block.

One warpgroup of a block of threads copies tiles of codes, activations and scales into shared
memory, several steps ahead; each of the others turns 64 columns' codes into bfloat16 in registers
and multiplies them by the activations, `y^T = w^T @ x^T`, because the tensor core takes its left
operand, and only that, from registers. What scale and zero point do depends on the shape:

* one group of all rows: `y^T = s ((c - z) @ x^T)`, scaled once at the end.
* few tokens (post): each step's product is scaled and added up in float32. Exact but for the sums'
  order: the operands are the bfloat16 activations and integers.
* many (pre): the weights are made whole first, `w = (c - z) s`, and the tensor core adds up. Scale
  and weight are rounded to bfloat16.

Codes less an integer zero point are exact in bfloat16; less a fraction they are rounded to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 64  # columns of one
# Registers of the warpgroup that copies and of each of the others, by their number: they hand over
# what they start with, and would wait forever for more. Five start with 96 each and keep them.
_REGISTERS = {2: (72, 216)}


class Tile(NamedTuple):
  """The work of one block of threads.

  Attributes:
    tokens: of the tile.
    groups: warpgroups that multiply, each 64 columns.
    depth: rows of a step.
    steps: steps that a block adds up.
    splits: blocks that share the rows of a tile; each writes a sum of its own.
    slots: steps whose copies are in flight.
  """

  tokens: int
  groups: int
  depth: int
  steps: int
  splits: int
  slots: int


class Codes(NamedTuple):
  """What codes stand for: `(code - zero) * factor * scale`.

  Attributes:
    zero: where there are no zero points, and what is taken off those there are.
    factor: of the values.
    group: rows of a group; 0 is one of all rows.
    zeros: "", or "integers" or "floats" where there are zero points.
    pre: whether weights are scaled.
    integers: whether activations are int8 and products are integers.
  """

  zero: float
  factor: float
  group: int
  zeros: str
  pre: bool
  integers: bool


def multiply(
  x: jax.Array,
  codes: jax.Array,
  scales: jax.Array,
  zeros: jax.Array | None,
  layer: jax.Array | None = None,
  *,
  tile: Tile,
  kind: Codes,
  sms: int,
  dtype: Any,
  interpreted: bool = False,
) -> jax.Array:
  """Multiply by prepared codes.

  Args:
    x: activations, bfloat16 or int8, (tokens, rows).
    codes: int4 or int8, (columns, rows), both multiples of 128.
    scales: (groups, columns).
    zeros: as scales, or None.
    layer: which matrix where the three have a leading axis of several, int32 of shape (1,).
    tile: the work of a block.
    kind: what codes stand for.
    sms: multiprocessors of the device.
    dtype: of the result.
    interpreted: whether an interpreter runs it, which knows no layouts of registers and takes both
      operands of the tensor core from shared memory.

  Returns:
    Sums, (splits, tokens, columns).
  """
  tokens, columns = x.shape[0], codes.shape[-2]
  width = tile.groups * WARPGROUP
  tiles = (pl.cdiv(tokens, tile.tokens), columns // width, tile.splits)
  blocks = tiles[0] * tiles[1] * tiles[2]
  chunk = min(tile.tokens, WARPGROUP)
  inputs = jnp.dtype(jnp.int8 if kind.integers else jnp.bfloat16)
  total_type = plgpu.ACC((WARPGROUP, tile.tokens), jnp.int32 if kind.integers else jnp.float32)
  operands = [a for a in (x, codes, scales, zeros, layer) if a is not None]
  lines = operands[2 : 4 if kind.zeros else 3]

  def kernel(*refs: Any, slots: list[Any], ready: Any, free: Any, y_smem: Any, **more: Any) -> None:
    x_gmem, *matrix, y_gmem = refs
    if layer is not None:
      index = matrix.pop()[0]
      matrix = [ref.at[index] for ref in matrix]
    codes_gmem, *lines_gmem = matrix
    x_smem, codes_smem, *lines_smem = slots
    me = lax.axis_index("warpgroup")
    mine = pl.ds(me * WARPGROUP, WARPGROUP)

    def over_tiles(body: Any) -> None:
      @plgpu.nd_loop((blocks,), collective_axes="block")
      def _tile(info: Any) -> None:
        body(info.local_index * tile.steps, *_unravel(info.index[0], tiles))

    @pl.when(me == tile.groups)
    def _copy() -> None:
      if tile.groups in _REGISTERS:
        plgpu.set_max_registers(_REGISTERS[tile.groups][0], action="decrease")

      def copies(before: Any, m: Any, n: Any, part: Any) -> None:
        columns_at = pl.ds(n * width, width)

        def step(k: Any, _: None) -> None:
          slot = lax.rem(before + k, jnp.int32(tile.slots))
          first = (part * tile.steps + k) * tile.depth
          row = lax.div(first, jnp.int32(kind.group)) if kind.group else 0
          rows = pl.ds(first, tile.depth)
          sources = [
            x_gmem.at[pl.ds(m * tile.tokens, tile.tokens), rows],
            codes_gmem.at[columns_at, rows],
            *(line.at[row, columns_at] for line in lines_gmem),
          ]

          @pl.when(before + k >= tile.slots)
          def _wait() -> None:
            plgpu.barrier_wait(free.at[slot])

          for source, target in zip(sources, slots, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        lax.fori_loop(0, tile.steps, step, None)

      over_tiles(copies)

    @pl.when(me < tile.groups)
    def _multiply() -> None:
      if tile.groups in _REGISTERS:
        plgpu.set_max_registers(_REGISTERS[tile.groups][1], action="increase")

      def weights(slot: Any, scale: Any) -> Any:
        w = codes_smem.at[slot, mine]
        if w.dtype == inputs:  # int8 is multiplied from where it lies
          return w
        zero = _zero(lines_smem[1].at[slot, mine], kind) if kind.zeros else None
        w = _weights(_load(w, interpreted or kind.integers), zero, scale, kind, inputs)
        if not interpreted:
          return w
        more["staging"].at[me][...] = w
        plgpu.commit_smem()
        return more["staging"].at[me]

      def products(before: Any, m: Any, n: Any, part: Any) -> None:
        def steps(body: Any, carry: Any) -> Any:
          def step(k: Any, carry: Any) -> Any:
            slot = lax.rem(before + k, jnp.int32(tile.slots))
            plgpu.barrier_wait(ready.at[slot])
            carry = body(slot, _scale(lines_smem[0].at[slot, mine], kind), carry)
            plgpu.barrier_arrive(free.at[slot])
            return carry

          return lax.fori_loop(0, tile.steps, step, carry)

        def store(y: jax.Array, scale: Any = None) -> None:
          for first in range(0, tile.tokens, chunk):
            out = y[:, first : first + chunk]
            if scale is not None:
              out = out.astype(jnp.float32) * lax.broadcast_in_dim(scale, out.shape, [0])
            out = out.astype(dtype)
            if not interpreted:
              out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_smem.at[me].T[...] = out
            plgpu.commit_smem()
            tokens_at = pl.ds(m * tile.tokens + first, chunk)
            columns_at = pl.ds(n * width + me * WARPGROUP, WARPGROUP)
            plgpu.copy_smem_to_gmem(y_smem.at[me], y_gmem.at[part, tokens_at, columns_at])

        def add_up(total: Any) -> None:
          def body(slot: Any, scale: Any, last: Any) -> Any:
            del last
            plgpu.wgmma(total, weights(slot, scale if kind.pre else None), x_smem.at[slot].T)
            plgpu.wgmma_wait(0)
            return scale

          scale = steps(body, jnp.zeros(WARPGROUP, jnp.float32))
          store(total[...], None if kind.pre else scale)

        def scale_parts(slot: Any, scale: Any, total: jax.Array) -> jax.Array:
          def alone(part: Any) -> jax.Array:
            plgpu.wgmma(part, weights(slot, None), x_smem.at[slot].T)
            return part[...]

          y = pl.run_scoped(alone, total_type).astype(jnp.float32)
          return total + y * lax.broadcast_in_dim(scale, y.shape, [0])

        if kind.pre or not kind.group:
          pl.run_scoped(add_up, total_type)
        else:
          store(steps(scale_parts, jnp.zeros((WARPGROUP, tile.tokens), jnp.float32)))

      over_tiles(products)
      plgpu.wait_smem_to_gmem(0)

  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((tile.splits, tokens, columns), dtype),
    scratch_types={
      "slots": [
        _shared((tile.slots, tile.tokens, tile.depth), inputs),
        _shared((tile.slots, width, tile.depth), codes.dtype),
        *(plgpu.SMEM((tile.slots, width), line.dtype) for line in lines),
      ],
      "ready": plgpu.Barrier(num_arrivals=2 + len(lines), num_barriers=tile.slots),
      "free": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.slots),
      "y_smem": _shared((tile.groups, chunk, WARPGROUP), dtype),
      **({"staging": _shared((tile.groups, WARPGROUP, tile.depth), inputs)} if interpreted else {}),
    },
    grid=(min(blocks, sms),),
    grid_names=("block",),
    num_threads=tile.groups + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )
  return call(*operands)


def _scale(line: Any, kind: Codes) -> jax.Array:
  """Load the scales of 64 columns."""
  scale = line[...].astype(jnp.float32)
  return scale if kind.factor == 1 else scale * kind.factor


def _zero(line: Any, kind: Codes) -> jax.Array:
  """Load the zero points of 64 columns, less what signed codes are less."""
  return line[...].astype(jnp.float32) - kind.zero


def _load(codes: Any, plainly: bool) -> jax.Array:
  """Load codes by whole words, which threads then exchange, instead of byte by byte."""
  if plainly:
    return codes[...]
  four = codes.dtype == jnp.int4
  words = plgpu.Layout.WGMMA_UPCAST_4X if four else plgpu.Layout.WGMMA_UPCAST_2X
  return plgpu.layout_cast(plgpu.layout_cast(codes[...], words), plgpu.Layout.WGMMA)


def _weights(codes: jax.Array, zero: Any, scale: Any, kind: Codes, dtype: Any) -> jax.Array:
  """Widen signed codes, take their zero point off, multiply by their scale."""
  w = codes.astype(dtype)
  along = lambda row: lax.broadcast_in_dim(row, w.shape, [0])
  if kind.zeros == "integers":
    w = w - along(zero.astype(w.dtype))
  elif kind.zeros:
    w = (w.astype(jnp.float32) - along(zero)).astype(w.dtype)
  elif kind.zero:
    w = w - jnp.asarray(kind.zero, w.dtype)
  return w if scale is None else w * along(scale.astype(w.dtype))


def _unravel(index: Any, tiles: tuple[int, int, int]) -> tuple[Any, Any, Any]:
  """Find (tokens, columns, part) of a tile: neighbours share activations."""
  part = lax.rem(index, jnp.int32(tiles[2]))
  index = lax.div(index, jnp.int32(tiles[2]))
  return lax.div(index, jnp.int32(tiles[1])), lax.rem(index, jnp.int32(tiles[1])), part


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
  bits = 4 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize * 8
  return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1], bits))


def _transforms(width: int, bits: int) -> tuple[Any, ...]:
  """Swizzle rows as wide as the tensor core takes them."""
  swizzle = min(128, width * bits // 8)
  return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
