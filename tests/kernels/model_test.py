# SPDX-License-Identifier: Apache-2.0
"""A model runs prepared kernels with no code of its own, and reads packed bytes only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves
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


def test_a_layer_of_a_stack_is_its_matrix():
  _, (ready, _) = bench_kernels.forward("tpu-v5e", RTN)
  stack = ready["layers"]["0:3"]["attn"]["q"]["kernel"]
  x = jax.random.normal(jax.random.key(1), (2, 256), jnp.bfloat16)
  for implementation in (None, "reference"):
    for i in range(3):
      one = kernels.in_place(stack, kernels.hold(stack), jnp.int32(i))
      assert one.shape == (256, 256)
      got = kernels.matmul(x, one, implementation=implementation)
      expected = kernels.matmul(x, jax.tree.map(lambda a, i=i: a[i], stack))
      np.testing.assert_array_equal(got, expected)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in list(devices.DEVICES)[1:]]


@pytest.mark.parametrize("target", ["tpu-v5e", *OTHERS])
@pytest.mark.parametrize("bits", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_are_read_where_they_lie_on_a_tpu(target, bits):
  # A layer's kernels are 10 w^2 weights; a copy of the codes of any would be in the temporaries.
  width = 1024
  kwargs = {"target": target, "transform": RTN.replace("4", str(bits), 1), "width": width}
  program = "treesurgeon.experiments.bench_kernels:forward"
  (cost,) = static_cost.measure([static_cost.Request(program, kwargs, target)], profile=False)
  assert not cost.error
  assert cost.temp_bytes < 10 * width * width * bits / 8 / 4
