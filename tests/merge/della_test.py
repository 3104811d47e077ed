# SPDX-License-Identifier: Apache-2.0
"""DELLA's probabilities by sorting in numpy, its merges by definition given masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model
from treesurgeon.merge import della

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def by_sorting(delta, density, epsilon):
  """Probabilities along the last axis."""
  ranks = np.argsort(np.argsort(np.abs(delta), axis=-1, kind="stable"), axis=-1, kind="stable")
  return density - epsilon + 2 * epsilon * ranks / (delta.shape[-1] - 1)


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 6)])
def test_probabilities_rise_with_the_rank_in_a_row(shape):
  delta = np.round(8 * RNG.standard_normal(shape)).astype(np.float32)  # many ties
  got = della.probabilities(jnp.asarray(delta), density=0.4, epsilon=0.3)
  np.testing.assert_allclose(got, by_sorting(delta, 0.4, 0.3), atol=1e-6)


def test_rows_of_a_kernel_lie_along_its_first_axis():
  delta = RNG.standard_normal((6, 5)).astype(np.float32)
  got = della.probabilities(jnp.asarray(delta), density=0.5, epsilon=0.2, axis=-2)
  np.testing.assert_allclose(got, by_sorting(delta.T, 0.5, 0.2).T, atol=1e-6)
  (one,) = della.della(rescale="none", density=0.5, epsilon=0.49)
  rare = {"x/kernel": [], "x/bias": []}
  w = jnp.tile(jnp.array([[0.0], [9.0]]), (1, 400))  # of each column the second is the larger
  for name, seen in rare.items():
    m = model.Part(None, {name: jnp.zeros((2, 400))})
    out = one.apply(m, {"donors": {name: (w,)}}, KEY).leaf(name)
    seen.append(float((out[1] != 0).mean()))
  assert rare["x/kernel"][0] > 0.95
  assert rare["x/bias"][0] < 0.7


@pytest.mark.parametrize("rescale", della.RESCALES)
@pytest.mark.parametrize("elect", [False, True])
def test_equals_the_definition_given_masks(rescale, elect):
  base = RNG.standard_normal((6, 8)).astype(np.float32)
  donors = [(base + 0.1 * RNG.standard_normal(base.shape)).astype(np.float32) for _ in range(2)]
  masks = [RNG.random(base.shape) < 0.5 for _ in donors]
  weights, lam = (1.0, 0.5), 0.7
  sparse = []
  for donor, mask in zip(donors, masks, strict=True):
    delta = (donor - base).astype(np.float64)
    kept = delta * mask
    if rescale == "each":
      kept = kept / by_sorting(delta.astype(np.float32), 0.5, 0.2)
    elif rescale == "l1":
      kept = kept * np.abs(delta).sum() / np.abs(kept).sum()
    sparse.append(kept)
  weighted = [c * d for c, d in zip(weights, sparse, strict=True)]
  sign = np.where(sum(weighted) >= 0, 1, -1)
  agrees = [np.sign(d) == sign if elect else np.ones(d.shape, bool) for d in weighted]
  total = sum(d * a for d, a in zip(weighted, agrees, strict=True))
  divisor = sum(c * a for c, a in zip(weights, agrees, strict=True))
  wanted = base + lam * total / np.where(divisor == 0, 1, divisor)
  got = della.sample_and_merge(
    jnp.asarray(base), tuple(map(jnp.asarray, donors)), tuple(map(jnp.asarray, masks)),
    weights=weights, density=0.5, epsilon=0.2, lam=lam, rescale=rescale, elect=elect,
  )  # fmt: skip
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def test_divided_by_its_probability_the_mean_over_keys_is_the_change():
  delta = RNG.standard_normal(20).astype(np.float32)

  def run(key):
    return della.sample_and_merge(
      jnp.zeros(20), (jnp.asarray(delta),), None, key, density=0.5, epsilon=0.3
    )

  mean = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 4000))).mean(axis=0)
  np.testing.assert_allclose(mean, delta, atol=0.1 * np.abs(delta).max())


def test_density_one_is_the_donor_and_zero_the_base():
  base, donor = (jnp.asarray(RNG.standard_normal((4, 5)), jnp.float32) for _ in range(2))
  for rescale in della.RESCALES:
    got = della.sample_and_merge(base, (donor,), None, KEY, density=1.0, rescale=rescale)
    np.testing.assert_allclose(got, donor, atol=1e-6, rtol=0)
    got = della.sample_and_merge(base, (donor,), None, KEY, density=0.0, rescale=rescale)
    np.testing.assert_array_equal(got, base)


def test_rows_of_one_and_scalars_are_kept_with_the_density():
  p = della.probabilities(jnp.ones((3, 1)), density=0.3, epsilon=0.1)
  np.testing.assert_allclose(p, np.full((3, 1), 0.3), atol=1e-6)
  assert della.probabilities(jnp.ones(()), density=0.3, epsilon=0.1).shape == ()


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="rescale='expected'; valid: each, l1, none"):
    registry.parse("merge.della(rescale='expected')")
  (one,) = della.della_linear(density=0.1)
  m = model.Part(None, {"a": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"epsilon=0.15 with density=0.1: .* so epsilon below 0.1"):
    one.apply(m, {"donors": {"a": (jnp.ones(3),)}}, KEY)
  with pytest.raises(ValueError, match=r"density=-0.1 must lie between 0 and 1"):
    registry.parse("merge.della(density=-0.1)")
