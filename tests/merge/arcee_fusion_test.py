# SPDX-License-Identifier: Apache-2.0
"""Arcee Fusion against float64, its divergence where plain float32 fails."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import arcee_fusion
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True) + 1e-8


def divergence(x, y):
  p, q = (softmax(np.asarray(v, np.float64)) for v in (x, y))
  return (p * np.log(p / q)).sum(-1, keepdims=True)


def oracle(base, donor):
  score = np.abs(donor.astype(np.float64) - base) * divergence(donor, base)
  order = np.sort(score.ravel())
  first, median, third = (order[q * (order.size - 1) // 4] for q in (1, 2, 3))
  return np.where(score >= median + 1.5 * (third - first), donor, base)


def draw(shape, near):
  base = RNG.standard_normal(shape)
  return base.astype(np.float32), (base + near * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("near", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("shape", [(40,), (17, 30), (150, 120)])
def test_equals_the_definition(shape, near):
  base, donor = draw(shape, near)
  got = arcee_fusion.fuse(jnp.asarray(base), (jnp.asarray(donor),), axis=-1)
  np.testing.assert_allclose(got, oracle(base, donor), rtol=0, atol=1e-6)


@pytest.mark.parametrize("near", [1e-5, 1e-3, 0.1, 1.0, 30.0, 300.0])
def test_the_divergence_keeps_six_digits_where_it_is_small(near):
  x, y = draw((20, 50), near)
  got = arcee_fusion.divergence(jnp.asarray(x), jnp.asarray(y), axis=-1)
  np.testing.assert_allclose(got, divergence(x, y), rtol=2e-5 if near < 100 else 1e-4)


def test_the_divergence_of_equal_and_shifted_logits_is_zero():
  x = jnp.asarray(draw((4, 9), 0.0)[0])
  assert (arcee_fusion.divergence(x, x, axis=-1) == 0).all()
  assert float(jnp.abs(arcee_fusion.divergence(x - 40.0, x, axis=-1)).max()) < 1e-10


def test_a_neuron_is_a_column_of_a_kernel():
  base, donor = draw((12, 30), 0.3)
  base, donor = base * np.linspace(0.1, 3, 12)[:, None].astype(np.float32), donor
  models = [model.Model(None, {"w": {"kernel": jnp.asarray(x)}}) for x in (base, donor)]
  out = drivers.run(
    arcee_fusion.arcee_fusion(), models[0], collect.Materials(donors=models[1:])
  ).leaf("w/kernel")
  np.testing.assert_allclose(out, oracle(base.T, donor.T).T, rtol=0, atol=1e-6)
  assert not np.allclose(out, oracle(base, donor))


def test_without_a_change_nothing_happens():
  base = jnp.asarray(draw((5, 6), 0.0)[0])
  assert (arcee_fusion.fuse(base, (base,), axis=-1) == base).all()
  assert float(arcee_fusion.fuse(jnp.ones(()), (jnp.zeros(()),))) == 0  # at its own threshold


def test_it_takes_one_donor():
  base = model.Model(None, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match="it takes exactly 1 donor; got 2"):
    drivers.run(arcee_fusion.arcee_fusion(), base, collect.Materials(donors=[base, base]))
