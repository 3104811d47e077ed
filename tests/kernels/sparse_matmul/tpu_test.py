# SPDX-License-Identifier: Apache-2.0
"""N:M weights on a TPU: arranged and restored bit for bit, multiplied as float64 does."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.sparse_matmul import arg_specs, prepared, tpu

KEY = jax.random.key(5)
PATTERNS = ((1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (2, 8), (4, 8), (1, 9), (1, 16))


def same(a, b):
  assert leaves.signature(a) == leaves.signature(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def interpreted(x, leaf, **more):
  """Multiply in interpret mode; fail on a race."""
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    y = np.asarray(tpu.matmul(x, leaf, **more), np.float64)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  return y


def check(leaf, tokens, target="tpu-v6e"):
  ready = kernels.prepare(leaf, target=target)
  assert isinstance(ready, prepared.PreparedSparse)
  same(kernels.restore(ready), leaf)
  x = jax.random.normal(KEY, (tokens, leaf.rows))
  rounded = np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)
  expected = rounded @ np.asarray(leaf.dense(), np.float64)
  got = interpreted(x, ready)
  np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize(
  ("pattern", "runs", "cols", "bits", "tokens"),
  [
    ((2, 4), 300, 7, 8, 3),
    ((4, 8), 100, 130, 0, 1),
    pytest.param((1, 9), 20, 3, 0, 2, marks=pytest.mark.slow),
  ],
)
def test_it_equals_float64(pattern, runs, cols, bits, tokens):
  n, m = pattern
  check(arg_specs.sparse(runs * m, cols, n, m, key=KEY, bits=bits), tokens)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
  pattern=st.sampled_from(PATTERNS),
  runs=st.integers(1, 3000),
  cols=st.integers(1, 600),
  bits=st.sampled_from((0, 0, 2, 4, 8)),
  tokens=st.integers(1, 300),
  target=st.sampled_from(sorted(devices.DEVICES)),
)
def test_it_equals_float64_on_many_shapes(pattern, runs, cols, bits, tokens, target):
  n, m = pattern
  bits = bits if n * (m - n) <= 8 else 0
  check(arg_specs.sparse(runs * m, cols, n, m, key=KEY, bits=bits), tokens, target)


@pytest.mark.parametrize(
  "rows",
  [1024, pytest.param(12 * 512, marks=pytest.mark.slow)],  # of one step and of several
)
def test_groups_of_values(rows):
  check(arg_specs.sparse(rows, 9, 2, 4, key=KEY, bits=8, group_size=512), 2)


def test_stacked_layers_and_other_devices():
  one, two = (arg_specs.sparse(64, 5, 2, 4, key=k, bits=8) for k in jax.random.split(KEY))
  stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
  ready = kernels.prepare({"w": stacked}, target="tpu-v5e")["w"]
  assert ready.shape == (2, 64, 5) and ready.dtype == jnp.float32
  same(ready.restore(), stacked)
  np.testing.assert_array_equal(ready.dense(), stacked.dense())
  assert kernels.prepare(ready, target="tpu-v5e") is ready
  assert kernels.prepare(ready, target="tpu7x").target == "tpu7x"
  x = jax.random.normal(KEY, (2, 3, 64))
  with pltpu.force_tpu_interpret_mode():
    scanned = jax.lax.scan(lambda c, pair: (c, tpu.matmul(*pair)), None, (x, ready))[1]
  elsewhere = jax.vmap(kernels.matmul)(x, ready)
  np.testing.assert_allclose(scanned, elsewhere, rtol=2e-2, atol=2e-2)


def test_patterns_that_lose_are_made_dense_at_load():
  leaf = arg_specs.sparse(64, 5, 4, 8, key=KEY)
  ready = kernels.prepare([leaf], target="tpu7x")[0]
  assert isinstance(ready, prepared.Expanded) and ready.shape == (64, 5)
  same(kernels.restore(ready), leaf)
  x = jax.random.normal(KEY, (2, 64))
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  np.testing.assert_allclose(kernels.matmul(x, ready), expected, rtol=1e-5, atol=1e-4)
  np.testing.assert_array_equal(ready.dense(), leaf.dense())
  assert isinstance(kernels.prepare(ready, target="tpu-v6e"), prepared.PreparedSparse)


def by_dense(x, leaf):
  return x @ leaf.dense().astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "field"), [(0, "values"), (8, "scales")])
def test_gradients_reach_inputs_values_and_scales(bits, field):
  g, x = jax.random.normal(KEY, (3, 5)), jax.random.normal(KEY, (3, 64))
  leaf = kernels.prepare(arg_specs.sparse(64, 5, 2, 4, key=KEY, bits=bits), target="tpu-v6e")

  def loss(product, x, part):
    return (product(x, dataclasses.replace(leaf, **{field: part})) * g).sum()

  at = (x, getattr(leaf, field))
  with pltpu.force_tpu_interpret_mode():
    got = jax.grad(lambda *a: loss(tpu.matmul, *a), (0, 1))(*at)
  want = jax.grad(lambda *a: loss(by_dense, *a), (0, 1))(*at)
  for a, b in zip(got, want, strict=True):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * np.abs(b).max())


def test_what_no_kernel_takes():
  for leaf, reason in (
    (arg_specs.sparse(64, 3, 4, 8, key=KEY, bits=8), r"N \(M - N\) up to 8, not 4:8"),
    (arg_specs.sparse(64, 3, 1, 32, key=KEY), r"N \(M - N\) up to 16, not 1:32"),
    (arg_specs.sparse(64, 3, 2, 4, key=KEY, bits=8, group_size=16), "256 kept rows.*or one, not"),
  ):
    assert kernels.prepare(leaf, target="tpu-v6e") is leaf
    with pytest.raises(ValueError, match=f"'tpu' cannot.*prepare leaves this one.*{reason}"):
      kernels.matmul(jnp.ones((1, 64)), leaf, implementation="tpu")
  ready = kernels.prepare(arg_specs.sparse(64, 3, 2, 4, key=KEY), target="tpu-v6e")
  with pytest.raises(ValueError, match="bfloat16 or float32, not float16"):
    kernels.matmul(jnp.ones((1, 64), jnp.float16), ready, implementation="tpu")
  assert "at least one token" in tpu.unsupported(jnp.ones((0, 64)), ready)
  assert "on a TPU only" in prepared.unsupported(ready.restore(), target="gpu-sm90")
