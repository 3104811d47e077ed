# SPDX-License-Identifier: Apache-2.0
"""Fisher merging against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs
from treesurgeon.merge import fisher, linear
from treesurgeon.run import collect, drivers, gradients

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
OWN = [[np.random.default_rng(i).integers(0, 11, (2, 6))] for i in range(2)]


def draw(shape=(5, 7), count=3):
  base, *donors = RNG.standard_normal((count + 1, *shape)).astype(np.float32)
  precision = np.exp(RNG.standard_normal((count, *shape))).astype(np.float32)
  return base, donors, precision


def arrays(xs):
  return tuple(map(jnp.asarray, xs))


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 3.0)])
def test_equals_the_definition(weights):
  base, donors, f = draw()
  got = fisher.weigh(jnp.asarray(base), arrays(donors), arrays(f), weights=weights)
  p = np.float64(f) * np.array(weights or (1, 1, 1))[:, None, None]
  np.testing.assert_allclose(got, (p * donors).sum(0) / p.sum(0), atol=1e-6)


def test_finds_the_optimum_of_quadratic_losses():
  """With losses F_i (θ - θ_i)² / 2 the gradient of their sum vanishes at the merge."""
  base, donors, f = draw()
  got = np.float64(fisher.weigh(jnp.asarray(base), arrays(donors), arrays(f)))
  slope = sum(p * (got - d) for p, d in zip(f, donors, strict=True))
  np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_equal_information_is_the_mean():
  base, donors, f = draw()
  got = fisher.weigh(jnp.asarray(base), arrays(donors), arrays([f[0]] * 3))
  want = linear.average(jnp.asarray(base), arrays(donors), weights=(0.0, 1.0, 1.0, 1.0))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_floor_makes_uninformative_entries_a_mean():
  base, donors, f = draw()
  got = fisher.weigh(jnp.asarray(base), arrays(donors), arrays(f * 1e-12))
  np.testing.assert_allclose(got, np.mean(donors, axis=0), atol=1e-6)


def test_one_donor_half_way_and_bfloat16():
  base, donors, f = draw(shape=(6,), count=1)
  w = jnp.asarray(base, jnp.bfloat16)
  got = fisher.weigh(w, arrays(donors), arrays(f))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, jnp.asarray(donors[0]).astype(jnp.bfloat16))
  got = fisher.weigh(jnp.asarray(base), arrays(donors), arrays(f), lam=0.5)
  np.testing.assert_allclose(got, (base + donors[0]) / 2, atol=1e-6)


def make(seed):
  return model.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_model_is_merged_by_each_donors_own_information(normalize):
  base, donors = make(0), [make(1), make(2)]
  given = collect.Materials(donors=donors, donor_batches=OWN)
  (one,) = fisher.fisher(normalize=normalize, floor=1e-12)
  done = drivers.run((one,), base, given)
  info = [gradients.fisher(d, b) for d, b in zip(donors, OWN, strict=True)]
  names = base.addresses()
  f = [{a: np.float64(i[a]) for a in names} for i in info]
  if normalize:
    for each in f:
      vector = np.concatenate([each[a].ravel() for a in names])
      norm = np.sqrt(np.mean(vector**2))
      each.update({a: each[a] / norm for a in names})
  for a in names:
    p = np.maximum(np.stack([each[a] for each in f]), 1e-12)
    want = (p * np.stack([np.asarray(d.leaf(a)) for d in donors])).sum(0) / p.sum(0)
    np.testing.assert_allclose(done.leaf(a), want, rtol=1e-4, atol=1e-6, err_msg=a)
  again = drivers.run_blockwise((one,), base, given)
  for a in names:
    np.testing.assert_allclose(again.leaf(a), done.leaf(a), atol=1e-6)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"floor=0.0 must be above 0"):
    registry.parse("merge.fisher(floor=0.0)")
  m = model.Part(None, {"a": jnp.ones(2)})
  evidence = {"donors": needs.Aligned([m]), "fisher": {"a": (jnp.ones(2),)}}
  (one,) = fisher.fisher(weights=(-1.0,))
  with pytest.raises(ValueError, match=r"weights=\(-1.0,\) must not be negative"):
    one.apply(m, evidence, KEY)
  with pytest.raises(ValueError, match="merge.fisher.* needs calibration text and none was given"):
    drivers.run(fisher.fisher(), make(0), collect.Materials(donors=[make(1)]))
