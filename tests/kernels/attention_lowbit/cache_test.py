# SPDX-License-Identifier: Apache-2.0
"""The quantized cache: what it holds is KIVI's for any number of tokens; attention is float64's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.core import leaves
from treesurgeon.kernels.attention_lowbit import api, cache, words, xla

KEY = jax.random.key(0)


def rounded(x, bits, axis):
  """Round groups along an axis, as the paper does; scales and minima in float32."""
  least = x.min(axis=axis, keepdims=True)
  scale = (x.max(axis=axis, keepdims=True) - least) / np.float32(2**bits - 1)
  codes = np.round(np.clip((x - least) / np.where(scale > 0, scale, 1), 0, 2**bits - 1))
  return codes.astype(np.float64) * scale + least


def held(k, v, bits, group, residual):
  """Say what KIVI holds of tokens [batch, tokens, heads, channels]."""
  k, v = np.asarray(k), np.asarray(v)
  b, n, h, d = k.shape
  keys, values = k.astype(np.float64), v.astype(np.float64)
  done = n // residual * residual
  grouped = k[:, :done].reshape(b, done // group, group, h, d)
  keys[:, :done] = rounded(grouped, bits, 2).reshape(b, done, h, d)
  done = max(n - residual, 0)
  grouped = v[:, :done].reshape(b, done, h, d // min(group, d), min(group, d))
  values[:, :done] = rounded(grouped, bits, -1).reshape(b, done, h, d)
  return keys, values


def attention(q, k, v, start, *, scale, softcap=None, window=0, mask=None):
  """Attend in float64; `start` keys come before the queries."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  share = q.shape[2] // k.shape[2]
  k, v = (np.repeat(x, share, axis=2) for x in (k, v))
  s = np.einsum("bshd,bthd->bhst", q, k) * scale
  s = s if softcap is None else softcap * np.tanh(s / softcap)
  query, key = start + np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None]
  seen = (key <= query) & ((window <= 0) | (key > query - window))
  seen = np.broadcast_to(seen, s.shape) & (mask[:, None, None] if mask is not None else True)
  p = np.exp(np.where(seen, s, -np.inf) - s.max(axis=-1, keepdims=True))
  return np.einsum("bhst,bthd->bshd", p / p.sum(axis=-1, keepdims=True), v)


def draw(seed, batch, tokens, kv_heads, share, channels, bits=4, group=16):
  """Draw queries, and keys and values that are near codes, so that rounding never is a tie."""
  rng = np.random.default_rng(seed)
  top, shape = 2**bits - 1, (batch, tokens, kv_heads, channels)

  def near(at):
    """Codes and noise; two places of each group hold its least and its most."""
    codes = rng.integers(0, top + 1, shape) + rng.uniform(-0.3, 0.3, shape)
    return np.where(at == 0, 0, np.where(at == 1, top, np.clip(codes, 0, top)))

  scales = rng.uniform(0.5, 2, (1, 1, kv_heads, channels)) / top * 4
  k = (near(np.arange(tokens).reshape(1, -1, 1, 1) % group) - top / 2) * scales
  scales = rng.uniform(0.5, 2, (batch, tokens, kv_heads, 1)) / top * 4
  v = near(np.arange(channels) % min(group, channels)) * scales - 1
  q = rng.normal(size=(batch, tokens, kv_heads * share, channels))
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def filled(k, v, chunks, **sizes):
  """Append tokens in chunks of the given sizes."""
  batch, tokens, heads, channels = k.shape
  made = cache.init(batch, heads, tokens, channels, dtype=jnp.float32, **sizes)
  add, at = jax.jit(cache.append), 0
  for n in chunks:
    made = add(made, k[:, at : at + n], v[:, at : at + n], at)
    at += n
  return made


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
  bits=st.sampled_from(words.WIDTHS),
  sizes=st.sampled_from(((4, 8, 8), (32, 32, 16), (16, 48, 32), (128, 128, 128))),
  past=st.one_of(st.integers(0, 40), st.integers(41, 600)),
  seq=st.sampled_from((1, 3)),
  window=st.sampled_from((0, 5, 90)),
  softcap=st.sampled_from((None, 3.0)),
  seed=st.integers(0, 9),
)
def test_attention_equals_float64(bits, sizes, past, seq, window, softcap, seed):
  group, residual, channels = sizes
  q, k, v = draw(seed, 2, past + seq, 2, 2, channels, bits, group)
  mask = np.arange(past + seq)[None] >= np.array([[0], [min(past, 3)]])
  made = cache.init(2, 2, past + seq, channels, dtype=jnp.float32, bits=bits, group_size=group,
                    residual=residual)  # fmt: skip
  if past:
    made = jax.jit(cache.append)(made, k[:, :past], v[:, :past], 0)
  more = {"scale": 0.3, "softcap": softcap, "window": window}
  attend = jax.jit(functools.partial(api.attend, **more))
  got = attend(*(x[:, past:] for x in (q, k, v)), made, past, mask=jnp.asarray(mask))
  keys, values = held(k[:, :past], v[:, :past], bits, group, residual)
  keys, values = (np.concatenate([a, b[:, past:]], axis=1) for a, b in ((keys, k), (values, v)))
  expected = attention(q[:, past:], keys, values, past, mask=mask, **more)
  np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize(("bits", "group", "residual"), [(2, 32, 32), (4, 16, 48), (8, 64, 128)])
def test_it_is_the_same_however_many_tokens_come_at_once(bits, group, residual):
  _, k, v = draw(1, 1, 150, 2, 1, 32, bits, group)
  sizes = {"bits": bits, "group_size": group, "residual": residual}
  whole = filled(k, v, [150], **sizes)
  for chunks in ([1] * 150, [residual - 1, 1, 2, 148 - residual]):
    for a, b in zip(
      jax.tree.leaves(filled(k, v, chunks, **sizes)), jax.tree.leaves(whole), strict=True
    ):
      np.testing.assert_array_equal(a, b)


def test_few_tokens_are_exact():
  q, k, v = draw(2, 2, 31, 2, 3, 16)
  made = filled(k[:, :30], v[:, :30], [30], bits=2, group_size=16, residual=32)
  got = api.attend(q[:, 30:], k[:, 30:], v[:, 30:], made, 30, scale=0.25)
  np.testing.assert_allclose(got, attention(q[:, 30:], k, v, 30, scale=0.25), atol=1e-5)


def test_dequantized_blocks_are_what_codes_stand_for():
  _, k, v = draw(3, 1, 2500, 1, 1, 32, 2, 32)
  made = filled(k, v, [2500], bits=2, group_size=32, residual=32)
  keys, values = held(k, v, 2, 32, 32)
  blocks = range(made.capacity // 1024)
  got = np.concatenate([xla.keys_of(made, i) for i in blocks], axis=2)
  np.testing.assert_allclose(got[0, 0, :2496], keys[0, :2496, 0], atol=1e-5)
  got = np.concatenate([xla.values_of(made, i) for i in blocks], axis=2)
  np.testing.assert_allclose(got[0, 0, :2468], values[0, :2468, 0], atol=1e-5)


def test_channels_that_are_large_cost_least_with_scales_of_their_own():
  k = jax.random.normal(KEY, (64, 32)).at[:, 5].add(20)

  def error(x):
    codes, scales, mins = cache.rounded_keys(x, bits=4, group_size=32)
    spread = lambda s: np.repeat(s, 32, axis=0)
    return np.abs(np.asarray(codes) * spread(scales) + spread(mins) - x).mean()

  codes, scales, mins = cache.rounded_values(k, bits=4, group_size=32)
  per_token = np.abs(np.asarray(codes) * scales + mins - k).mean()
  assert error(k) < per_token / 2


def test_groups_without_spread_are_exact():
  made = cache.rounded_keys(jnp.full((4, 2), 0.7), bits=2, group_size=4)
  assert not made[0].any() and not made[1].any() and (made[2] == jnp.float32(0.7)).all()


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from(words.WIDTHS), seed=st.integers(0, 99))
def test_words_hold_their_codes(bits, seed):
  fields = words.fields(bits)
  codes = np.random.default_rng(seed).integers(0, 2**bits, (fields, 8, 5)).astype(np.int32)
  held = jnp.asarray(
    np.random.default_rng(seed).integers(-(2**31), 2**31, (8 // words.rows(bits), 5)), jnp.int32
  )
  for field in np.random.default_rng(seed).permutation(fields):
    held = words.put(held, jnp.asarray(codes[field]), int(field), bits=bits)
  np.testing.assert_array_equal(words.take(held, bits=bits), codes)


@pytest.mark.parametrize("bits", words.WIDTHS)
def test_bytes_are_what_the_widths_say(bits):
  made = jax.eval_shape(lambda: cache.init(2, 3, 4096, 64, bits=bits, group_size=32, residual=128))
  elements = 2 * 3 * 4096 * 64 * 2
  expected = elements * bits // 8 + elements // 32 * 2 * 2 + 2 * 3 * 128 * 64 * 2 * 2
  assert sum(map(leaves.nbytes, jax.tree.leaves(made))) == expected


def test_scanned_layers_and_vmap():
  q, k, v = draw(4, 1, 81, 1, 1, 16)
  made = filled(k[:, :80], v[:, :80], [80], bits=4, group_size=16, residual=16)
  pair = jax.tree.map(lambda x: jnp.stack([x, x]), made)
  new_q, new_k, new_v = (x[:, 80:] for x in (q, k, v))
  one = lambda made: (
    api.attend(new_q, new_k, new_v, made, 80, scale=1.0),
    cache.append(made, new_k, new_v, 80),
  )
  want = one(made)
  scanned = jax.lax.scan(lambda c, x: (c, one(x)), 0, pair)[1]
  mapped = jax.vmap(one)(pair)
  for got in (scanned, mapped):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a[1], b, atol=1e-5)


def test_refusals():
  make = functools.partial(cache.init, 1, 1, 64, 16)
  with pytest.raises(ValueError, match="a cache of 3 bits; valid: 2, 4 or 8"):
    make(bits=3)
  with pytest.raises(ValueError, match="group_size=48 of a cache; valid: 4, 8, 16"):
    make(group_size=48)
  with pytest.raises(ValueError, match="residual=40 must be a multiple of group_size=32"):
    make(residual=40)
  with pytest.raises(ValueError, match="heads of 18 channels; valid: multiples of 4"):
    cache.init(1, 1, 64, 18)
  with pytest.raises(ValueError, match="length=0; each must be >= 1"):
    cache.init(1, 1, 0, 16)
  made, x = make(), jnp.ones((1, 2, 1, 16))
  two = jnp.ones((1, 2, 2, 16))
  with pytest.raises(ValueError, match=r"keys of shape \(1, 2, 2, 16\) .* \[1, tokens, 1, 16\]"):
    cache.append(made, two, two, 0)
  with pytest.raises(ValueError, match="2 tokens after 1023 do not fit a cache of 1024 tokens"):
    cache.append(made, x, x, 1023)
  with pytest.raises(ValueError, match=r"queries of shape \(1, 2, 3, 16\) for keys"):
    api.attend(jnp.ones((1, 2, 3, 16)), two, two, cache.init(1, 2, 64, 16), 0, scale=1.0)
  with pytest.raises(ValueError, match=r"mask has shape \(2,\); valid: \[batch=1, keys\]"):
    api.attend(x, x, x, made, 0, scale=1.0, mask=jnp.ones(2))
  with pytest.raises(
    ValueError, match="'tpu' cannot .* one token at a time, not 2; supported: xla"
  ):
    api.attend(x, x, x, made, 0, scale=1.0, implementation="tpu")
  with pytest.raises(ValueError, match="'gpu' cannot .*: it is unknown; supported: xla"):
    api.attend(x, x, x, made, 0, scale=1.0, implementation="gpu")
