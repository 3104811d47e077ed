# SPDX-License-Identifier: Apache-2.0
"""Matrices that are fitted to a kernel come back bit for bit, and multiply as they did."""

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
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import arg_specs, fitted, fitting, prepared

KEY = jax.random.key(2)
BFLOAT16 = ml_dtypes.bfloat16


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def quantize(rows, cols, *, group_size, group_cols=1, bits=4, format="int", **more):
  """Quantize random weights by the library's own rules."""
  w = jax.random.normal(KEY, (rows, cols))
  form = {"bits": bits, "format": format}
  more = {"symmetric": True, **more}
  grid = grids.fit(w, group_size=group_size, group_cols=group_cols, **form, **more)
  tiles = {"group_size": group_size, "group_cols": group_cols}
  codes = grids.round_to(w, grids.spread(grid, rows=rows, cols=cols, **tiles), **form)
  return grids.tensor(codes, grid, store="float32", **tiles, **form)


def in_order_of_activations(leaf, seed=0):
  groups = np.arange(leaf.rows) // leaf.group_size
  index = np.random.default_rng(seed).permutation(groups).astype(np.int32)
  return dataclasses.replace(leaf, group_index=jnp.asarray(index)[None])


def multiply(x, ready):
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    y = np.asarray(kernels.matmul(x, ready, implementation="tpu"), np.float64)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  return y


def check(leaf, target, *, tokens=3, share=3e-5):
  """Compare with float64; `share` of the largest value is what rounding within may change."""
  x = jax.random.normal(KEY, (tokens, leaf.rows))
  ready = kernels.prepare(leaf, target=target)
  assert isinstance(ready, fitted.FittedTensor) and ready.shape == leaf.shape
  same(ready.restore(), leaf)
  rounded = np.asarray(x).astype(BFLOAT16).astype(np.float64)
  expected = rounded @ np.asarray(leaf.dense(), np.float64)
  got = multiply(x, ready)
  np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())
  elsewhere = kernels.matmul(x, ready)
  plain = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  np.testing.assert_allclose(elsewhere, plain, rtol=0, atol=3e-3 * np.abs(plain).max())
  assert kernels.prepare(ready, target=target) is ready
  other = kernels.prepare(ready, target="tpu7x")
  same(kernels.restore(other), leaf)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("group_size", [96, 40, slow(24), slow(200)])
def test_groups_of_other_sizes(group_size):
  check(arg_specs.operands(arg_specs.ArgSpec(1, 300, 9, 4, group_size, False), KEY)[1], "tpu-v5e")


def test_groups_longer_than_a_step():
  check(quantize(6800, 3, group_size=6400, bits=2), "tpu-v6e")


@pytest.mark.parametrize(("group_size", "symmetric"), [(64, False), slow(40, True)])
def test_rows_in_the_order_of_activations(group_size, symmetric):
  spec = arg_specs.ArgSpec(1, 300, 9, 4, group_size, symmetric)
  leaf = in_order_of_activations(arg_specs.operands(spec, KEY)[1])
  check(leaf, "tpu-v5e")
  pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), leaf, in_order_of_activations(leaf, seed=1))
  same(kernels.prepare(pair, target="tpu-v6e").restore(), pair)


def test_an_order_that_no_kernel_takes():
  leaf = arg_specs.operands(arg_specs.ArgSpec(1, 300, 9), KEY)[1]
  crowded = dataclasses.replace(leaf, group_index=jnp.zeros((1, 300), jnp.int32))
  assert kernels.prepare(crowded, target="tpu-v5e") is crowded
  within = jax.jit(lambda w: kernels.prepare(w, target="tpu-v5e").matrix.scales)(crowded)
  assert jnp.isnan(within).any()  # where it could not be refused, nothing is silently wrong


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_inputs(symmetric):
  leaf = quantize(300, 9, group_size=1, group_cols=9, symmetric=symmetric)
  x = jax.random.normal(KEY, (1, 3, 300))
  ready = kernels.prepare(leaf, target="tpu-v6e")
  same(ready.restore(), leaf)
  scaled = np.asarray(x[0] * leaf.scales.T).astype(BFLOAT16).astype(np.float64)
  units = dataclasses.replace(leaf, scales=jnp.ones_like(leaf.scales)).dense()
  expected = scaled @ np.asarray(units, np.float64)
  got = multiply(x, ready)[0]
  np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
  inputs = leaves.ActivationQuantized(leaf, None)
  ready = kernels.prepare(inputs, target="tpu-v6e")
  assert ready.weight.matrix.inputs == "bfloat16"
  np.testing.assert_allclose(
    kernels.matmul(x, ready), kernels.matmul(x, inputs), rtol=0, atol=0.01 * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  ("form", "target"),
  [
    ({"group_size": 128, "group_cols": 4, "bits": 8, "format": "e4m3fn"}, "tpu-v6e"),
    slow({"group_size": 300, "group_cols": 9, "bits": 8}, "tpu-v5e"),
    slow({"group_size": 32, "group_cols": 9, "symmetric": False}, "tpu7x"),
    ({"group_size": 16, "format": "e2m1", "scale_dtype": "e4m3fn"}, "tpu-v6e"),
    slow({"group_size": 16, "format": "e2m1", "scale_dtype": "e4m3fn"}, "tpu7x"),
    ({"group_size": 64, "scale_dtype": "int8"}, "tpu-v5p"),
  ],
)
def test_tiles_and_nested_scales(form, target):
  check(quantize(300, 9, **form), target)


def test_shared_exponents_are_plain_scales():
  leaf = quantize(300, 9, group_size=32, format="e2m1", scale_dtype="float8_e8m0fnu")
  ready = kernels.prepare(leaf, target="tpu-v6e")
  assert isinstance(ready, prepared.PreparedTensor) and ready.scales.dtype == jnp.bfloat16
  same(ready.restore(), leaf)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
  tokens=st.integers(1, 20),
  rows=st.integers(1, 900),
  cols=st.sampled_from((1, 7, 130)),
  bits=st.integers(1, 8),
  group_size=st.integers(8, 500),
  symmetric=st.booleans(),
  ordered=st.booleans(),
  target=st.sampled_from(sorted(devices.DEVICES)),
)
def test_any_groups(tokens, rows, cols, bits, group_size, symmetric, ordered, target):
  spec = arg_specs.ArgSpec(1, rows, cols, bits, group_size, symmetric)
  leaf = arg_specs.operands(spec, KEY)[1]
  leaf = in_order_of_activations(leaf) if ordered else leaf
  ready = kernels.prepare(leaf, target=target)
  same(kernels.restore(ready), leaf)
  x = jax.random.normal(KEY, (tokens, rows))
  expected = np.asarray(x).astype(BFLOAT16).astype(np.float64) @ np.asarray(leaf.dense(), float)
  # Weights in groups of 16 are rounded to bfloat16 on chips that compute with it.
  np.testing.assert_allclose(
    multiply(x, ready), expected, rtol=0, atol=5e-3 * np.abs(expected).max() + 1e-5
  )


def test_gradients_pass_the_fitting():
  leaf = in_order_of_activations(quantize(160, 9, group_size=40, symmetric=False))
  ready = kernels.prepare(leaf, target="tpu-v5e")
  x, g = jax.random.normal(KEY, (3, 160)), jax.random.normal(KEY, (3, 9))

  def loss(implementation, w):
    return jax.grad(lambda x: (kernels.matmul(x, w, implementation=implementation) * g).sum())(x)

  with pltpu.force_tpu_interpret_mode():
    got = loss("tpu", ready)
  want = loss("reference", leaf)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_layers_of_a_stack_are_read_in_place():
  leaf = in_order_of_activations(quantize(160, 9, group_size=40))
  stack = jax.tree.map(lambda a: jnp.stack([a, a[..., ::-1]]), leaf)
  ready = kernels.prepare({"w": stack}, target="tpu-v5e")
  x = jax.random.normal(KEY, (3, 160))

  def layer(carry, step):
    rest, i = step
    return carry, kernels.matmul(x, kernels.in_place(ready, rest, i)["w"])

  _, got = jax.lax.scan(layer, None, (kernels.hold(ready), jnp.arange(2)))
  for i in range(2):
    want = kernels.matmul(x, jax.tree.map(lambda a, i=i: a[i], stack), implementation="reference")
    np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("case", "chosen"),
  [
    ((4096, 128, 4), (128, 128)),
    ((4096, 16, 4), (16, 16)),
    ((4096, 96, 4), (96, 32)),
    ((4096, 100, 4), (128, 128)),
    ((4096, 40, 4), (64, 64)),
    ((4096, 10_000, 4), (10_000, 10_000)),
    ((28_672, 7168, 4), (7168, 3584)),
  ],
)
def test_runs_of_rows(case, chosen):
  assert fitting.runs(*case) == chosen
