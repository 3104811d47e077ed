# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of decode attention: interpreted with race detection it equals the XLA loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from treesurgeon.kernels.attention_lowbit import api, cache, tpu, words

# Queries times scales, and weights times scales, are rounded to bfloat16.
ROUNDED = 6e-3


def check(
  *, bits, group, residual, past, channels=128, length=0, share=3, window=0, softcap=None, seed=0,
  dtype=jnp.float32, tokens=None,
):  # fmt: skip
  """Attend by the kernel and by the loop, which `cache_test.py` holds to float64."""
  keys = jax.random.split(jax.random.key(seed), 5)
  made = cache.init(2, 1, max(past + 1, length), channels, bits=bits, group_size=group,
                    residual=residual, dtype=dtype)  # fmt: skip
  k, v = (jax.random.normal(key, (2, past, 1, channels)).astype(dtype) for key in keys[:2])
  made = jax.jit(cache.append)(made, k, v + 1, 0) if past else made
  q, k, v = (
    jax.random.normal(key, (2, 1, n, channels))
    for key, n in zip(keys[2:], (share, 1, 1), strict=True)
  )
  more = {"scale": channels**-0.5, "softcap": softcap, "window": window}
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    got = tpu.attend(q, k, v, made, past, tokens=tokens, **more)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  want = api.attend(q, k, v, made, past, implementation="xla", **more)
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDED * np.abs(want).max())


@pytest.mark.parametrize(
  "case",
  [
    {"bits": 2, "group": 32, "residual": 96, "past": 700, "softcap": 2.0},
    {"bits": 4, "group": 16, "residual": 32, "past": 300, "window": 40, "share": 9},
    {"bits": 8, "group": 64, "residual": 64, "past": 300, "window": 200, "channels": 256},
    {"bits": 8, "group": 128, "residual": 128, "past": 0, "share": 8},
  ],
)
def test_it_equals_the_loop(case):
  check(**case)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
  bits=st.sampled_from(words.WIDTHS),
  sizes=st.sampled_from(((16, 32), (32, 96), (64, 64), (128, 128), (32, 128))),
  past=st.integers(0, 5000),
  window=st.sampled_from((0, 1, 40, 2000)),
  softcap=st.sampled_from((None, 2.0)),
  channels=st.sampled_from((128, 256)),
  seed=st.integers(0, 99),
)
def test_it_equals_the_loop_on_many_shapes(bits, sizes, past, window, softcap, channels, seed):
  check(bits=bits, group=sizes[0], residual=sizes[1], past=past, window=window, softcap=softcap,
        channels=channels, seed=seed)  # fmt: skip


@pytest.mark.parametrize("window", [0, 1030])
def test_blocks_follow_one_another(window):
  check(bits=8, group=128, residual=128, past=800, length=1100, tokens=256, window=window,
        dtype=jnp.bfloat16)  # fmt: skip


def test_refusals():
  q = jnp.ones((1, 1, 2, 128))
  make = lambda channels=128, group=32, residual=32: cache.init(
    1, 1, 128, channels, group_size=group, residual=residual
  )
  assert tpu.unsupported(q, make(), None) == ""
  assert "takes no mask" in tpu.unsupported(q, make(), jnp.ones((1, 1)))
  assert "bfloat16 or float32, not float16" in tpu.unsupported(q.astype(jnp.float16), make(), None)
  assert "multiple of 128 channels, not 64" in tpu.unsupported(q, make(64), None)
  assert "groups of 16 or more, not 8" in tpu.unsupported(q, make(group=8), None)
  assert "a multiple of 16 last tokens, not 40" in tpu.unsupported(
    q, make(group=8, residual=40), None
  )
