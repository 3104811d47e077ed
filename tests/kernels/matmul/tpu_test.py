# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel: interpreted with race detection it equals float64; under the transformations."""

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
from treesurgeon.kernels.matmul import api, arg_specs, reference, tpu, tpu_transposed

KEY = jax.random.key(1)
BFLOAT16 = ml_dtypes.bfloat16
EXACT = 3e-5  # of the largest value: sums in float32
# Where the kernel rounds within to bfloat16, XLA on a CPU may keep what the interpreter told it to
# round, which a TPU cannot.
ROUNDED = 2e-3


def interpreted(x, leaf, **more):
  """Multiply in interpret mode; fail on a race."""
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    y = np.asarray(tpu.matmul(x, leaf, **more), np.float64)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  return y


def exact(x, leaf, scaled):
  """Multiply in float64, the operands rounded as the kernel rounds them."""
  x = np.asarray(x).astype(BFLOAT16).astype(np.float64)
  if not scaled:
    return x @ np.asarray(dataclasses.replace(leaf, store="float32").dense(), np.float64)
  units = dataclasses.replace(leaf, scales=jnp.ones_like(leaf.scales), store="float32")
  units = np.asarray(units.dense()).astype(BFLOAT16)
  scales = np.asarray(leaf.spread(leaf.scales.astype(jnp.float32))).astype(BFLOAT16)
  w = (units.astype(np.float32) * scales.astype(np.float32)).astype(BFLOAT16)
  return x @ w.astype(np.float64)


def check(spec, target, format="int", leaf=None):
  x, drawn = arg_specs.operands(spec, KEY)
  leaf = leaf or drawn
  ready = kernels.prepare(leaf, target=target)
  block = tpu.blocks(spec.tokens, ready)
  scaled = tpu.scales_weights(block[0], ready)
  expected = exact(x, leaf, scaled)
  got = interpreted(x, ready)
  share = ROUNDED if scaled else EXACT
  np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max() + 1e-5)


@settings(max_examples=4, deadline=None)
@given(
  tokens=st.sampled_from((1, 3, 16, 100)),
  rows=st.integers(1, 700),
  cols=st.sampled_from((1, 7, 128, 200)),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((16, 32, 64, 128, 256, 10_000)),
  symmetric=st.booleans(),
  target=st.sampled_from(sorted(devices.DEVICES)),
)
def test_it_equals_float64(tokens, rows, cols, bits, group_size, symmetric, target):
  check(arg_specs.ArgSpec(tokens, rows, cols, bits, group_size, symmetric), target)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
  tokens=st.integers(1, 300),
  rows=st.integers(1, 2000),
  cols=st.integers(1, 600),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((16, 32, 64, 128, 256, 384, 1280, 10_000)),
  symmetric=st.booleans(),
  target=st.sampled_from(sorted(devices.DEVICES)),
)
def test_it_equals_float64_on_many_shapes(tokens, rows, cols, bits, group_size, symmetric, target):
  check(arg_specs.ArgSpec(tokens, rows, cols, bits, group_size, symmetric), target)


@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
def test_a_layer_is_read_out_of_its_stack(target):
  spec = arg_specs.ArgSpec(3, 300, 40, 4, 64)
  x, _ = arg_specs.operands(spec, KEY)
  made = [arg_specs.operands(spec, jax.random.key(i))[1] for i in range(3)]
  stack = kernels.prepare(jax.tree.map(lambda *a: jnp.stack(a), *made), target=target)
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

  def body(h, xs):
    rest, i = xs
    one = kernels.in_place(stack, rest, i)
    return h, kernels.matmul(x, one, implementation="tpu")

  with pltpu.force_tpu_interpret_mode(params):
    got = jax.lax.scan(body, 0, (kernels.hold(stack), jnp.arange(3)))[1]
  for y, leaf in zip(got, made, strict=True):
    expected = exact(x, leaf, False)
    np.testing.assert_allclose(y, expected, rtol=0, atol=EXACT * np.abs(expected).max() + 1e-5)


def test_gradients_through_a_layer_of_a_stack():
  spec = arg_specs.ArgSpec(3, 300, 40, 4, 64)
  x, leaf = arg_specs.operands(spec, KEY)
  stack = kernels.prepare(jax.tree.map(lambda a: jnp.stack([a, a]), leaf), target="tpu-v5e")
  one = kernels.in_place(stack, kernels.hold(stack), jnp.int32(1))
  loss = lambda x, leaf: (kernels.matmul(x, leaf, implementation="tpu") ** 2).sum()
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    got = jax.grad(loss)(x, one)
    expected = jax.grad(loss)(x, one.take())
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("tokens", "target"), [(2, "tpu-v5e"), (128, "tpu7x")])
@pytest.mark.parametrize(("format", "bits"), [("ternary", 2), ("sign", 1)])
def test_formats_of_few_values(format, bits, tokens, target):
  spec = arg_specs.ArgSpec(tokens, 320, 16, bits)
  shapes = arg_specs.quantized(spec, format)
  codes = jax.random.randint(KEY, shapes.codes.shape, 0, 243).astype(jnp.uint8)
  scales = jax.random.uniform(KEY, shapes.scales.shape)
  check(spec, target, leaf=dataclasses.replace(shapes, codes=codes, scales=scales))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantized_inputs(bits):
  spec = arg_specs.ArgSpec(3, 300, 40, bits, symmetric=bits == 4)
  x, weight = arg_specs.operands(spec, KEY)
  leaf = leaves.ActivationQuantized(weight, None)
  ready = kernels.prepare(leaf, target="tpu-v6e")
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    got = kernels.matmul(x, ready, implementation="tpu")
  scales = leaf.scales_of(x)
  units = np.asarray(leaf.codes_of(x, scales), np.float64)
  expected = units @ np.asarray(weight.dense(), np.float64) * np.asarray(scales, np.float64)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  elsewhere = kernels.matmul(x, ready)
  np.testing.assert_allclose(elsewhere, kernels.matmul(x, leaf), rtol=1e-5, atol=1e-5)


def test_steps_over_rows_add_up():
  spec = arg_specs.ArgSpec(2, 8 * 1024, 40, 2, symmetric=False)
  leaf = kernels.prepare(arg_specs.operands(spec, KEY)[1], target="tpu-v5e")
  assert leaf.steps > 1
  check(spec, "tpu-v5e")


def test_zero_points_between_codes():
  spec = arg_specs.ArgSpec(3, 256, 8, 3, 64, symmetric=False)
  leaf = arg_specs.operands(spec, KEY)[1]
  leaf = dataclasses.replace(leaf, zeros=leaf.zeros.astype(jnp.float32) + 0.375)
  check(spec, "tpu-v6e", leaf=leaf)
  check(dataclasses.replace(spec, tokens=128), "tpu-v6e", leaf=leaf)


def small(**more):
  spec = arg_specs.ArgSpec(3, 256, 8, dtype="bfloat16", **more)
  x, leaf = arg_specs.operands(spec, KEY)
  return x, leaf, kernels.prepare(leaf, target="tpu-v5e")


def test_matmul_takes_a_prepared_leaf_on_any_platform():
  x, leaf, ready = small()
  y = jax.jit(kernels.matmul)(x, ready)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, kernels.matmul(x, leaf, implementation="reference"))
  total = leaves.Sum((ready, jnp.ones((256, 8), jnp.bfloat16)))
  np.testing.assert_allclose(
    kernels.matmul(x, total).astype(jnp.float32),
    kernels.matmul(x, leaves.Sum((leaf, total.parts[1]))).astype(jnp.float32),
    rtol=2e-2,
  )


def test_gradients_reach_inputs_scales_and_zeros():
  x, leaf, ready = small(symmetric=False, bits=2)
  g = jax.random.normal(KEY, (3, 8))

  def loss(product, x, scales, zeros):
    return (product(x, dataclasses.replace(ready, scales=scales, zeros=zeros)) * g).sum()

  at = (x.astype(jnp.float32), ready.scales, ready.zeros)
  with pltpu.force_tpu_interpret_mode():
    got = jax.grad(lambda *a: loss(tpu.matmul, *a), (0, 1, 2))(*at)
  want = jax.grad(lambda *a: loss(reference.matmul, *a), (0, 1, 2))(*at)
  for a, b in zip(got, want, strict=True):
    b = b.astype(jnp.float32)  # the kernel rounds g times the scale to bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1e-2, atol=1e-2 * jnp.abs(b).max())


@pytest.mark.parametrize(
  ("rows", "cols", "bits", "group_size", "symmetric", "target"),
  [
    (300, 200, 4, 128, False, "tpu-v6e"),
    (256, 640, 2, 32, True, "tpu-v5e"),
    (6272, 128, 1, 256, True, "tpu-v5p"),
    (4096, 128, 4, 128, True, "tpu-v5p"),  # two blocks of rows
    (200, 100, 8, 200, False, "tpu7x"),
  ],
)
def test_the_transposed_product_equals_float64(rows, cols, bits, group_size, symmetric, target):
  spec = arg_specs.ArgSpec(3, rows, cols, bits, group_size, symmetric)
  leaf = arg_specs.operands(spec, KEY)[1]
  ready = kernels.prepare(leaf, target=target)
  g = jax.random.normal(KEY, (3, cols))
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    got = tpu_transposed.matmul(g, ready, dtype=jnp.float32, width=256)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  units = np.asarray(dataclasses.replace(leaf, scales=jnp.ones_like(leaf.scales)).dense())
  scales = np.asarray(jnp.broadcast_to(leaf.spread(leaf.scales), (rows, cols)))
  scaled = (np.asarray(g)[:, None] * scales[None]).astype(BFLOAT16).astype(np.float64)
  expected = (scaled * units[None]).sum(axis=-1)
  np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDED * np.abs(expected).max())
  with pltpu.force_tpu_interpret_mode(params):
    got = tpu_transposed.matmul(g, ready, dtype=jnp.float32, width=128, pre=True)
  w = (units.astype(np.float32) * scales.astype(BFLOAT16).astype(np.float32)).astype(BFLOAT16)
  expected = np.asarray(g).astype(BFLOAT16).astype(np.float64) @ w.astype(np.float64).T
  np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDED * np.abs(expected).max())


def test_stacked_layers():
  # The interpreter does not take vmap; ahead_test.py compiles it.
  x, _, ready = small(bits=3)
  pairs = jax.tree.map(lambda a: jnp.stack([a, a[..., ::-1]]), (x, ready))
  with pltpu.force_tpu_interpret_mode():
    scanned = jax.lax.scan(lambda c, pair: (c, tpu.matmul(*pair)), None, pairs)[1]
  for i in range(2):
    each = jax.tree.map(lambda a, i=i: a[i], pairs)
    expected = exact(each[0], each[1].restore(), scaled=False)
    np.testing.assert_allclose(scanned[i], expected, rtol=1e-4, atol=1e-4)


def test_refusals():
  x, leaf, ready = small()
  with pytest.raises(ValueError, match="'tpu' cannot.*made for a TPU, not QuantizedTensor; supp"):
    kernels.matmul(x, leaf, implementation="tpu")
  with pytest.raises(ValueError, match=r"'tpu' cannot.*bfloat16 or float32, not float16; suppor"):
    kernels.matmul(x.astype(jnp.float16), ready, implementation="tpu")
  with pytest.raises(ValueError, match=r"'tpu' cannot.*at least one token"):
    kernels.matmul(x[:0], ready, implementation="tpu")
  assert api.supported(x, ready) == ["tpu", "reference"]
  assert kernels.matmul(x[:0], ready).shape == (0, 8)


@pytest.mark.parametrize(
  ("format", "shape", "block"),
  [
    ("int4", (7, 512, 100), (7, 128)),
    ("int4", (7, 512, 384), (7, 128)),
    ("int4", (1000, 4096, 28672), (256, 1024)),
    ("int4", (1, 4096, 14336), (1, 2048)),
    ("int8", (1, 4096, 14336), (1, 1664)),
  ],
)
def test_blocks(format, shape, block):
  _, (_, leaf) = arg_specs.product(format, *shape, 128, "tpu7x")
  assert tpu.blocks(shape[0], leaf) == block


@pytest.mark.parametrize(("format", "bits"), [("e2m1", 4), ("e2m3", 6)])
def test_formats_of_equal_steps(format, bits):
  spec = arg_specs.ArgSpec(3, 300, 130, bits, 32)
  leaf = dataclasses.replace(arg_specs.operands(spec, KEY)[1], format=format)
  check(spec, "tpu-v6e", leaf=leaf)
  check(dataclasses.replace(spec, tokens=100), "tpu-v6e", leaf=leaf)


def test_small_groups_have_sums_of_their_own():
  check(arg_specs.ArgSpec(3, 300, 130, 2, 32, symmetric=False), "tpu-v5e")
