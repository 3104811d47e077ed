# SPDX-License-Identifier: Apache-2.0
"""Grids: the fitting rules by hand, the range search, and the arguments' limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import grid as grids


def weights(rows, cols, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


def error(w, grid, bits, size):
  wide = grids.spread(grid, group_size=size, rows=w.shape[0])
  codes = grids.round_to(jnp.asarray(w), wide, bits=bits)
  wrong = np.asarray(grids.dequantize(codes, wide, bits=bits)) - w
  padded = np.pad(np.abs(wrong) ** grids.NORM, [(0, -w.shape[0] % size), (0, 0)])
  return padded.reshape(-1, size, w.shape[1]).sum(1)


def test_symmetric_rule():
  w = weights(10, 3)
  grid = grids.fit(jnp.asarray(w), bits=4, group_size=4, symmetric=True)
  expected = [np.abs(w[i : i + 4]).max(0) / 7.5 for i in (0, 4, 8)]
  np.testing.assert_allclose(grid.scales, expected, rtol=1e-6)
  assert grid.zeros is None


def test_asymmetric_rule_includes_zero():
  w = np.abs(weights(10, 3)) + 1
  grid = grids.fit(jnp.asarray(w), bits=3, group_size=10, symmetric=False)
  np.testing.assert_allclose(grid.scales[0], w.max(0) / 7, rtol=1e-6)
  assert (np.asarray(grid.zeros) == 0).all() and grid.zeros.dtype == jnp.uint8
  below = grids.fit(jnp.asarray(-w), bits=3, group_size=10, symmetric=False)
  assert (np.asarray(below.zeros) == 7).all()


def test_rounding_is_half_to_even_and_clips():
  w = jnp.array([0.5, 1.5, -0.5, -1.5, 2.5, 99.0, -99.0])
  grid = grids.Grid(jnp.ones(1), None)
  assert grids.round_to(w, grid, bits=3).tolist() == [4, 6, 4, 2, 6, 7, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_group_is_exact(symmetric):
  w = jnp.zeros((4, 2))
  grid = grids.fit(w, bits=4, group_size=4, symmetric=symmetric)
  assert (np.asarray(grid.scales) == 1).all()
  codes = grids.round_to(w, grid, bits=4)
  assert (np.asarray(grids.dequantize(codes, grid, bits=4)) == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_range_search_is_the_best_of_its_factors(symmetric):
  w, size = weights(22, 5), 8
  w[3] *= 8
  form = {"bits": 3, "group_size": size, "symmetric": symmetric}
  found = grids.fit(jnp.asarray(w), **form, mse=True)
  candidates = []
  for i in range(grids.STEPS):
    shrunk = np.asarray(w) * np.float32(1 - i / 100)
    candidates.append(error(w, grids.fit(jnp.asarray(shrunk), **form), 3, size))
  np.testing.assert_allclose(error(w, found, 3, size), np.min(candidates, 0), rtol=1e-4)
  assert (error(w, found, 3, size) < candidates[0]).any()


def test_scales_are_rounded_before_use():
  w = jnp.asarray(weights(8, 2))
  grid = grids.fit(w, bits=4, group_size=8, symmetric=False, scale_dtype="bfloat16")
  assert grid.scales.dtype == jnp.bfloat16
  assert (
    grids.fit(w.astype(jnp.float16), bits=4, group_size=8, symmetric=True).scales.dtype
    == jnp.float16
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"bits": 0}, "bits=0: the width of a code is a whole number from 1 to 8"),
    ({"bits": 1, "symmetric": True}, "bits=1: a symmetric grid of one bit"),
    ({"group_size": 0}, "group_size=0: groups have 1 row or more; -1 is one group a column"),
    ({"scale_dtype": "int7"}, "scale_dtype='int7': valid are float32, bfloat16, float16, float8"),
    ({"format": "e2m1", "bits": 3}, "format='e2m1' has codes of 4 bits, not 3"),
    ({"format": "nf", "symmetric": False}, "format='nf' has no zero points; use symmetric=True"),
    ({"group_cols": 0}, "group_cols=0: tiles have 1 column or more; -1 is all of them"),
  ],
)
def test_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    grids.check(**{"bits": 4, "group_size": 128, **arguments})
