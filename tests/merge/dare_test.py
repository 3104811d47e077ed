# SPDX-License-Identifier: Apache-2.0
"""DARE against its definition, given its masks; its masks against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model, needs, step
from treesurgeon.merge import dare, ties

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def draw(shape, count):
  base = RNG.standard_normal(shape).astype(np.float32)
  near = [(base + 0.1 * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]
  return base, near


def arrays(base, donors):
  return jnp.asarray(base), tuple(map(jnp.asarray, donors))


@pytest.mark.parametrize("rescale", dare.RESCALES)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_sum_equals_the_definition(rescale, normalize):
  base, donors = draw((13, 17), 2)
  masks = [RNG.random(base.shape) < 0.4 for _ in donors]
  weights, lam = (1.0, -0.5), 0.7
  total = np.zeros(base.shape)
  for c, donor, mask in zip(weights, donors, masks, strict=True):
    delta = donor.astype(np.float64) - base
    factor = {"expected": 1 / 0.4, "none": 1.0}.get(rescale)
    factor = np.abs(delta).sum() / np.abs(delta * mask).sum() if factor is None else factor
    total += c * delta * mask * factor
  wanted = base + lam * total / (sum(weights) if normalize else 1)
  got = dare.drop_and_merge(
    *arrays(base, donors), tuple(map(jnp.asarray, masks)),
    weights=weights, density=0.4, lam=lam, rescale=rescale, normalize=normalize,
  )  # fmt: skip
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def test_signs_are_elected_after_dropping():
  masks = (jnp.array([True, False]), jnp.array([True, True]))
  donors = (jnp.array([3.0, 3.0]), jnp.array([-1.0, -1.0]))
  got = dare.drop_and_merge(jnp.zeros(2), donors, masks, elect=True, rescale="none")
  assert got.tolist() == [3.0, -1.0]


def test_the_mean_over_keys_is_the_change_and_what_is_kept_is_exact():
  base, donors = draw((40,), 1)
  run = jax.jit(lambda key: dare.drop_and_merge(*arrays(base, donors), None, key, density=0.25))
  results = np.asarray(jax.vmap(run)(jax.random.split(KEY, 4000)))
  delta = donors[0] - base
  np.testing.assert_allclose(results.mean(axis=0) - base, delta, atol=0.12 * np.abs(delta).max())
  kept = results != base
  assert abs(kept.mean() - 0.25) < 0.01
  wide = np.broadcast_to(base + 4 * delta, results.shape)
  np.testing.assert_allclose(results[kept], wide[kept], rtol=0, atol=1e-6)


def test_density_one_is_the_donor_and_zero_the_base():
  base, donors = draw((9, 4), 1)
  for rescale in dare.RESCALES:
    got = dare.drop_and_merge(*arrays(base, donors), None, KEY, density=1.0, rescale=rescale)
    np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)
    got = dare.drop_and_merge(*arrays(base, donors), None, KEY, density=0.0, rescale=rescale)
    np.testing.assert_array_equal(got, base)


def test_at_density_one_election_is_that_of_ties():
  base, donors = arrays(*draw((9, 4), 3))
  got = dare.drop_and_merge(base, donors, None, KEY, density=1.0, elect=True, normalize=True)
  np.testing.assert_array_equal(got, ties.trim_elect_merge(base, donors, density=1.0))


def test_masks_depend_on_seed_address_and_place_alone():
  base, donors = arrays(*draw((8, 8), 2))
  (one,) = dare.dare_linear(density=0.5)
  whole = model.Part(None, {"a": base, "b": base})
  part = model.Part(None, {"b": base})
  sources = [model.Part(None, {"a": d, "b": d}) for d in donors]
  evidence = {"donors": needs.Aligned(sources)}
  both, alone = (one.apply(m, evidence, KEY) for m in (whole, part))
  np.testing.assert_array_equal(both.leaf("b"), alone.leaf("b"))
  assert (both.leaf("a") != both.leaf("b")).any()
  assert (one.apply(part, evidence, jax.random.key(1)).leaf("b") != alone.leaf("b")).any()
  same = (donors[0], donors[0])
  masks = [dare.draw(KEY, i, 0.5, base.shape) for i in (0, 1)]
  assert (masks[0] != masks[1]).any()
  del same


def test_each_donor_may_have_its_density_and_it_may_vary():
  base, donors = arrays(*draw((8, 8), 2))
  got = dare.drop_and_merge(base, donors, None, KEY, density=(1.0, 0.0))
  np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)
  (one,) = dare.dare_linear(density=((("a", 0.0), (".*", 1.0)), 0.0))
  m = model.Part(None, {"a": base, "b": base})
  out = one.apply(m, {"donors": {"a": donors, "b": donors}}, KEY)
  np.testing.assert_array_equal(out.leaf("a"), base)
  np.testing.assert_allclose(out.leaf("b"), donors[0], atol=1e-6, rtol=0)


def test_bfloat16_zero_changes_and_scalars():
  base = jnp.ones((4, 4), jnp.bfloat16)
  for rescale in dare.RESCALES:
    got = dare.drop_and_merge(base, (base, base), None, KEY, rescale=rescale)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)
  scalar = dare.drop_and_merge(jnp.zeros(()), (jnp.ones(()),), None, KEY, density=1.0)
  assert scalar.shape == () and scalar == 1.0


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"density=1.5 must lie between 0 and 1"):
    registry.parse("merge.dare_ties(density=1.5)")
  with pytest.raises(ValueError, match="rescale='each'; valid: expected, l1, none"):
    registry.parse("merge.dare_linear(rescale='each')")
  with pytest.raises(ValueError, match="give masks, or a key"):
    dare.drop_and_merge(jnp.ones(1), (jnp.ones(1),))
  (one,) = dare.dare_ties(density=(0.5, 0.5, 0.5))
  donors = {"a": (jnp.ones(1), jnp.ones(1))}
  with pytest.raises(ValueError, match=r"density=\(.*\) has 3 entries for 2 donors"):
    one.apply(model.Part(None, {"a": jnp.ones(1)}), {"donors": donors}, KEY)
  assert isinstance(one, step.Step)
