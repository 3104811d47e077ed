# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU products with prepared matrices equal float64; it runs nowhere else.

pip install "jax[cuda13]" and then, since tests otherwise keep to the CPU:

TEST_PLATFORM=cuda python -P -m pytest tests/kernels/matmul/gpu_device_test.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import arg_specs

if devices.here() not in devices.GPUS:
  pytest.skip(f"it runs on {', '.join(devices.GPUS)} only", allow_module_level=True)

KEY = jax.random.key(2)
CLOSE = 1e-2  # of the largest value: operands and results in bfloat16
SHAPES = ((128, 128), (1000, 200), (4096, 4096), (14336, 4096))


def exact(x, leaf):
  dense = dataclasses.replace(leaf, store="float32").dense()
  return np.asarray(x, np.float64) @ np.asarray(dense, np.float64)


def close(got, expected):
  assert np.isfinite(np.asarray(got, np.float64)).all()
  largest = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=CLOSE * largest)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [64, 128, 1024, 20_000])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_float64(shape, symmetric, group_size, bits):
  for tokens in (1, 7, 16, 33, 64, 65, 130, 1000):
    spec = arg_specs.ArgSpec(tokens, *shape, bits, group_size, symmetric, "bfloat16")
    x, leaf = arg_specs.operands(spec, KEY)
    ready = kernels.prepare(leaf)
    product = jax.jit(lambda x, w: kernels.matmul(x, w, implementation="mosaic_gpu"))
    got = [product(x, ready) for _ in range(3)]
    close(got[0], exact(x, leaf))
    for again in got[1:]:  # nothing depends on the order in which blocks end
      np.testing.assert_array_equal(np.asarray(got[0]), np.asarray(again))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, 4096])
@pytest.mark.parametrize("tokens", [1, 16, 100, 2048])
def test_quantized_inputs(tokens, group_size, bits):
  x, weight = arg_specs.operands(
    arg_specs.ArgSpec(tokens, 4096, 1024, bits, group_size, dtype="bfloat16"), KEY
  )
  leaf = leaves.ActivationQuantized(weight, None)
  ready = kernels.prepare(leaf)
  assert ready.weight.inputs == "int8"
  scales = leaf.scales_of(x)
  units = np.asarray(leaf.codes_of(x, scales), np.float64)
  close(jax.jit(kernels.matmul)(x, ready), exact(units * np.asarray(scales, np.float64), weight))


def test_stacked_layers_and_experts():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(4, 512, 256, dtype="bfloat16"), KEY)
  pairs = jax.tree.map(lambda a: jnp.stack([a, a[..., ::-1], a]), (x, leaf))
  ready = kernels.prepare(pairs[1])
  mapped = jax.jit(jax.vmap(kernels.matmul))(pairs[0], ready)
  scan = lambda x, w: jax.lax.scan(lambda c, pair: (c, kernels.matmul(*pair)), None, (x, w))[1]
  scanned = jax.jit(scan)(pairs[0], ready)
  for i in range(3):
    one = jax.tree.map(lambda a, i=i: a[i], pairs)
    close(mapped[i], exact(*one))
    close(scanned[i], exact(*one))


def test_gradients_reach_the_inputs():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(16, 512, 256, dtype="bfloat16"), KEY)
  g = jax.random.normal(KEY, (16, 256), jnp.bfloat16)
  dx = jax.vjp(lambda x: kernels.matmul(x, kernels.prepare(leaf)), x)[1](g)[0]
  dense = np.asarray(dataclasses.replace(leaf, store="float32").dense(), np.float64)
  close(dx, np.asarray(g, np.float64) @ dense.T)
