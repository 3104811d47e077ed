# SPDX-License-Identifier: Apache-2.0
"""Attention against a float64 loop, masks against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.models import attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("start", [0, 4])
def test_visible_is_brute_force(causal: bool, window: int, start: int):
  got = attention.visible(5, 9, start=start, window=window, causal=causal)
  traced = jax.jit(lambda w, s: attention.visible(5, 9, start=s, window=w, causal=causal))
  np.testing.assert_array_equal(got, traced(window, start))
  for query in range(5):
    for key in range(9):
      distance = start + query - key
      near = window == 0 or (distance < window and (causal or distance > -window))
      assert bool(got[0, query, key]) == (near and (distance >= 0 or not causal))


def test_masks_combine():
  padding = jnp.array([[1, 1, 0], [0, 1, 1]])
  pairs = jnp.ones((2, 3, 3)).at[0, 2, 0].set(0)
  tri = np.tri(3, dtype=bool)
  np.testing.assert_array_equal(
    attention.visible(3, 3, mask=padding), tri[None] & (np.asarray(padding)[:, None, :] != 0)
  )
  np.testing.assert_array_equal(
    attention.visible(3, 3, mask=pairs), tri[None] & (np.asarray(pairs) != 0)
  )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_is_the_float64_loop(kv_heads: int, softcap: float | None):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 5, 4, 3))
  k, v = rng.normal(size=(2, 2, 5, kv_heads, 3))
  allowed = np.asarray(attention.visible(5, 5, window=3))
  expected = np.zeros_like(q)
  for b in range(2):
    for h in range(4):
      g = h // (4 // kv_heads)
      for s in range(5):
        score = 0.7 * k[b, :, g] @ q[b, s, h]
        score = score if softcap is None else softcap * np.tanh(score / softcap)
        weight = np.where(allowed[0, s], np.exp(score), 0.0)
        expected[b, s, h] = weight / weight.sum() @ v[b, :, g]
  got = attention.attend(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
    jnp.asarray(allowed),
    scale=0.7,
    softcap=softcap,
  )
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attend_keeps_the_dtype_and_sums_in_float32():
  x = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
  allowed = attention.visible(300, 300)
  y = attention.attend(x, x, x, allowed, scale=1.0)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), 1.0, atol=0.02)
