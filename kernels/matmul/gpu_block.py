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
_MEMORY_REGISTERS = 72  # of the warpgroup that only copies: with twice 216, what three start with


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
    bits: of a code in memory, 4 or 8.
    zero: where there are no zero points, and what is taken off those there are.
    factor: of the values.
    group: rows of a group; 0 is one of all rows.
    zeros: "", or "integers" or "floats" where there are zero points.
    pre: whether weights are scaled.
    integers: whether activations are int8 and products are integers.
  """

  bits: int
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
  grouped = kind.group > 0
  per_block = max(1, tile.steps * tile.depth // kind.group) if grouped else 1
  chunk = min(tile.tokens, WARPGROUP)
  inputs = jnp.int8 if kind.integers else jnp.bfloat16
  total_type = plgpu.ACC((WARPGROUP, tile.tokens), jnp.int32 if kind.integers else jnp.float32)

  specs = [
    _spec((tile.tokens, tile.depth), 8 if kind.integers else 16, lambda k: (0, k)),
    _spec((width, tile.depth), kind.bits, lambda k: (0, k)),
  ]
  if grouped:
    row = plgpu.BlockSpec((1, width), lambda k: (k * tile.depth // kind.group, 0))
    specs += [row] * (2 if kind.zeros else 1)

  operands = [a for a in (x, codes, scales, zeros, layer) if a is not None]

  def kernel(
    *refs: Any, y_smem: Any, staging: Any = None, lines: Any = (), arrived: Any = None
  ) -> None:
    x_gmem, *matrix, y_gmem = refs
    if layer is not None:
      index = matrix.pop()[0]
      matrix = [ref.at[index] for ref in matrix]
    codes_gmem, *per_group = matrix
    me = lax.axis_index("warpgroup")
    mine = pl.ds(me * WARPGROUP, WARPGROUP)

    def step(_: Any, x_smem: Any, codes_smem: Any, *rest: Any) -> Any:
      *group, carry = rest
      if grouped:
        scale = _scale(group[0].at[0, mine], kind)
        zero = _zero(group[1].at[0, mine], kind) if kind.zeros else None
        total = carry
      else:
        total, zero = carry
        scale: Any = None
      w = codes_smem.at[mine]
      if w.dtype != inputs:  # int8 is multiplied from where it lies
        w = _weights(w[...], zero, scale if kind.pre else None, kind, inputs)
        if interpreted:
          staging.at[me][...] = w
          plgpu.commit_smem()
          w = staging.at[me]
      if kind.pre or not grouped:
        plgpu.wgmma(total, w, x_smem.T)
        plgpu.wgmma_wait(0)
        return carry

      def alone(part: Any) -> jax.Array:
        plgpu.wgmma(part, w, x_smem.T)
        return part[...]

      part = pl.run_scoped(alone, total_type).astype(jnp.float32)
      return total + part * lax.broadcast_in_dim(scale, part.shape, [0])

    def pipeline(context: Any) -> Any:
      return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(tile.steps,),
        in_specs=specs,
        max_concurrent_steps=tile.slots,
        wg_axis="warpgroup",
        num_compute_wgs=tile.groups,
        memory_registers=_MEMORY_REGISTERS,
        compute_context=context,
      )

    piped = [x_gmem, codes_gmem, *(per_group if grouped else [])]

    def scope(allocations: Any) -> None:
      @plgpu.nd_loop((blocks,), collective_axes="block")
      def _tiles(info: Any) -> None:
        # Tiles of columns vary fastest among neighbours, so that they share activations.
        m, n, part = _unravel(info.index[0], tiles)
        rows = pl.ds(part * (tile.steps * tile.depth), tile.steps * tile.depth)
        tokens_at = pl.ds(m * tile.tokens, tile.tokens)
        columns_at = pl.ds(n * width, width)
        columns_of_me = pl.ds(n * width + me * WARPGROUP, WARPGROUP)

        def store(total: jax.Array, scale: Any = None) -> None:
          for first in range(0, tile.tokens, chunk):
            out = total[:, first : first + chunk]
            if scale is not None:
              out = out.astype(jnp.float32) * lax.broadcast_in_dim(scale, out.shape, [0])
            out = out.astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if not interpreted:
              out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
            y_smem.at[me].T[...] = out
            plgpu.commit_smem()
            at = pl.ds(m * tile.tokens + first, chunk)
            plgpu.copy_smem_to_gmem(y_smem.at[me], y_gmem.at[part, at, columns_of_me])

        def context(run: Any) -> None:
          if kind.pre:
            pl.run_scoped(lambda total: store(run(total)[...]), total_type)
          elif grouped:
            shape = (WARPGROUP, tile.tokens)
            store(run(jnp.zeros(shape, jnp.float32)))
          else:
            plgpu.commit_smem()  # what was read of it before is over
            for source, line in zip(per_group, lines, strict=True):
              at = source.at[0, columns_of_me]
              plgpu.copy_gmem_to_smem(at, line.at[me], arrived.at[me])
            plgpu.barrier_wait(arrived.at[me])
            zero = _zero(lines[1].at[me], kind) if kind.zeros else None

            def whole(total: Any) -> None:
              y = run((total, zero))[0][...]
              store(y, _scale(lines[0].at[me], kind))

            pl.run_scoped(whole, total_type)

        sources = [x_gmem.at[tokens_at, rows], codes_gmem.at[columns_at, rows]]
        if grouped:
          group = part * (tile.steps * tile.depth) // kind.group
          sources += [ref.at[pl.ds(group, per_block), columns_at] for ref in per_group]
        pipeline(context)(*sources, allocations=allocations)

    nothing = lambda *_: None
    pl.run_scoped(
      scope,
      allocations=pipeline(nothing).get_allocations(*piped),
      collective_axes="warpgroup",
    )
    plgpu.wait_smem_to_gmem(0)

  scratch: dict[str, Any] = {"y_smem": _shared((tile.groups, chunk, WARPGROUP), dtype)}
  if interpreted:
    scratch["staging"] = _shared((tile.groups, WARPGROUP, tile.depth), inputs)
  if not grouped:
    lines = [scales] if zeros is None else [scales, zeros]
    scratch["lines"] = [plgpu.SMEM((tile.groups, WARPGROUP), a.dtype) for a in lines]
    scratch["arrived"] = plgpu.Barrier(num_arrivals=len(lines), num_barriers=tile.groups)
  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((tile.splits, tokens, columns), dtype),
    scratch_types=scratch,
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


def _spec(shape: tuple[int, int], bits: int, index: Any) -> Any:
  return plgpu.BlockSpec(shape, index, transforms=_transforms(shape[-1], bits))


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
  transforms = _transforms(shape[-1], jnp.dtype(dtype).itemsize * 8)
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def _transforms(width: int, bits: int) -> tuple[Any, ...]:
  """Swizzle rows as wide as the tensor core takes them."""
  swizzle = min(128, width * bits // 8)
  return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
