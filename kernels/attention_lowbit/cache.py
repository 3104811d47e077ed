# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values in 2, 4 or 8 bits, the last tokens kept as they are (KIVI).

Keys have channels that are large for every token, so a scale goes with each channel, over groups of
G tokens; values have not, so there a scale goes with each token, over groups of G channels. With
`s = (max - min) / (2^b - 1)` and `z = min` of a group, `q = round((x - z) / s)`. The last R tokens
stay in full precision: keys are rounded R at a time when so many are there, values one by one as
they leave the last R. Tokens attend to those of their own call in full precision.

Liu et al., KIVI, 2024, arXiv 2402.02750. What is held is theirs for every number of tokens; how it
is held is not. The last tokens are two rings that never move: token t is at t mod R. When a ring
fills, both are rounded into words (`words.py`), and in the ring of keys the codes' values take the
keys' place; values stay, and their codes wait until the ring lets go of them. So what each token
costs is one row a ring, and what R tokens cost is paid once. A group without spread has scale 0,
where the published code divides by 0; scales are rounded to the cache's dtype before codes are
found, so codes are best for the scales that are kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from treesurgeon.kernels.attention_lowbit import words

UNIT = words.UNIT
BLOCK = 1024  # tokens; capacities are multiples of it or of a tile


Part = Any  # an array, or what stands for one: a tracer, a shape, a sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedCache:
  """Keys and values of past tokens. Leading axes, such as layers, may stand before all arrays.

  Attributes:
    k_codes: [batch, heads, tiles, channels / 2 (8 bits: 4), 128].
    k_scales, k_mins: [batch, heads, groups of tokens, channels].
    v_codes: [batch, heads, tiles, 64 (8 bits: 32), channels].
    v_scales, v_mins: [batch, heads, units x groups of channels, 128 tokens of the unit].
    k_last, v_last: [batch, heads, R, channels], token t at t mod R.
    bits: width of a code.
    group_size: G.
  """

  k_codes: Part
  k_scales: Part
  k_mins: Part
  v_codes: Part
  v_scales: Part
  v_mins: Part
  k_last: Part
  v_last: Part
  bits: int = dataclasses.field(metadata={"static": True})
  group_size: int = dataclasses.field(metadata={"static": True})

  @property
  def residual(self) -> int:
    """How many tokens stay in full precision."""
    return self.k_last.shape[-2]

  @property
  def channels(self) -> int:
    """Width of a head."""
    return self.k_last.shape[-1]

  @property
  def capacity(self) -> int:
    """How many tokens the codes have room for."""
    return self.k_codes.shape[-3] * words.fields(self.bits) * UNIT

  @property
  def value_groups(self) -> int:
    """Groups of channels of a value."""
    return self.channels // min(self.group_size, self.channels)


def init(
  batch: int,
  heads: int,
  length: int,
  channels: int,
  *,
  bits: int = 2,
  group_size: int = 32,
  residual: int = 128,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> QuantizedCache:
  """Make an empty cache.

  Args:
    batch: number of sequences.
    heads: of keys and values.
    length: most tokens it will hold; room is made in whole tiles.
    channels: width of a head.
    bits: width of a code: 2, 4 or 8.
    group_size: G, tokens of a group of keys and channels of a group of values, or all channels
      where there are fewer.
    residual: R, last tokens in full precision, a multiple of G.
    dtype: of these and of scales.

  Returns:
    The cache.

  Raises:
    ValueError: for sizes that do not divide.

  Example:
    >>> init(1, 2, 2048, 64, bits=2).k_codes.shape
    (1, 2, 2, 32, 128)

  Reference:
    Liu et al., KIVI: a tuning-free asymmetric 2bit quantization for KV cache, 2024, arXiv
    2402.02750.
  """
  if bits not in words.WIDTHS:
    raise ValueError(f"a cache of {bits} bits; valid: 2, 4 or 8")
  if group_size not in (4, 8, 16, 32, 64, 128):
    raise ValueError(f"group_size={group_size} of a cache; valid: 4, 8, 16, 32, 64 or 128")
  if residual < group_size or residual % group_size:
    raise ValueError(f"residual={residual} must be a multiple of group_size={group_size}")
  if channels % 4 or channels % min(group_size, channels):
    raise ValueError(
      f"heads of {channels} channels; valid: multiples of 4 and of group_size={group_size}, or "
      "multiples of 4 below it"
    )
  if batch < 1 or heads < 1 or length < 1:
    raise ValueError(f"a cache of batch={batch}, heads={heads}, length={length}; each must be >= 1")
  tile = words.fields(bits) * UNIT
  step = max(BLOCK, tile) if length > BLOCK else tile
  tokens = -(-length // step) * step
  at = (batch, heads)
  word_rows = words.rows(bits)
  value_rows = tokens // UNIT * (channels // min(group_size, channels))
  per_key, per_value = (*at, tokens // group_size, channels), (*at, value_rows, UNIT)
  return QuantizedCache(
    k_codes=jnp.zeros((*at, tokens // tile, channels // word_rows, UNIT), jnp.int32),
    k_scales=jnp.zeros(per_key, dtype),
    k_mins=jnp.zeros(per_key, dtype),
    v_codes=jnp.zeros((*at, tokens // tile, UNIT // word_rows, channels), jnp.int32),
    v_scales=jnp.zeros(per_value, dtype),
    v_mins=jnp.zeros(per_value, dtype),
    k_last=jnp.zeros((*at, residual, channels), dtype),
    v_last=jnp.zeros((*at, residual, channels), dtype),
    bits=bits,
    group_size=group_size,
  )


def append(
  cache: QuantizedCache,
  k: Float[Array, "batch seq heads channels"],
  v: Float[Array, "batch seq heads channels"],
  start: int | jax.Array,
) -> QuantizedCache:
  """Add tokens, one or many.

  Args:
    cache: holds `start` tokens, all that were ever added to it.
    k: keys of the new tokens.
    v: their values.
    start: how many tokens the cache holds; an int or traced. Beyond the capacity nothing is valid.

  Returns:
    The cache with them. It depends on the tokens only, not on how many came at once.

  Raises:
    ValueError: for other shapes, or more tokens than there is room for.

  Example:
    >>> cache = init(1, 1, 256, 8, group_size=4, residual=4, dtype=jnp.float32)
    >>> cache = append(cache, jnp.ones((1, 6, 1, 8)), jnp.ones((1, 6, 1, 8)), 0)
    >>> cache.k_mins[0, 0, :2, 0].tolist()
    [1.0, 0.0]
  """
  check(cache, k, v, start)
  size = k.shape[1]
  residual = cache.residual
  k, v = (jnp.swapaxes(x, 1, 2).astype(cache.k_last.dtype) for x in (k, v))
  within = jnp.asarray(start % residual, jnp.int32)
  first = jnp.asarray(start, jnp.int32) - within  # the first token of the ring's round
  more = (size + residual - 1 + residual - 1) // residual * residual - residual
  # Round by round, the tokens of this one and the new.
  keys, values = (
    _after(last, new, within, more) for last, new in ((cache.k_last, k), (cache.v_last, v))
  )
  unit = min(residual & -residual, UNIT)  # the largest piece that always lies in one unit
  pieces = (within + size) // residual * (residual // unit)

  def write(
    i: jax.Array, state: tuple[QuantizedCache, jax.Array]
  ) -> tuple[QuantizedCache, jax.Array]:
    cache, keys = state
    key, value = (lax.dynamic_slice_in_dim(x, i * unit, unit, axis=2) for x in (keys, values))
    cache, rounded = _write(cache, key, value, first + i * unit)
    return cache, lax.dynamic_update_slice_in_dim(keys, rounded, i * unit, axis=2)

  cache, keys = lax.fori_loop(0, pieces, write, (cache, keys))
  # A slot holds the newest token of its place, if that is among the buffered.
  end = within + size
  at = end - 1 - (end - 1 - jnp.arange(residual)) % residual
  last = [
    jnp.where((at >= 0)[None, None, :, None], jnp.take(x, jnp.maximum(at, 0), axis=2), old)
    for x, old in ((keys, cache.k_last), (values, cache.v_last))
  ]
  return dataclasses.replace(cache, k_last=last[0], v_last=last[1])


def rounded_keys(
  k: Float[Array, "*batch tokens channels"], *, bits: int, group_size: int
) -> tuple[Int32[Array, "*batch tokens channels"], Array, Array]:
  """Round keys, per channel in groups of tokens.

  Args:
    k: keys, a multiple of G tokens.
    bits: width of a code.
    group_size: G.

  Returns:
    (codes, scales, minima), the latter [..., groups, channels] in the dtype of `k`.

  Example:
    >>> codes, scales, mins = rounded_keys(jnp.arange(4.0).reshape(4, 1), bits=2, group_size=4)
    >>> codes.ravel().tolist(), scales.tolist(), mins.tolist()
    ([0, 1, 2, 3], [[1.0]], [[0.0]])
  """
  *batch, tokens, channels = k.shape
  grouped = k.reshape(*batch, tokens // group_size, group_size, channels)
  codes, scales, mins = _round(grouped, bits, axis=-2)
  return codes.reshape(k.shape), scales.squeeze(-2), mins.squeeze(-2)


def rounded_values(
  v: Float[Array, "*batch tokens channels"], *, bits: int, group_size: int
) -> tuple[Int32[Array, "*batch tokens channels"], Array, Array]:
  """Round values, per token in groups of channels.

  Args:
    v: values.
    bits: width of a code.
    group_size: G; all channels where there are fewer.

  Returns:
    (codes, scales, minima), the latter [..., tokens, groups] in the dtype of `v`.

  Example:
    >>> rounded_values(jnp.array([[0.0, 3.0]]), bits=2, group_size=2)[0].tolist()
    [[0, 3]]
  """
  *batch, tokens, channels = v.shape
  size = min(group_size, channels)
  codes, scales, mins = _round(v.reshape(*batch, tokens, channels // size, size), bits, axis=-1)
  return codes.reshape(v.shape), scales.squeeze(-1), mins.squeeze(-1)


def check(cache: QuantizedCache, k: jax.Array, v: jax.Array, start: int | jax.Array) -> None:
  """Refuse new tokens that do not fit the cache.

  Args:
    cache: the cache.
    k: keys of the new tokens.
    v: their values.
    start: how many tokens the cache holds.

  Raises:
    ValueError: saying what would fit.
  """
  batch, heads, _, channels = cache.k_last.shape
  if k.ndim != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, channels):
    raise ValueError(
      f"keys of shape {k.shape} and values of shape {v.shape} for a cache of "
      f"[{batch}, tokens, {heads}, {channels}]"
    )
  if isinstance(start, int) and not 0 <= start <= cache.capacity - k.shape[1]:
    raise ValueError(
      f"{k.shape[1]} tokens after {start} do not fit a cache of {cache.capacity} tokens"
    )


def _after(last: jax.Array, new: jax.Array, within: jax.Array, more: int) -> jax.Array:
  room = jnp.pad(last, [(0, 0), (0, 0), (0, more), (0, 0)])
  return lax.dynamic_update_slice_in_dim(room, new, within, axis=2)


def _round(x: jax.Array, bits: int, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Round groups along an axis; the scale and minimum that are kept are those codes are for."""
  wide = x.astype(jnp.float32)
  least = wide.min(axis=axis, keepdims=True)
  spread = (wide.max(axis=axis, keepdims=True) - least) / (2**bits - 1)
  scales, mins = spread.astype(x.dtype), least.astype(x.dtype)
  s = scales.astype(jnp.float32)
  codes = jnp.round((wide - mins.astype(jnp.float32)) / jnp.where(s > 0, s, 1.0))
  codes = jnp.where(s > 0, jnp.clip(codes, 0, 2**bits - 1), 0)
  return codes.astype(jnp.int32), scales, mins


def _write(
  cache: QuantizedCache, key: jax.Array, value: jax.Array, token: jax.Array
) -> tuple[QuantizedCache, jax.Array]:
  """Round tokens that lie in one unit and write them; return the rounded keys' values too."""
  bits, group = cache.bits, cache.group_size
  count = key.shape[2]
  unit, lane = token // UNIT, token % UNIT
  tile, field = unit // words.fields(bits), unit % words.fields(bits)
  codes, scales, mins = rounded_keys(key, bits=bits, group_size=group)
  spread = lambda x: jnp.repeat(x.astype(jnp.float32), group, axis=2)
  rounded = (codes * spread(scales) + spread(mins)).astype(key.dtype)
  at = (0, 0, tile, 0, lane)
  shape = (*key.shape[:2], 1, key.shape[3] // words.rows(bits), count)
  old = lax.dynamic_slice(cache.k_codes, at, shape)
  new = words.put(old, jnp.swapaxes(codes, 2, 3)[:, :, None], field, bits=bits)
  k_codes = lax.dynamic_update_slice(cache.k_codes, new, at)
  k_scales, k_mins = (
    lax.dynamic_update_slice_in_dim(have, x, token // group, axis=2)
    for have, x in ((cache.k_scales, scales), (cache.k_mins, mins))
  )
  codes, scales, mins = rounded_values(value, bits=bits, group_size=group)
  at = (0, 0, tile, lane // words.rows(bits), 0)
  shape = (*value.shape[:2], 1, count // words.rows(bits), value.shape[3])
  old = lax.dynamic_slice(cache.v_codes, at, shape)
  v_codes = lax.dynamic_update_slice(
    cache.v_codes, words.put(old, codes[:, :, None], field, bits=bits), at
  )
  v_scales, v_mins = (
    lax.dynamic_update_slice(have, jnp.swapaxes(x, 2, 3), (0, 0, unit * cache.value_groups, lane))
    for have, x in ((cache.v_scales, scales), (cache.v_mins, mins))
  )
  made = QuantizedCache(
    k_codes, k_scales, k_mins, v_codes, v_scales, v_mins, cache.k_last, cache.v_last, bits, group
  )
  return made, rounded
