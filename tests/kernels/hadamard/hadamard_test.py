# SPDX-License-Identifier: Apache-2.0
"""The transform on a TPU: interpreted with race detection it equals float64; it compiles ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from treesurgeon.core import hadamard
from treesurgeon.kernels import devices, static_cost
from treesurgeon.kernels.hadamard import api, tpu


def interpreted(fn, *args):
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    y = fn(*args)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  return y


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((3, 128), "float32"),
    ((2, 9, 512), "bfloat16"),
    ((40, 1024), "float32"),
  ],
)
def test_it_equals_float64(shape, dtype, monkeypatch):
  monkeypatch.setattr(tpu, "BLOCK", 16 * shape[-1])  # several blocks, the last one not full
  x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
  got = interpreted(lambda x: api.transform(x, implementation="tpu"), x)
  assert got.dtype == x.dtype
  h = np.asarray(hadamard.matrix(shape[-1]), np.float64)
  expected = np.asarray(x, np.float64) @ h
  atol = 2e-6 if dtype == "float32" else 2.0**-8 * np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=atol)


def test_gradients_and_scans():
  x, g = jax.random.normal(jax.random.key(1), (2, 4, 256))
  got = interpreted(lambda x: jax.vjp(tpu.transform, x)[1](g)[0], x)
  np.testing.assert_allclose(got, hadamard.transform(g), atol=1e-5)
  scanned = interpreted(lambda x: jax.lax.scan(lambda c, x: (c, tpu.transform(x)), 0, x)[1], x)
  np.testing.assert_allclose(scanned, hadamard.transform(x), atol=1e-5)


def test_elsewhere_it_is_the_plain_transform():
  for x in (jnp.ones((2, 256)), jnp.ones((2, 96)), jnp.ones((0, 256)), jnp.ones(256, jnp.float16)):
    np.testing.assert_array_equal(api.transform(x), hadamard.transform(x))


def test_refusals():
  with pytest.raises(ValueError, match=r"'tpu' cannot transform float32\[2, 96\]: it takes powers"):
    api.transform(jnp.ones((2, 96)), implementation="tpu")
  with pytest.raises(ValueError, match="not float16; supported: xla"):
    api.transform(jnp.ones((2, 256), jnp.float16), implementation="tpu")
  with pytest.raises(ValueError, match="'gpu' cannot .* it is unknown; supported: tpu, xla"):
    api.transform(jnp.ones((2, 256)), implementation="gpu")


@pytest.mark.parametrize("target", devices.DEVICES)
def test_it_compiles(target):
  program = "treesurgeon.kernels.hadamard.arg_specs:transform"
  kwargs = {"tokens": 300, "n": 1024, "dtype": "float32"}
  requests = [static_cost.Request(program, kwargs, target)]
  for cost in static_cost.measure(requests, profile=False):
    assert not cost.error and cost.temp_bytes <= 2 * 128 * 128, cost
