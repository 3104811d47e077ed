# SPDX-License-Identifier: Apache-2.0
"""RegMean against stacked least squares in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry, stats
from treesurgeon.core import model, needs
from treesurgeon.merge import regmean
from treesurgeon.run import collect, drivers, statistics

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
OWN = [[np.random.default_rng(i).integers(0, 11, (4, 8))] for i in range(2)]


def draw(rows=6, cols=4, count=3, tokens=40):
  x = RNG.standard_normal((count, tokens, rows)) @ RNG.standard_normal((count, rows, rows))
  w = RNG.standard_normal((count, rows, cols))
  return x, w


def merged(x, w, **more):
  grams = tuple(jnp.asarray(a.T @ a / len(a), jnp.float32) for a in x)
  donors = tuple(jnp.asarray(a, jnp.float32) for a in w)
  return regmean.regress(donors, grams, **more)


def oracle(x, w, alpha=1.0, weights=(1, 1, 1)):
  keep = np.where(np.eye(x.shape[-1]), 1, alpha)
  g = [c * keep * (a.T @ a) / len(a) for c, a in zip(weights, x, strict=True)]
  return np.linalg.solve(sum(g), sum(m @ v for m, v in zip(g, w, strict=True)))


def test_the_formula_is_stacked_least_squares():
  x, w = draw()
  stacked = np.concatenate(x)
  wanted = np.concatenate([a @ b for a, b in zip(x, w, strict=True)])
  best, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
  np.testing.assert_allclose(oracle(x, w), best, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.1])
@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 2.0)])
def test_equals_the_formula(alpha, weights):
  x, w = draw()
  got = merged(x, w, alpha=alpha, weights=weights, ridge=0.0)
  np.testing.assert_allclose(got, oracle(x, w, alpha, weights or (1, 1, 1)), rtol=2e-4, atol=2e-4)


def test_alpha_zero_weighs_by_the_squares_of_inputs():
  x, w = draw()
  square = np.stack([(a**2).mean(0) for a in x])[:, :, None]
  got = merged(x, w, alpha=0.0)
  np.testing.assert_allclose(got, (square * w).sum(0) / square.sum(0), atol=1e-4)


def test_inputs_of_one_kind_give_the_mean():
  x, w = draw()
  got = merged(np.stack([x[0]] * 3), w, alpha=1.0)
  np.testing.assert_allclose(got, w.mean(0), atol=1e-4)


def test_directions_without_input_get_the_mean():
  x, w = draw(count=2)
  x[:, :, 2] = 0.0
  for alpha in (1.0, 0.9):
    got = merged(x, w, alpha=alpha)
    np.testing.assert_allclose(got[2], w.mean(0)[2], atol=1e-5)
    assert np.isfinite(got).all()
  got = merged(np.zeros_like(x), w)
  np.testing.assert_allclose(got, w.mean(0), atol=1e-6)


def test_one_donor_is_itself_in_its_dtype():
  x, w = draw(count=1)
  gram = stats.SecondMoment(jnp.asarray(x[0].T @ x[0], jnp.float32), jnp.float32(len(x[0])))
  donor = jnp.asarray(w[0], jnp.bfloat16)
  got = regmean.solve_leaf(
    jnp.zeros_like(donor), (donor,), (gram,), lam=1.0, alpha=1.0, ridge=1e-6, weights=None
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, donor)


def make(seed):
  return model.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


def test_a_model_is_solved_where_linear_and_averaged_elsewhere():
  base, donors = make(0), [make(1), make(2)]
  given = collect.Materials(donors=donors, donor_batches=OWN)
  done = drivers.run(regmean.regmean(alpha=1.0, ridge=1e-6), base, given)
  want = statistics.wanted({"g": needs.Statistic("second_moment")}, base.addresses())
  seen = [statistics.tap_statistics(d, want, b) for d, b in zip(donors, OWN, strict=True)]
  for address in base.addresses():
    w = [np.float64(d.leaf(address)) for d in donors]
    if ("second_moment", address) in want:
      g = [np.float64(s[("second_moment", address)].mean()) for s in seen]
      best = np.linalg.solve(sum(g), sum(a @ b for a, b in zip(g, w, strict=True)))
      np.testing.assert_allclose(done.leaf(address), best, atol=2e-2, err_msg=address)
    else:
      np.testing.assert_allclose(done.leaf(address), sum(w) / 2, atol=1e-6, err_msg=address)


def test_the_head_may_be_solved_too():
  base, donors = make(0), [make(1), make(2)]
  given = collect.Materials(donors=donors, donor_batches=OWN)
  mean = drivers.run(regmean.regmean(), base, given).leaf("lm_head/kernel")
  solved = drivers.run(regmean.regmean(kernels=".*/kernel"), base, given).leaf("lm_head/kernel")
  assert not np.allclose(mean, solved, atol=1e-3)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="alpha=1.5 must lie between 0 and 1"):
    registry.parse("merge.regmean(alpha=1.5)")
  with pytest.raises(ValueError, match="ridge=-1.0 must not be negative"):
    registry.parse("merge.regmean_pp(ridge=-1.0)")
  given = collect.Materials(donors=[make(1), make(2)], donor_batches=OWN)
  with pytest.raises(ValueError, match=r"weights=\(0.0, 0.0\) must not be .*, and not all zero"):
    drivers.run(regmean.regmean(weights=(0.0, 0.0)), make(0), given)
