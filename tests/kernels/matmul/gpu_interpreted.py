# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel, interpreted with race detection, equals float64; `gpu_test.py` starts this.

The interpreter blocks a thread of XLA's for each warpgroup, of which a small machine has too few;
their number is fixed when JAX first runs, so this has a process of its own.

It takes the tensor core's left operand from shared memory only, where weights are therefore put;
that they may stay in registers is for `gpu_ahead.py`, which needs the CUDA plugin, and
`gpu_device.py`, which needs a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.matmul import arg_specs, gpu, reference, stacked

SLOW = pytest.mark.slow
KEY = jax.random.key(1)
TARGET = "gpu-sm90"
BFLOAT16 = ml_dtypes.bfloat16
EXACT = 3e-5  # of the largest value: sums in float32
ROUNDED = 2e-3  # XLA on a CPU may keep what the interpreter told it to round


def interpreted(x, leaf, **more):
  """Multiply in interpret mode; fail on a race."""
  how = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
  with plgpu.force_gpu_interpret_mode(how):
    y = np.asarray(gpu.matmul(x, leaf, interpreted=True, **more), np.float64)
  assert not interpret_pallas_call.get_races().races_found
  return y


def exact(x, leaf, scaled):
  """Multiply in float64, the operands rounded as the kernel rounds them."""
  x = np.asarray(x).astype(np.float64)
  floats = dataclasses.replace(leaf, store="float32")
  fractions = leaf.zeros is not None and jnp.issubdtype(leaf.zeros.dtype, jnp.floating)
  if not scaled and not fractions:
    return x @ np.asarray(floats.dense(), np.float64)
  units = dataclasses.replace(floats, scales=jnp.ones_like(leaf.scales))
  units = np.asarray(units.dense()).astype(BFLOAT16).astype(np.float32)
  scales = np.asarray(leaf.spread(leaf.scales.astype(jnp.float32)))
  if scaled:
    return x @ (units * scales.astype(BFLOAT16)).astype(BFLOAT16).astype(np.float64)
  return x @ (units.astype(np.float64) * scales)


def check(spec, leaf=None, dtype=jnp.float32, tile=None):
  x, drawn = arg_specs.operands(dataclasses.replace(spec, dtype="bfloat16"), KEY)
  leaf = leaf or drawn
  ready = kernels.prepare(leaf, target=TARGET)
  scaled = spec.tokens > gpu.FEW and leaf.group_size < leaf.rows
  expected = exact(x, leaf, scaled)
  got = interpreted(x, ready, dtype=dtype, tile=tile)
  share = ROUNDED if scaled else EXACT if dtype == jnp.float32 else 4e-3
  np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max() + 1e-5)


@settings(max_examples=2, deadline=None)
@given(
  tokens=st.sampled_from((1, 3, 16, 70)),
  rows=st.integers(1, 500),
  cols=st.sampled_from((1, 7, 128, 200)),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((64, 128, 256, 10_000)),
  symmetric=st.booleans(),
)
def test_it_equals_float64(tokens, rows, cols, bits, group_size, symmetric):
  check(arg_specs.ArgSpec(tokens, rows, cols, bits, group_size, symmetric))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
  tokens=st.integers(1, 300),
  rows=st.integers(1, 2000),
  cols=st.integers(1, 600),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((64, 128, 256, 384, 1280, 10_000)),
  symmetric=st.booleans(),
)
def test_it_equals_float64_on_many_shapes(tokens, rows, cols, bits, group_size, symmetric):
  check(arg_specs.ArgSpec(tokens, rows, cols, bits, group_size, symmetric))


@pytest.mark.parametrize(
  ("tokens", "tile"),
  [
    (20, (16, 4, 128, 2, 2, 2)),  # sums of two blocks, tiles of tokens that overhang
    (3, (8, 2, 64, 8, 1, 3)),  # steps within a group
    pytest.param(9, (16, 2, 128, 1, 4, 2), marks=SLOW),
  ],
)
def test_tiles(tokens, tile):
  block = gpu._block()
  check(arg_specs.ArgSpec(tokens, 512, 256, 4, 256, False), tile=block.Tile(*tile))


def test_results_in_bfloat16():
  check(arg_specs.ArgSpec(5, 256, 128, 8, 256, False), dtype=jnp.bfloat16)


@pytest.mark.parametrize(
  ("format", "bits"),
  [("sign", 1), pytest.param("ternary", 2, marks=SLOW), pytest.param("e2m1", 4, marks=SLOW)],
)
def test_formats_whose_codes_are_not_centred(format, bits):
  spec = arg_specs.ArgSpec(3, 320, 16, bits)
  shapes = arg_specs.quantized(spec, format)
  codes = jax.random.randint(KEY, shapes.codes.shape, 0, 243).astype(jnp.uint8)
  scales = jax.random.uniform(KEY, shapes.scales.shape)
  check(spec, leaf=dataclasses.replace(shapes, codes=codes, scales=scales))


@pytest.mark.parametrize("tokens", [3, pytest.param(70, marks=SLOW)])
def test_zero_points_between_codes(tokens):
  spec = arg_specs.ArgSpec(tokens, 256, 8, 3, 64, symmetric=False)
  leaf = arg_specs.operands(spec, KEY)[1]
  check(spec, leaf=dataclasses.replace(leaf, zeros=leaf.zeros.astype(jnp.float32) + 0.375))


@pytest.mark.parametrize(
  ("bits", "group_size"),
  [(8, 128), (4, 300), pytest.param(4, 128, marks=SLOW), pytest.param(8, 300, marks=SLOW)],
)
def test_quantized_inputs(bits, group_size):
  weight = arg_specs.operands(arg_specs.ArgSpec(3, 300, 40, bits, group_size), KEY)[1]
  ready = kernels.prepare(leaves.ActivationQuantized(weight, None), target=TARGET).weight
  assert ready.inputs == "int8"
  units = jax.random.randint(KEY, (3, 300), -128, 128, jnp.int8)
  expected = np.asarray(units, np.float64) @ np.asarray(weight.dense(), np.float64)
  got = interpreted(units, ready)
  np.testing.assert_allclose(got, expected, rtol=0, atol=EXACT * np.abs(expected).max())


def test_a_layer_of_a_stack_is_read_where_it_lies():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, symmetric=False, dtype="bfloat16"), KEY)
  pair = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), leaf)
  ready = kernels.prepare(pair, target=TARGET)
  got = interpreted(x, stacked.LayerOf(ready, jnp.int32(1)))
  np.testing.assert_allclose(got, exact(x, leaf, scaled=False), rtol=1e-4, atol=1e-4)


def test_many_experts():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(2, 128, 8, dtype="bfloat16"), KEY)
  many = jax.tree.map(lambda a: jnp.stack([a, a[..., ::-1]]), (x, leaf))
  ready = kernels.prepare(many[1], target=TARGET)
  with plgpu.force_gpu_interpret_mode():
    got = jax.vmap(lambda x, w: gpu.matmul(x, w, interpreted=True))(many[0], ready)
  for i in range(2):
    each = jax.tree.map(lambda a, i=i: a[i], many)
    np.testing.assert_allclose(got[i], exact(*each, scaled=False), rtol=1e-4, atol=1e-4)


def test_gradients_reach_inputs_and_scales():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, dtype="bfloat16"), KEY)
  ready = kernels.prepare(leaf, target=TARGET)

  def product(x, scales, multiply):
    return multiply(x, dataclasses.replace(ready, scales=scales))

  with plgpu.force_gpu_interpret_mode():
    kernel = lambda x, w: gpu.matmul(x, w, interpreted=True)
    y, pull = jax.vjp(lambda *a: product(*a, kernel), x, ready.scales)
  expected = jax.vjp(lambda *a: product(*a, reference.matmul), x, ready.scales)[1]
  for got, wanted in zip(pull(y), expected(y), strict=True):
    assert got.dtype == wanted.dtype and np.abs(np.asarray(wanted, np.float32)).max() > 0
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
