# SPDX-License-Identifier: Apache-2.0
"""HQQ: the published algorithm in float64, what it minimises, and the figures of its package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import hqq
from treesurgeon.core import leaves, model

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"
RUN = jax.jit(hqq.quantize, static_argnames=("bits", "group_size", "iterations"))


def weights(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def published(w, bits, size, iterations=20, p=0.7, beta=10.0, kappa=1.01):
  """Follows mobiusml/hqq in float64; returns what the weights become."""
  x, top, least = w.astype(np.float64).reshape(-1, size, w.shape[1]), 2**bits - 1, np.inf
  s = (x.max(1, keepdims=True) - x.min(1, keepdims=True)) / top
  z = -x.min(1, keepdims=True) / s
  for _ in range(iterations):
    q = np.clip(np.round(x / s + z), 0, top)
    e = x - (q - z) * s
    shrunk = np.sign(e) * np.maximum(np.abs(e) - np.maximum(np.abs(e), 1e-12) ** (p - 1) / beta, 0)
    z, beta = (q - (x - shrunk) / s).mean(1, keepdims=True), beta * kappa
    if np.abs(e).mean() >= least:
      break
    least = np.abs(e).mean()
  return ((np.clip(np.round(x / s + z), 0, top) - z) * s).reshape(w.shape)


def made(w, bits, size, **how):
  codes, grid = RUN(jnp.asarray(w), bits=bits, group_size=size, **how)
  wide = grids.spread(grid, group_size=size, rows=w.shape[-2])
  return np.asarray(grids.dequantize(codes, wide, bits=bits))


@pytest.mark.parametrize(("bits", "scale"), [(2, 1.0), (4, 0.02), (4, 3.0)])
def test_the_published_iteration_in_float64(bits, scale):
  w = scale * weights(48, 6)
  got, expected = made(w, bits, 16), published(w, bits, 16)
  # A tie that float32 breaks otherwise changes a group by less than a step, and only that one.
  same = np.isclose(got, expected, atol=1e-4 * scale).reshape(3, 16, 6).all(axis=1)
  assert same.mean() >= 0.8
  errors = [((x - w) ** 2).sum() for x in (got, expected)]
  assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_it_gains_what_the_package_gains():
  # hqq 0.2.8 on a random network, groups of 128: squared errors of .0093, .0430 and .234 where
  # the min-max grid has .0099, .0456 and .250 of the squared weights, at 4, 3 and 2 bits.
  w = 0.02 * weights(256, 64, seed=1)
  for bits, ours, minmax in ((4, 0.0093, 0.0099), (3, 0.0430, 0.0456), (2, 0.234, 0.250)):
    errors = [((made(w, bits, 128, iterations=n) - w) ** 2).sum() for n in (20, 0)]
    assert errors[0] / errors[1] == pytest.approx(ours / minmax, rel=0.02)
    assert errors[0] / (w**2).sum() == pytest.approx(ours, rel=0.05)


def test_a_shorter_last_group_and_a_batch():
  w = weights(2, 40, 4)
  got = made(w, 3, 16)
  for i in range(2):
    np.testing.assert_allclose(got[i], made(w[i], 3, 16), atol=1e-5)
  s = (w[:, 32:].max(axis=1) - w[:, 32:].min(axis=1)) / 7
  assert (np.abs(got - w)[:, 32:] < s[:, None]).all()


def test_leaf():
  w = jnp.asarray(weights(2, 21, 4)).at[:, 8:16].set(0.5)  # a group of equal weights stays exact
  m = model.Model(None, {"layers": {"0:2": {"mlp": {"up": {"kernel": w}}}}})
  (one,) = hqq.hqq(group_size=8)
  leaf = one.apply(m, {}, KEY).leaf(ADDRESS)
  assert isinstance(leaf, leaves.QuantizedTensor) and leaf.zeros.dtype == jnp.float32
  np.testing.assert_array_equal(leaf.dense()[8:16], 0.5)
  again = one.apply(m.update({ADDRESS: leaf}), {}, KEY).leaf(ADDRESS)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)
  halves = one.apply(m.update({ADDRESS: w[0].astype(jnp.bfloat16)}), {}, KEY).leaf(ADDRESS)
  assert halves.zeros.dtype == halves.scales.dtype == halves.dtype == jnp.bfloat16


def test_what_is_rounded_is_rounded_with_what_is_stored():
  w = jnp.asarray(weights(16, 4))
  (one,) = hqq.hqq(bits=3, group_size=8, scale_dtype="bfloat16")
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": w[None]}}}}})
  leaf = one.apply(m, {}, KEY).leaf(ADDRESS)
  assert leaf.scales.dtype == leaf.zeros.dtype == jnp.bfloat16 and leaf.dtype == jnp.float32
  wide = grids.spread(grids.Grid(leaf.scales, leaf.zeros), group_size=8, rows=16)
  np.testing.assert_array_equal(leaf.integers(), grids.round_to(w, wide, bits=3))


def test_arguments_are_checked():
  with pytest.raises(ValueError, match=r"p=1.5: valid is above 0 up to 1"):
    hqq.hqq(p=1.5)
  with pytest.raises(ValueError, match=r"kappa=0.5.*kappa is 1 or more"):
    hqq.hqq(kappa=0.5)
  with pytest.raises(ValueError, match="scale_dtype='e4m3fn': valid are float32, bfloat16, float1"):
    hqq.hqq(scale_dtype="e4m3fn")
