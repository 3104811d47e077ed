# SPDX-License-Identifier: Apache-2.0
"""Gradient-based rounding against every way to round, and each of its choices by itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import gradient_ptq, learnable, reconstruct, rtn
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves
from treesurgeon.stats import folds

FORM = {"bits": 3, "group_size": 6, "symmetric": False}
USUAL = {"variable": "shift", "scales": False, "loss": "mse", "optimizer": "adam", "rate": None}


def problem(rows=6, cols=24, seed=0):
  """Draws weights and the second moment of correlated inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(40, rows)) @ rng.normal(size=(rows, rows))
  return rng.normal(size=(rows, cols)).astype(np.float32), (x.T @ x).astype(np.float32)


def errors(made, w, h):
  wrong = np.asarray(leaves.dense(made), np.float64) - w
  return np.einsum("ic,ij,jc->c", wrong, h.astype(np.float64), wrong)


def solve(w, h, *, steps, **choices):
  state = folds.SecondMoment(jnp.asarray(h), jnp.float32(1))
  how = {**USUAL, **choices, "plan": gradient_ptq.plan, "steps": steps, "batch": 1, **FORM}
  run = gradient_ptq._kernel if "keep" in how else reconstruct.kernel
  return jax.jit(lambda w: run(w, state, scale_dtype=None, **how))(jnp.asarray(w))


def rounded(w):
  codes, grid = rtn.quantize(jnp.asarray(w), **FORM)
  return grids.tensor(codes, grid, bits=3, group_size=6, store="float32")


def best_of_all(w, h):
  """Tries every way to round up or down, column by column."""
  _, grid = rtn.quantize(jnp.asarray(w), **FORM)
  s, z = np.asarray(grid.scales[0], np.float64), np.asarray(grid.zeros[0], np.float64)
  below = np.floor(w / s)
  found = np.full(w.shape[1], np.inf)
  for ups in itertools.product((0, 1), repeat=len(w)):
    q = np.clip(below + np.array(ups)[:, None] + z, 0, 7)
    wrong = (q - z) * s - w
    found = np.minimum(found, np.einsum("ic,ij,jc->c", wrong, h, wrong))
  return found


@pytest.mark.parametrize(("variable", "rate"), [("shift", 1e-2), ("sigmoid", 1e-1)])
def test_it_comes_near_the_best_way_to_round(variable, rate):
  w, h = problem()
  nearest, least = errors(rounded(w), w, h).sum(), best_of_all(w, h).sum()
  found = errors(solve(w, h, steps=300, variable=variable, rate=rate), w, h)
  assert (found >= best_of_all(w, h) * (1 - 1e-5)).all()
  assert found.sum() - least < 0.45 * (nearest - least)


def test_the_rectified_sigmoid_starts_at_the_weights_and_its_penalty_drives_it_apart():
  w = jnp.asarray(problem()[0])
  form = learnable.Form(3, 6, False, "float32")
  soft = gradient_ptq.rounding("sigmoid", scales=False)
  start = soft.start(w, form)
  codes, scales, zeros = soft.codes(w, start, form, False)
  inside = np.asarray((codes > 0) & (codes < 7))
  made = np.asarray((codes - zeros) * scales)
  np.testing.assert_allclose(made[inside], np.asarray(w)[inside], atol=1e-5)
  assert soft.penalty(start, jnp.float32(0.1)) == 0
  halfway = {"each": jnp.array([0.0])}
  apart = {"each": jnp.array([9.0])}
  costs = [float(soft.penalty(x, jnp.float32(1.0))) for x in (halfway, apart)]
  np.testing.assert_allclose(costs, [gradient_ptq.LAMBDA, 0], atol=1e-9)


def test_more_freedom_gets_further():
  w, h = problem(seed=3)
  few = errors(solve(w, h, steps=200), w, h).sum()
  scales = errors(solve(w, h, steps=200, variable="free", scales=True), w, h).sum()
  assert scales < few


def test_the_important_weights_are_kept():
  w, h = problem(seed=1)
  made = solve(w, h, steps=0, keep=0.1)
  score = np.abs(w) * np.sqrt(np.diag(h))[:, None]
  expected = np.sort(np.argsort(-score.ravel())[:14])
  kept = made.parts[1]
  np.testing.assert_array_equal(np.sort(kept.positions[0]), expected)
  at = np.unravel_index(expected, w.shape)
  np.testing.assert_allclose(np.asarray(leaves.dense(made))[at], w[at], rtol=1e-6)
  assert errors(made, w, h).sum() < 0.8 * errors(rounded(w), w, h).sum()


def test_nonsense_is_named():
  with pytest.raises(ValueError, match="variable='sum': valid are shift, free, division, sigmoid"):
    gradient_ptq.gradient_ptq(variable="sum")
  with pytest.raises(ValueError, match="optimizer='lion': valid are adam"):
    gradient_ptq.gradient_ptq(optimizer="lion")
  with pytest.raises(ValueError, match="keep=1.0: valid is 0 to below 1"):
    gradient_ptq.gradient_ptq(keep=1.0)
  with pytest.raises(ValueError, match="per='kernel' has loss='mse'"):
    gradient_ptq.gradient_ptq(per="kernel", loss="mae")
