# SPDX-License-Identifier: Apache-2.0
"""Decoding with a quantized cache: exact for few tokens, close in 8 bits, the same by any route."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models

SPEC = models.Spec(
  vocab_size=13, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=32, window=(0, 20, 0),
  attn_softcap=5.0, max_positions=128,
)  # fmt: skip
PARAMS = models.init(SPEC, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 100), 0, 13)
SIZES = {"group_size": 8, "residual": 16}
extend = jax.jit(functools.partial(models.extend, SPEC))


def logits(sizes, bits):
  cache = models.init_cache(SPEC, PARAMS, 2, 100, bits=bits, **SIZES)
  got, at = [], 0
  for size in sizes:
    new, cache = extend(PARAMS, TOKENS[:, at : at + size], cache, at)
    got.append(new)
    at += size
  return jnp.concatenate(got, axis=1)


def test_errors_fall_with_the_width():
  full = models.forward(SPEC, PARAMS, TOKENS).logits
  spread = float(jnp.abs(full).max())
  sizes = [60, *[1] * 40]
  got = [logits(sizes, bits) for bits in (8, 4, 2)]
  for one in got:  # a prompt attends to its own tokens, which are exact
    np.testing.assert_allclose(one[:, :60], full[:, :60], atol=1e-5)
  found = [float(jnp.abs(one - full).max()) / spread for one in got]
  assert found[0] < 0.005 and found[0] < found[1] < found[2]


def test_generation_is_exact_while_all_tokens_are_recent():
  generate = functools.partial(models.generate, SPEC, PARAMS, TOKENS[:, :30], max_new_tokens=20)
  np.testing.assert_array_equal(generate(cache_bits=2), generate())
  short = generate(cache_bits=2, cache_group_size=8, cache_residual=8)
  assert short.shape == (2, 50) and (short[:, :31] == generate()[:, :31]).all()


def test_a_wrong_width_is_named():
  with pytest.raises(ValueError, match="a cache of 5 bits; valid: 2, 4 or 8"):
    models.generate(SPEC, PARAMS, TOKENS[:, :3], max_new_tokens=1, cache_bits=5)
