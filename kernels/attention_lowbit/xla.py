# SPDX-License-Identifier: Apache-2.0
"""Attention over a quantized cache in plain XLA: a loop over blocks of tokens, softmax as it goes.

A block's keys and values are made whole, used and forgotten, so there is never a dense cache; as
many blocks are read as hold visible tokens. Softmax in blocks: Milakov and Gimelshein, 2018, arXiv
1805.02867.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from treesurgeon.kernels.attention_lowbit import cache as caches
from treesurgeon.kernels.attention_lowbit import words

UNIT = words.UNIT
_LEAST = float(jnp.finfo(jnp.float32).min)
_State = tuple[jax.Array, jax.Array, jax.Array]  # maximum, sum, mixed values


def attend(
  q: Float[Array, "batch seq heads channels"],
  k: Float[Array, "batch seq kv_heads channels"],
  v: Float[Array, "batch seq kv_heads channels"],
  cache: caches.QuantizedCache,
  start: int | jax.Array,
  *,
  scale: float,
  softcap: float | None,
  window: int | jax.Array,
  mask: jax.Array | None,
) -> Float[Array, "batch seq heads channels"]:
  """Mix the values of past and new tokens; see `api.attend`.

  Args:
    q: queries.
    k, v: keys and values of the same tokens.
    cache: of the tokens before.
    start: how many.
    scale, softcap, window, mask: of the scores.

  Returns:
    The mixed values in the dtype of `q`.
  """
  batch, seq, heads, channels = q.shape
  kv_heads = k.shape[2]
  shape = (batch, kv_heads, heads // kv_heads, seq)
  rows = q.reshape(batch, seq, *shape[1:3], channels).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(*shape[:2], -1, channels)
  k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
  query = start + jnp.arange(rows.shape[2]) % seq

  def scores(keys: jax.Array, token: jax.Array, exists: jax.Array) -> jax.Array:
    s = jnp.einsum("bhrd,bhtd->bhrt", rows, keys, preferred_element_type=jnp.float32) * scale
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    seen = (exists & (token <= query[:, None])) & (
      (jnp.asarray(window) <= 0) | (token > query[:, None] - window)
    )
    seen = seen[None, None]
    if mask is not None:
      kept = jnp.take(mask != 0, jnp.clip(token[0], 0, mask.shape[1] - 1), axis=1)
      seen = seen & kept[:, None, None]
    return jnp.where(seen, s, _LEAST)

  # The last tokens in full precision, and the new.
  residual = cache.residual
  slot = start - 1 - (start - 1 - jnp.arange(residual)) % residual
  token = jnp.concatenate([slot, start + jnp.arange(seq)])[None]
  keys, values = (
    jnp.concatenate([last.astype(q.dtype), new], axis=2)
    for last, new in ((cache.k_last, k), (cache.v_last, v))
  )
  s = scores(keys, token, token >= 0)
  most = s.max(axis=-1, keepdims=True)
  zero = jnp.zeros((*rows.shape[:3], 1), jnp.float32)
  state = _update((most, zero, jnp.zeros(rows.shape, jnp.float32)), s, values)

  tiles = block_tiles(cache)
  size = tiles * words.fields(cache.bits) * UNIT
  count = jnp.maximum(start - residual, 0)  # tokens of which only codes are left
  oldest = jnp.where(jnp.asarray(window) > 0, jnp.maximum(start - window + 1, 0), 0)

  def block(i: jax.Array, state: _State) -> _State:
    token = (i * size + jnp.arange(size))[None]
    s = scores(keys_of(cache, i).astype(q.dtype), token, token < count)
    return _update(state, s, values_of(cache, i).astype(q.dtype))

  if not isinstance(start, int) or start > residual:
    state = lax.fori_loop(oldest // size, (count + size - 1) // size, block, state)
  _, total, mixed = state
  mixed = (mixed / total).astype(q.dtype).reshape(*shape, channels)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def block_tiles(cache: caches.QuantizedCache) -> int:
  """Count the tiles that are read at once.

  Args:
    cache: the cache.

  Returns:
    A divisor of its number of tiles.

  Example:
    >>> block_tiles(caches.init(1, 1, 4096, 8, bits=4, group_size=4, residual=4))
    2
  """
  most = max(1, caches.BLOCK // (words.fields(cache.bits) * UNIT))
  return min(most, cache.k_codes.shape[2])


def keys_of(cache: caches.QuantizedCache, block: int | jax.Array) -> Float[Array, "b h t d"]:
  """Dequantize the keys of a block of tokens, in float32.

  Args:
    cache: the cache.
    block: which block.

  Returns:
    Keys, [batch, heads, tokens, channels].
  """
  tiles, group = block_tiles(cache), cache.group_size
  codes = lax.dynamic_slice_in_dim(cache.k_codes, block * tiles, tiles, axis=2)
  codes = words.take(codes, bits=cache.bits)  # [b, h, tiles, fields, channels, tokens]
  codes = jnp.swapaxes(codes, -1, -2).reshape(*codes.shape[:2], -1, group, cache.channels)
  groups = codes.shape[2]
  scales, mins = (
    lax.dynamic_slice_in_dim(x, block * groups, groups, axis=2)[:, :, :, None].astype(jnp.float32)
    for x in (cache.k_scales, cache.k_mins)
  )
  return _whole(codes, scales, mins).reshape(*codes.shape[:2], -1, cache.channels)


def values_of(cache: caches.QuantizedCache, block: int | jax.Array) -> Float[Array, "b h t d"]:
  """Dequantize the values of a block of tokens, in float32.

  Args:
    cache: the cache.
    block: which block.

  Returns:
    Values, [batch, heads, tokens, channels].
  """
  tiles, groups = block_tiles(cache), cache.value_groups
  codes = lax.dynamic_slice_in_dim(cache.v_codes, block * tiles, tiles, axis=2)
  codes = words.take(codes, bits=cache.bits)  # [b, h, tiles, fields, tokens, channels]
  at = codes.shape[:2]
  units = tiles * words.fields(cache.bits)
  codes = codes.reshape(*at, units, UNIT, groups, -1)

  def spread(x: jax.Array) -> jax.Array:
    x = lax.dynamic_slice_in_dim(x, block * units * groups, units * groups, axis=2)
    x = jnp.swapaxes(x.reshape(*at, units, groups, UNIT), -1, -2)
    return x[..., None].astype(jnp.float32)

  return _whole(codes, spread(cache.v_scales), spread(cache.v_mins)).reshape(
    *at, -1, cache.channels
  )


def _whole(codes: jax.Array, scales: jax.Array, mins: jax.Array) -> jax.Array:
  scales, mins = (jnp.broadcast_to(x, codes.shape) for x in (scales, mins))
  return codes.astype(jnp.float32) * scales + mins


def _update(state: _State, scores: jax.Array, values: jax.Array) -> _State:
  most, total, mixed = state
  new = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
  weights, fade = jnp.exp(scores - new), jnp.exp(most - new)
  added = jnp.einsum(
    "bhrt,bhtd->bhrd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  return new, total * fade + weights.sum(axis=-1, keepdims=True), mixed * fade + added
