# SPDX-License-Identifier: Apache-2.0
"""decoupleQ: the exact scales of given codes, errors that only fall, better than GPTQ at 2 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.quantize import decoupleq, gptq
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

RUN = jax.jit(decoupleq.quantize, static_argnames=("bits", "group_size", "rounds", "scale_dtype"))


def problem(rows=40, cols=12, seed=0):
  rng = np.random.default_rng(seed)
  w, x = rng.normal(size=(rows, cols)), rng.normal(size=(300, rows)) @ rng.normal(size=(rows, rows))
  return w.astype(np.float32), (x.T @ x / 300).astype(np.float32)


def lost(w, h, q):
  d = np.asarray(q, np.float64) - w
  return (d * (np.asarray(h, np.float64) @ d)).sum(axis=0)


@pytest.mark.parametrize("size", [40, 16])
def test_scales_and_zero_points_are_those_of_least_squares(size):
  w, h = problem()
  codes = np.random.default_rng(1).integers(0, 4, w.shape)
  solve = functools.partial(decoupleq.solve, group_size=size, store="float32")
  grid = jax.jit(solve)(jnp.asarray(codes, jnp.float32), jnp.asarray(w), jnp.asarray(h))
  root = np.linalg.cholesky(h.astype(np.float64)).T
  for c in range(w.shape[1]):
    columns = []
    for start in range(0, 40, size):
      inside = (np.arange(40) >= start) & (np.arange(40) < start + size)
      columns += [np.where(inside, codes[:, c], 0.0), inside.astype(float)]
    found, *_ = np.linalg.lstsq(root @ np.stack(columns, 1), root @ w[:, c], rcond=None)
    s, z = found[::2], found[1::2]
    np.testing.assert_allclose(grid.scales[:, c], s, rtol=5e-3, atol=1e-3)
    np.testing.assert_allclose(-grid.zeros[:, c] * grid.scales[:, c], z, rtol=5e-3, atol=2e-3)


def test_every_round_lowers_the_error_of_each_column_and_it_beats_gptq():
  size, (w, h) = 16, (jnp.asarray(x) for x in problem())
  errors = []
  for rounds in (1, 4):
    codes, grid, error = RUN(w, h, bits=2, group_size=size, rounds=rounds)
    wide = grids.spread(grid, group_size=size, rows=40)
    damped = h + 0.01 * jnp.diag(h).mean() * jnp.eye(40)
    np.testing.assert_allclose(
      error, lost(w, damped, grids.dequantize(codes, wide, bits=2)), rtol=1e-3
    )
    errors.append(np.asarray(error))
  assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < 0.98 * errors[0].sum()
  how = {"bits": 2, "group_size": size, "symmetric": False, "act_order": True}
  codes, grid, _ = jax.jit(functools.partial(gptq.quantize, **how))(w, h)
  wide = grids.spread(grid, group_size=size, rows=40)
  assert errors[-1].sum() < 0.8 * lost(w, damped, grids.dequantize(codes, wide, bits=2)).sum()


@pytest.mark.parametrize("stored", [None, "bfloat16"])
def test_grids_are_judged_as_they_are_stored(stored):
  w, h = (jnp.asarray(x) for x in problem())
  w = w if stored else w.astype(jnp.bfloat16)
  codes, grid, error = RUN(w, h, bits=2, group_size=16, rounds=4, scale_dtype=stored)
  assert grid.scales.dtype == grid.zeros.dtype == jnp.bfloat16
  wide = grids.spread(grid, group_size=16, rows=40)
  damped = h + 0.01 * jnp.diag(h).mean() * jnp.eye(40)
  made = grids.dequantize(codes, wide, bits=2)
  exact = np.asarray(w, np.float32)
  np.testing.assert_allclose(error, lost(exact, damped, made), rtol=2e-3)


def test_a_matrix_without_information_stays_finite():
  w, h = problem()
  w[:, 3], w[:, 4] = 0.5, 0.0
  codes, grid, error = RUN(jnp.asarray(w), jnp.asarray(h), bits=2, group_size=16, rounds=4)
  assert np.isfinite(grid.scales).all() and np.isfinite(grid.zeros).all()
  assert float(jnp.abs(error[3:5]).max()) < 1e-4


@pytest.mark.slow  # compiles a block with its gradient
def test_tuning_a_block_moves_scales_alone_and_lowers_its_error():
  spec = models.Spec(vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=32)
  m = model.Model(spec, models.init(spec, jax.random.key(0)))
  text = np.random.default_rng(0).integers(0, 32, (8, 16))
  given = collect.Materials(batches=[text])
  how = {"group_size": 8, "select": "layers/.*/mlp/.*", "rate": 1e-3}
  plain, tuned = (
    drivers.run_blockwise(decoupleq.decoupleq(epochs=n, **how), m, given) for n in (0, 20)
  )
  address = "layers/0/mlp/up/kernel"
  a, b = plain.leaf(address), tuned.leaf(address)
  np.testing.assert_array_equal(a.codes, b.codes)
  assert (np.asarray(a.scales) != np.asarray(b.scales)).mean() > 0.5
  before, first, last = (models.forward(spec, x.params, text).logits for x in (m, plain, tuned))
  assert float(((last - before) ** 2).sum()) < 0.95 * float(((first - before) ** 2).sum())


def test_arguments_are_checked():
  with pytest.raises(ValueError, match=r"epochs=-1.*rounds and epochs are not negative"):
    decoupleq.decoupleq(epochs=-1)
  with pytest.raises(ValueError, match=r"damping=0.0: valid is above 0"):
    decoupleq.decoupleq(damping=0.0)
  with pytest.raises(ValueError, match="scale_dtype='int8': valid are float32, bfloat16, float16"):
    decoupleq.decoupleq(scale_dtype="int8")
