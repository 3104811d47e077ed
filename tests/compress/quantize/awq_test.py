# SPDX-License-Identifier: Apache-2.0
"""AWQ's searches against numpy that tries everything, and what it does to a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.quantize import awq, rtn
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, model
from treesurgeon.run import collect, drivers, dry

FORM = {"bits": 3, "group_size": 8, "symmetric": False}
SPEC = models.Spec(
  vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_positions=16
)
TEXT = [np.random.default_rng(0).integers(0, 32, (4, 16))]
forward = jax.jit(models.forward, static_argnames=("spec",))


def problem():
  """Draws weights and inputs, two channels of which are large."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(100, 20)) @ rng.normal(size=(20, 20)) / 4
  x[:, [3, 11]] *= 20
  return rng.normal(size=(20, 12)).astype(np.float32), x


def nearest(w, scale_dtype=None):
  codes, grid = rtn.quantize(jnp.asarray(w, jnp.float32), **FORM, scale_dtype=scale_dtype)
  wide = grids.spread(grid, group_size=8, rows=len(w))
  return np.asarray(grids.dequantize(codes, wide, bits=3), np.float64)


@pytest.mark.parametrize("duo", [True, False])
def test_scales_are_the_best_of_the_grid(duo):
  w, x = problem()
  means = np.abs(x).mean(axis=0)
  parts = np.pad(np.abs(w), [(0, 4), (0, 0)]).reshape(3, 8, 12)
  share = (parts / parts.max(axis=1, keepdims=True)).reshape(24, 12)[:20].mean(axis=1)
  tried = [np.ones(20)]
  tried += [
    means**a / (share ** (1 - a) if duo else 1) for a in np.linspace(0, 1, 19 if duo else 20)
  ]
  tried = [s / np.sqrt(s.max() * s.min()) for s in tried]
  errors = [np.square(x @ (nearest(w * s[:, None]) / s[:, None] - w)).sum() for s in tried]
  search = jax.jit(functools.partial(awq.scale, form=FORM, duo_scaling=duo))
  got = search(w, jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(means, jnp.float32))
  np.testing.assert_allclose(got, tried[int(np.argmin(errors))], rtol=1e-2)
  assert min(errors) < 0.7 * errors[0]


@pytest.mark.parametrize("stored", [None, "float8_e8m0fnu"])
def test_clipping_is_the_best_of_the_grid(stored):
  w, x = problem()
  form = {**FORM, "scale_dtype": stored}
  got = np.asarray(awq.clip(jnp.asarray(w), jnp.asarray(x.T @ x, jnp.float32), form=form))
  for start in (0, 8, 16):
    rows = slice(start, min(start + 8, 20))
    top = np.abs(w[rows]).max(axis=0)
    tried = [np.clip(w[rows], -t * top, t * top) for t in 1 - np.arange(10) / 20]
    errors = [np.square(x[:, rows] @ (nearest(t, stored) - w[rows])).sum(axis=0) for t in tried]
    best = np.argmin(errors, axis=0)
    same = [np.allclose(got[rows, j], tried[best[j]][:, j], rtol=1e-6) for j in range(12)]
    assert np.mean(same) == 1
  assert (got != w).any()


@functools.cache
def planted():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  m = m.replace(params=jax.tree.map(lambda x: x * (5 if x.ndim == 3 else 1), m.params))
  gains = {a: m.leaf(a).at[jnp.array([3, 9])].set(20.0) for a in m.addresses() if "_norm/sc" in a}
  gains.pop("final_norm/scale")
  return m.update(gains)


def loss(m):
  params = jax.tree.map(leaves.dense, m.params, is_leaf=leaves.is_leaf)
  want = forward(SPEC, planted().params, TEXT[0]).logits
  return float(jnp.square(forward(SPEC, params, TEXT[0]).logits - want).mean())


def test_planted_channels_are_saved():
  materials = collect.Materials(batches=TEXT)
  form = {"bits": 3, "group_size": 8}
  plain = loss(drivers.run(rtn.rtn(**form, symmetric=False), planted()))
  both = drivers.run(awq.awq(**form), planted(), materials)
  assert loss(both) < 0.7 * plain
  fine = drivers.run(awq.awq(bits=8, group_size=8), planted(), materials)
  assert loss(fine) < 1e-3 * plain  # so what is folded leaves no trace
  for a in ("layers/0/attn_norm/scale", "layers/1/mlp_norm/scale"):
    gain = np.asarray(both.leaf(a) / planted().leaf(a))
    assert gain[[3, 9]].max() < np.median(gain), a
  again = drivers.run(awq.awq(**form), both, materials)
  for a in both.addresses():
    jax.tree.map(np.testing.assert_array_equal, again.leaf(a), both.leaf(a))


def test_scales_are_stored_as_asked():
  out = dry.dry_run(awq.awq(**FORM, scale_dtype="e4m3fn"), planted())
  scales = out.leaf("layers/1/mlp/up/kernel").scales
  assert isinstance(scales, leaves.QuantizedTensor) and scales.format == "e4m3fn"


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="bits=0"):
    awq.awq(bits=0)
  with pytest.raises(ValueError, match="scale_dtype='int7'"):
    awq.awq(scale_dtype="int7")
  with pytest.raises(ValueError, match="tears a feed apart"):
    drivers.run(awq.awq(select=".*/up/kernel"), planted(), collect.Materials(batches=TEXT))
