# SPDX-License-Identifier: Apache-2.0
r"""Decode attention over a quantized cache on a TPU: no key or value is ever scaled.

Scales fold into what is multiplied. A key's scale s belongs to a channel, so queries take it,
`q . (s c + z) = (q s) . c + q . z`; a value's belongs to a token, so the weights of the softmax do,
`sum_t p (s c + z) = sum_t (p s) c + sum_t p z`. Codes go to the matrix unit as bfloat16
`base + code`, and `base` times the sum of what they were multiplied by, as
rounded, is taken off. Where a unit of 128 tokens has several groups, the queries of all groups are
rows of one product, of which each group keeps its tokens; likewise the softmax's weights, of which
each keeps its channels. So codes enter the matrix unit once whatever the groups.

Blocks of tokens follow one another with a running softmax; those outside of what is seen are
neither read nor computed. The last tokens and the new one are the first step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from treesurgeon.kernels.attention_lowbit import cache as caches
from treesurgeon.kernels.attention_lowbit import words

UNIT = words.UNIT
TOKENS = 8192  # of a block
WIDE = 2  # units side by side in a product
VMEM = 32 << 20
_LEAST = float(jnp.finfo(jnp.float32).min)


def unsupported(q: jax.Array, cache: caches.QuantizedCache, mask: Any) -> str:
  """Say why the kernel cannot attend.

  Args:
    q: queries.
    cache: the cache.
    mask: of keys.

  Returns:
    The reason, or "".

  Example:
    >>> cache = caches.init(1, 1, 1, 8, group_size=8, residual=8)
    >>> unsupported(jnp.ones((1, 2, 1, 8)), cache, None)
    'it takes one token at a time, not 2'
  """
  if q.shape[1] != 1:
    return f"it takes one token at a time, not {q.shape[1]}"
  if mask is not None:
    return "it takes no mask"
  if q.dtype.name not in ("bfloat16", "float32"):
    return f"it takes queries in bfloat16 or float32, not {q.dtype.name}"
  if cache.channels % UNIT:
    return f"it takes heads of a multiple of {UNIT} channels, not {cache.channels}"
  if cache.residual % 16:
    return f"it takes a multiple of 16 last tokens, not {cache.residual}"
  if cache.group_size < 16:
    return f"it takes groups of 16 or more, not {cache.group_size}"
  return ""


def attend(
  q: Float[Array, "batch 1 heads channels"],
  k: Float[Array, "batch 1 kv_heads channels"],
  v: Float[Array, "batch 1 kv_heads channels"],
  cache: caches.QuantizedCache,
  start: int | jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | jax.Array = 0,
  mask: None = None,
  tokens: int | None = None,
) -> Float[Array, "batch 1 heads channels"]:
  """Mix the values of past tokens and of the new one; see `api.attend`.

  Args:
    q: queries; rounded to bfloat16 where they are multiplied, as the weights are.
    k, v: the new token's key and value.
    cache: of the tokens before.
    start: how many.
    scale, softcap, window: of the scores.
    mask: None.
    tokens: of a block; None chooses.

  Returns:
    The mixed values in the dtype of `q`.
  """
  del mask
  batch, _, heads, channels = q.shape
  kv_heads = k.shape[2]
  count = heads // kv_heads
  padded = -(-count // 8) * 8
  many = batch * kv_heads
  rows = q.reshape(many, count, channels).astype(jnp.float32) * scale
  rows = jnp.pad(rows, [(0, 0), (0, padded - count), (0, 0)])
  k, v = (x.reshape(many, 1, channels) for x in (k, v))
  flat = jax.tree.map(lambda x: x.reshape(many, -1, x.shape[-1]), cache)
  size = tokens or block_tokens(cache)
  blocks = cache.capacity // size
  known, scalars = None, []
  if isinstance(start, int) and isinstance(window, int):
    # The cost model of the compiler knows no transfers of scalars, so it is given none.
    known = (start, max(start - window + 1, 0) if window > 0 else 0)
  else:
    oldest = jnp.where(jnp.asarray(window) > 0, jnp.maximum(start - window + 1, 0), 0)
    scalars = [jnp.stack([jnp.asarray(start), oldest]).astype(jnp.int32)]

  def block_of(head: Any, step: Any, *scalars: Any) -> tuple[Any, Any, int]:
    """Stay at a block that is seen, so that what is not seen is not read."""
    start, oldest = known or (scalars[0][0], scalars[0][1])
    last = jnp.maximum(start - cache.residual - 1, 0) // size
    return head, jnp.clip(step, jnp.minimum(oldest // size, last), last), 0

  whole = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda head, step, *_: (head, 0, 0))
  part = lambda x: pl.BlockSpec((None, x.shape[1] // blocks, x.shape[2]), block_of)
  kernel = functools.partial(
    _kernel,
    known=known,
    bits=cache.bits,
    group=cache.group_size,
    softcap=softcap,
    size=size,
    blocks=blocks,
  )
  kernel = kernel if known is None else functools.partial(kernel, None)
  last = (flat.k_last, flat.v_last)
  coded = (flat.k_codes, flat.k_scales, flat.k_mins, flat.v_codes, flat.v_scales, flat.v_mins)
  mixed = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(many, blocks),
      in_specs=[*map(whole, (rows, k, v, *last)), *map(part, coded)],
      out_specs=whole(rows),
      scratch_shapes=[
        pltpu.VMEM((padded, 1), jnp.float32),
        pltpu.VMEM((padded, 1), jnp.float32),
        pltpu.VMEM((padded, channels), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    name=f"attend_int{cache.bits}",
  )(*scalars, rows, k, v, *last, *coded)
  return mixed[:, :count].reshape(q.shape)


def block_tokens(cache: caches.QuantizedCache) -> int:
  """Choose the tokens of a block: as many as are unrolled in reasonable time, a divisor of all.

  Args:
    cache: the cache.

  Returns:
    The number of tokens, whole tiles.

  Example:
    >>> block_tokens(caches.init(1, 1, 10_000, 128, bits=4))
    5120
  """
  tile = words.fields(cache.bits) * UNIT
  tiles = cache.capacity // tile
  most = max(1, TOKENS // tile)
  return tile * next(n for n in range(most, 0, -1) if tiles % n == 0)


def _kernel(
  scalars: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  k_last_ref: Any,
  v_last_ref: Any,
  k_codes_ref: Any,
  k_scales_ref: Any,
  k_mins_ref: Any,
  v_codes_ref: Any,
  v_scales_ref: Any,
  v_mins_ref: Any,
  out_ref: Any,
  most_ref: Any,
  total_ref: Any,
  mixed_ref: Any,
  *,
  known: tuple[int, int] | None,
  bits: int,
  group: int,
  softcap: float | None,
  size: int,
  blocks: int,
) -> None:
  start, oldest = known or (scalars[0], scalars[1])
  step = pl.program_id(1)
  residual = k_last_ref.shape[0]
  count = start - residual  # tokens of which only codes are left
  q = q_ref[...]
  cap = lambda s: s if softcap is None else softcap * jnp.tanh(s / softcap)

  @pl.when(step == 0)
  def _() -> None:
    slot = lax.broadcasted_iota(jnp.int32, (1, residual), 1)
    token = start - 1 - lax.rem(start - 1 - slot + residual, residual)
    contract = (((1,), (1,)), ((), ()))
    scores = lax.dot_general(
      q.astype(jnp.bfloat16), k_last_ref[...].astype(jnp.bfloat16), contract,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = jnp.where((token >= oldest) & (token >= 0), cap(scores), _LEAST)
    own = cap((q * k_ref[...].astype(jnp.float32)).sum(axis=1, keepdims=True))
    most = jnp.maximum(own, scores.max(axis=1, keepdims=True))
    p, own = jnp.exp(scores - most), jnp.exp(own - most)
    most_ref[...] = most
    total_ref[...] = own + p.sum(axis=1, keepdims=True)
    mixed_ref[...] = own * v_ref[...].astype(jnp.float32) + jnp.dot(
      p.astype(jnp.bfloat16), v_last_ref[...].astype(jnp.bfloat16),
      preferred_element_type=jnp.float32,
    )  # fmt: skip

  @pl.when((step * size < count) & ((step + 1) * size > oldest))
  def _() -> None:
    lane = lax.broadcasted_iota(jnp.int32, (1, UNIT), 1)
    units = size // UNIT
    scores = []
    decode = _decoder(k_codes_ref, bits, q.shape[1] // UNIT)
    for first in range(0, units, WIDE):
      many = min(WIDE, units - first)
      found = _scores(q, decode, k_scales_ref, k_mins_ref, first, many, group)
      for unit, one in enumerate(found, first):
        token = step * size + unit * UNIT + lane
        scores.append(jnp.where((token < count) & (token >= oldest), cap(one), _LEAST))
    old = most_ref[...]
    most = jnp.maximum(old, functools.reduce(jnp.maximum, scores).max(axis=1, keepdims=True))
    fade = jnp.exp(old - most)
    weights = [jnp.exp(s - most) for s in scores]
    most_ref[...] = most
    total_ref[...] = total_ref[...] * fade + sum(weights[1:], weights[0]).sum(axis=1, keepdims=True)
    mixed_ref[...] = mixed_ref[...] * fade + _mixed(
      weights, v_codes_ref, v_scales_ref, v_mins_ref, bits, group
    )

  @pl.when(step == blocks - 1)
  def _() -> None:
    out_ref[...] = (mixed_ref[...] / total_ref[...]).astype(out_ref.dtype)


def _decoder(ref: Any, bits: int, parts: int) -> Any:
  """Decode a unit's part of 128 rows to (base + codes, base); a tile has so many parts."""
  fields = words.fields(bits)
  if bits == 8:

    def decode(unit: int, part: int) -> tuple[jax.Array, float]:
      first = (unit * parts + part) * (UNIT // 4)
      return pltpu.bitcast(ref[first : first + UNIT // 4, :], jnp.int8).astype(jnp.bfloat16), -128.0

    return decode
  # A bfloat16 has seven bits of mantissa, in which a code may lie at any place p under the exponent
  # of 2^(7 - p), so one shift serves several fields.
  shifts = (7 // bits) * bits
  shifted: dict[tuple[int, int], jax.Array] = {}

  def decode_words(unit: int, part: int) -> tuple[jax.Array, float]:
    tile, field = divmod(unit, fields)
    first = (tile * parts + part) * (UNIT // 2)
    shift = bits * field // shifts * shifts
    place = bits * field - shift
    if (first, shift) not in shifted:
      word = ref[first : first + UNIT // 2, :]
      shifted[first, shift] = lax.shift_right_logical(word, jnp.int32(shift)) if shift else word
    mask, exponent = (2**bits - 1) << place, (134 - place) << 7
    pair = shifted[first, shift] & jnp.int32(mask << 16 | mask)
    return pltpu.bitcast(pair | jnp.int32(exponent << 16 | exponent), jnp.bfloat16), 2.0 ** (
      7 - place
    )

  return decode_words


def _scores(
  q: jax.Array, decode: Any, scales_ref: Any, mins_ref: Any, first: int, many: int, group: int
) -> list[jax.Array]:
  """Score the keys of units: (rows, 128 tokens) each.

  Units lie side by side in one product, which a matrix unit of 256 columns needs, and the queries
  of all of their groups are its rows.
  """
  rows, channels = q.shape
  groups = UNIT // group
  spread = range(first * groups, (first + many) * groups)
  rounded = [_round(q * scales_ref[g : g + 1, :].astype(jnp.float32)) for g in spread]
  scaled = _stack(rounded).astype(jnp.bfloat16)
  low = [(q * mins_ref[g : g + 1, :].astype(jnp.float32)) for g in spread]
  total = None
  for part in range(channels // UNIT):
    at = slice(part * UNIT, (part + 1) * UNIT)
    found = [decode(unit, part) for unit in range(first, first + many)]
    wide = found[0][0] if many == 1 else jnp.concatenate([codes for codes, _ in found], axis=1)
    y = jnp.dot(scaled[:, at], wide, preferred_element_type=jnp.float32)
    pieces = []
    for i, x in enumerate(low):
      unit = i // groups
      off = (x[:, at] - found[unit][1] * rounded[i][:, at]).sum(axis=1, keepdims=True)
      pieces.append(y[i * rows : (i + 1) * rows, unit * UNIT : (unit + 1) * UNIT] + off)
    total = pieces if total is None else [a + b for a, b in zip(total, pieces, strict=True)]
  assert total is not None
  lane = lax.broadcasted_iota(jnp.int32, (1, UNIT), 1)
  return [_choose(total[i * groups : (i + 1) * groups], lane, group) for i in range(many)]


def _mixed(
  weights: list[jax.Array], codes_ref: Any, scales_ref: Any, mins_ref: Any, bits: int, group: int
) -> jax.Array:
  """Mix the values of a block: (rows, channels)."""
  rows, channels = weights[0].shape[0], codes_ref.shape[1]
  decode = _decoder(codes_ref, bits, 1)
  groups = channels // min(group, channels)
  low = [jnp.zeros_like(weights[0])] * groups
  sums: list[list[jax.Array]] = [[] for _ in range(groups)]
  for first in range(0, len(weights), WIDE):
    units = range(first, min(first + WIDE, len(weights)))
    found = [decode(unit, 0) for unit in units]
    scaled = []
    for unit, (_, base) in zip(units, found, strict=True):
      for g in range(groups):
        at = unit * groups + g
        one = _round(weights[unit] * scales_ref[at : at + 1, :].astype(jnp.float32))
        scaled.append(one)
        offset = weights[unit] * mins_ref[at : at + 1, :].astype(jnp.float32)
        low[g] = low[g] + (offset - base * one)
    wide = found[0][0] if len(units) == 1 else jnp.concatenate([x for x, _ in found], axis=1)
    y = jnp.dot(_stack(scaled).astype(jnp.bfloat16), wide, preferred_element_type=jnp.float32)
    y = [
      y[i * rows : (i + 1) * rows, i // groups * channels : (i // groups + 1) * channels]
      for i in range(len(scaled))
    ]
    for g in range(len(scaled)):
      sums[g % groups].append(y[g])
  lane = lax.broadcasted_iota(jnp.int32, (1, channels), 1)
  pieces = [
    sum(ys[1:], ys[0]) + offset.sum(axis=1, keepdims=True)
    for ys, offset in zip(sums, low, strict=True)
  ]
  return _choose(pieces, lane, channels // groups)


def _round(x: jax.Array) -> jax.Array:
  return x.astype(jnp.bfloat16).astype(jnp.float32)


def _stack(pieces: list[jax.Array]) -> jax.Array:
  return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _choose(pieces: list[jax.Array], lane: jax.Array, size: int) -> jax.Array:
  """Take from each piece the columns of its group."""
  found = pieces[0]
  for g in range(1, len(pieces)):
    found = jnp.where(lane >= g * size, pieces[g], found)
  return found
