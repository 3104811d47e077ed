# SPDX-License-Identifier: Apache-2.0
"""A model runs prepared kernels with no code of its own, and reads packed bytes only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves, paths
from treesurgeon.experiments import bench_kernels
from treesurgeon.kernels import devices, static_cost

RTN = "compress.quantize.rtn(bits=4, group_size=128)"


def test_the_forward_pass_is_the_same_function():
  fn, (ready, tokens) = bench_kernels.forward("tpu-v5e", RTN)
  kinds = {type(a).__name__ for a in jax.tree.leaves(ready, is_leaf=leaves.is_leaf)}
  assert "PreparedTensor" in kinds and "QuantizedTensor" not in kinds
  got, expected = fn(ready, tokens), fn(kernels.restore(ready), tokens)
  np.testing.assert_allclose(got, expected, atol=0.03)
  assert jnp.abs(expected).max() > 0.5


def test_layers_apart_are_the_same_function():
  fn, (stacked, tokens) = bench_kernels.forward("tpu-v5e", RTN)
  _, (apart, _) = bench_kernels.forward("tpu-v5e", RTN, apart=True)
  assert list(apart["layers"]) == ["0:1", "1:2", "2:3"]
  np.testing.assert_allclose(fn(apart, tokens), fn(stacked, tokens), atol=0.03)
  again = paths.unflatten(paths.flatten(kernels.restore(apart)))
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(kernels.restore(stacked)), strict=True):
    np.testing.assert_array_equal(a, b)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in list(devices.DEVICES)[1:]]


@pytest.mark.parametrize("target", ["tpu-v5e", *OTHERS])
@pytest.mark.parametrize("bits", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_it_compiles_for_a_tpu_without_a_dense_kernel(target, bits):
  kwargs = {"target": target, "transform": RTN.replace("4", str(bits), 1)}
  program = "treesurgeon.experiments.bench_kernels:forward"
  (cost,) = static_cost.measure([static_cost.Request(program, kwargs, target)], profile=False)
  assert not cost.error
  # Layers are stacked, so each one's packed codes are sliced out, on v5p for both cores; a layer of
  # dense kernels would take twice as much.
  assert cost.temp_bytes < 4 * 256 * 256 + 3 * 256 * 512
