# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest: brute force over the grid, fixed points, leaves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import formats, leaves, model, paths

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


def _nearest(units, table):
  return table[np.abs(units[..., None] - table).argmin(axis=-1)]


@pytest.mark.parametrize("shape", [(40, 6), (2, 40, 6)])
def test_mxfp4_by_definition(shape):
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  form = {"bits": 4, "group_size": 32, "format": "e2m1"}
  codes, grid = rtn.quantize(jnp.asarray(w), **form, scale_dtype="float8_e8m0fnu")
  table = formats.levels("e2m1", 4).astype(np.float64)
  got = np.asarray(grids.tensor(codes, grid, **form, store="float32").dense())
  for r in range(0, 40, 32):
    part = w[..., r : r + 32, :]
    shared = 2.0 ** (np.floor(np.log2(np.abs(part).max(axis=-2, keepdims=True))) - 2)
    np.testing.assert_allclose(got[..., r : r + 32, :], _nearest(part / shared, table) * shared)


def test_nvfp4_by_definition():
  w = np.random.default_rng(1).normal(size=(48, 6)).astype(np.float32)
  form = {"bits": 4, "group_size": 16, "format": "e2m1"}
  codes, grid = rtn.quantize(jnp.asarray(w), **form, scale_dtype="e4m3fn")
  leaf = grids.tensor(codes, grid, **form, store="float32")
  whole = np.abs(w).max() / 6 / 448
  peaks = np.abs(w).reshape(3, 16, 6).max(axis=1)
  scales = (peaks / 6 / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
  wide = np.repeat(scales, 16, axis=0)
  expected = _nearest(w / wide, formats.levels("e2m1", 4)) * wide
  np.testing.assert_allclose(leaf.dense(), expected, rtol=1e-5)
  assert leaves.bits_per_weight(leaf) == 4 + 8 / 16 + 32 / (48 * 6)


def test_quantized_scales_cost_little_and_change_little():
  w = jnp.asarray(np.random.default_rng(2).normal(size=(512, 64)).astype(np.float32))
  form = {"bits": 4, "group_size": 64, "format": "nf"}
  plain, double = (
    grids.tensor(*rtn.quantize(w, **form, scale_dtype=d), **form, store="float32")
    for d in ("float32", "int8")
  )
  error = [float(((x.dense() - w) ** 2).sum()) for x in (plain, double)]
  assert error[1] < 1.01 * error[0]
  # 8 bits a scale, and 32 + 8 for the range of 256 scales: QLoRA's 0.127 and a byte.
  assert leaves.bits_per_weight(double) == 4 + 8 / 64 + 40 / (64 * 256)


@pytest.mark.parametrize("size", [(40, 6), (1, 6), (40, 1), (16, 4), (1, 3)])
def test_tiles_of_any_shape_share_a_scale(size):
  w = np.random.default_rng(3).normal(size=(40, 6)).astype(np.float32)
  form = {"bits": 4, "group_size": size[0], "group_cols": size[1]}
  codes, grid = rtn.quantize(jnp.asarray(w), **form)
  got = np.asarray(grids.tensor(codes, grid, **form, store="float32").dense())
  for r in range(0, 40, size[0]):
    for c in range(0, 6, size[1]):
      tile = w[r : r + size[0], c : c + size[1]]
      scale = np.asarray(grid.scales)[r // size[0], c // size[1]]
      np.testing.assert_allclose(scale, np.abs(tile).max() / 7.5, rtol=1e-6)
      expected = np.clip(np.round(tile / scale), -8, 7) * scale
      np.testing.assert_allclose(got[r : r + size[0], c : c + size[1]], expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "bits", "size"), [("ternary", 2, 1.6), ("sign", 1, 1.0)])
def test_ternary_and_binary_cost_what_they_hold(name, bits, size):
  w = jnp.asarray(np.random.default_rng(4).normal(size=(40, 6)).astype(np.float32))
  (one,) = rtn.rtn(bits=bits, format=name, group_size=-1)
  m = model.Model(None, paths.nest({"layers/0:1/mlp/up/kernel": w[None]}))
  leaf = one.apply(m, {}, KEY).leaf(ADDRESS)
  assert leaves.bits_per_weight(leaf) == pytest.approx(size + 32 / 40)
  units = np.asarray(leaf.dense() / leaf.scales)
  levels = formats.levels(name, bits)
  expected = _nearest(np.asarray(w / leaf.scales), levels[np.isfinite(levels)])
  np.testing.assert_allclose(units, expected, atol=1e-6)
