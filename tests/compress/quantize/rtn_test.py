# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest: brute force over the grid, fixed points, leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, model

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"


def weights(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def toy(w):
  return model.Model(None, {"layers": {"0:2": {"mlp": {"up": {"kernel": w}}}}})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_grid_points(bits, symmetric):
  w = weights(21, 4)
  codes, grid = rtn.quantize(w, bits=bits, group_size=8, symmetric=symmetric)
  scales = np.repeat(np.asarray(grid.scales, np.float64), 8, 0)[:21]
  zeros = 2 ** (bits - 1) if symmetric else np.repeat(np.asarray(grid.zeros, int), 8, 0)[:21]
  points = (np.arange(2**bits)[:, None, None] - zeros) * scales
  distance = np.abs(points - np.asarray(w, np.float64))
  chosen = np.take_along_axis(distance, np.asarray(codes, int)[None], 0)[0]
  np.testing.assert_allclose(chosen, distance.min(0), atol=1e-6)


@pytest.mark.parametrize("group_size", [-1, 1000, 21, 8])
def test_leaf(group_size):
  w = weights(2, 21, 4)
  out = rtn.rtn(group_size=group_size)[0].apply(toy(w), {}, KEY)
  leaf = out.leaf(ADDRESS)
  assert leaf.group_size == (8 if group_size == 8 else 21)
  assert leaf.scales.shape == (3 if group_size == 8 else 1, 4)
  codes, grid = rtn.quantize(w[0], bits=4, group_size=leaf.group_size)
  np.testing.assert_array_equal(leaf.integers(), codes)
  wide = grids.spread(grid, group_size=leaf.group_size, rows=21)
  np.testing.assert_array_equal(leaf.dense(), grids.dequantize(codes, wide, bits=4))


def test_group_size_of_bits_per_weight():
  leaf = rtn.rtn(scale_dtype="float16")[0].apply(toy(weights(2, 256, 64)), {}, KEY).leaf(ADDRESS)
  assert leaves.bits_per_weight(leaf) == 4 + 16 / 128


@pytest.mark.parametrize("symmetric", [True, False])
def test_own_result_is_a_fixed_point(symmetric):
  once = rtn.rtn(symmetric=symmetric)[0].apply(toy(weights(2, 21, 4)), {}, KEY)
  twice = rtn.rtn(symmetric=symmetric)[0].apply(once, {}, KEY)
  jax.tree.map(np.testing.assert_array_equal, once.params, twice.params)
  other = rtn.rtn(bits=3, symmetric=symmetric)[0].apply(once, {}, KEY)
  assert other.leaf(ADDRESS).bits == 3


def test_asymmetric_grid_reproduces_values_on_it():
  w = weights(64, 4)
  codes, grid = rtn.quantize(w, bits=4, group_size=16, symmetric=False)
  on_grid = grids.dequantize(codes, grids.spread(grid, group_size=16, rows=64), bits=4)
  again, grid_again = rtn.quantize(on_grid, bits=4, group_size=16, symmetric=False)
  np.testing.assert_array_equal(again, codes)
  np.testing.assert_array_equal(grid_again.zeros, grid.zeros)
  np.testing.assert_allclose(grid_again.scales, grid.scales, rtol=1e-6)


def test_shapes_are_known_without_work():
  apply = rtn.rtn()[0].apply

  def params(w):
    return apply(toy(w), {}, KEY).params

  w = weights(2, 21, 4)
  shapes, real = jax.eval_shape(params, w), params(w)
  assert jax.tree.structure(shapes) == jax.tree.structure(real)
  assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(real)]


def test_dtype_is_kept():
  out = rtn.rtn()[0].apply(toy(weights(2, 16, 4).astype(jnp.bfloat16)), {}, KEY).leaf(ADDRESS)
  assert out.dtype == jnp.bfloat16 and out.scales.dtype == jnp.bfloat16


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="bits=9"):
    rtn.rtn(bits=9)
