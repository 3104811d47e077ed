# SPDX-License-Identifier: Apache-2.0
"""Breadcrumbs against sorting, by tensor and by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.merge import breadcrumbs, ties

RNG = np.random.default_rng(0)


def by_tensor(delta, density, gamma):
  """mergekit's rule: outliers give way where the density asks for more."""
  if density >= 1:
    return delta
  keep, top = int(density * delta.size), int(gamma * delta.size)
  top = min(top, delta.size - keep)
  order = np.argsort(-np.abs(delta).ravel(), kind="stable")[top : top + keep]
  out = np.zeros(delta.size, delta.dtype)
  out[order] = delta.ravel()[order]
  return out.reshape(delta.shape)


def by_row(delta, density, gamma):
  """The authors' rule, along the last axis: remove the top, then keep the largest of the rest."""
  out = np.zeros_like(delta)
  keep, top = int(density * delta.shape[-1]), int(gamma * delta.shape[-1])
  for at in np.ndindex(*delta.shape[:-1]):
    order = np.argsort(-np.abs(delta[at]), kind="stable")[top : top + keep]
    out[at][order] = delta[at][order]
  return out


CUTS = [(0.3, 0.1), (0.9, 0.3), (0.0, 0.1), (0.01, 0.0), (0.5, 1.0), (0.999, 0.0)]


@pytest.mark.parametrize(("density", "gamma"), CUTS)
@pytest.mark.parametrize("shape", [(11,), (7, 9), (2, 3, 8)])
def test_equals_sorting(shape, density, gamma):
  delta = RNG.standard_normal(shape).astype(np.float32)
  given = {"density": density, "gamma": gamma}
  got = breadcrumbs.keep_middle(jnp.asarray(delta), **given)
  np.testing.assert_array_equal(got, by_tensor(delta, density, gamma))
  got = breadcrumbs.keep_middle(jnp.asarray(delta), granularity="row", **given)
  np.testing.assert_array_equal(got, by_row(delta, density, gamma))


def test_ties_go_lowest_index_first():
  delta = jnp.round(2 * jnp.asarray(RNG.standard_normal((9, 8)), jnp.float32))
  got = breadcrumbs.keep_middle(delta, density=0.4, gamma=0.2)
  np.testing.assert_array_equal(got, by_tensor(np.asarray(delta), 0.4, 0.2))
  got = breadcrumbs.keep_middle(delta, density=0.4, gamma=0.2, granularity="row", axis=-2)
  np.testing.assert_array_equal(got, by_row(np.asarray(delta).T, 0.4, 0.2).T)


def test_merges_add_or_elect():
  base = RNG.standard_normal((5, 6)).astype(np.float32)
  donors = [(base + 0.1 * RNG.standard_normal(base.shape)).astype(np.float32) for _ in range(3)]
  given = (jnp.asarray(base), tuple(map(jnp.asarray, donors)))
  weights = (1.0, 0.5, 2.0)
  sparse = [by_tensor(d - base, 0.5, 0.1) for d in donors]
  wanted = base + 0.3 * sum(c * d for c, d in zip(weights, sparse, strict=True))
  how = {"density": 0.5, "gamma": 0.1, "weights": weights, "lam": 0.3}
  got = breadcrumbs.keep_middle_and_merge(*given, **how)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
  elected = breadcrumbs.keep_middle_and_merge(
    *given, density=0.5, gamma=0.0, weights=weights, normalize=True, elect=True
  )
  np.testing.assert_array_equal(
    elected, ties.trim_elect_merge(*given, density=0.5, weights=weights)
  )


def test_density_one_is_the_donor_and_each_donor_may_have_its_own():
  base, a, b = (jnp.asarray(RNG.standard_normal((4, 5)), jnp.float32) for _ in range(3))
  got = breadcrumbs.keep_middle_and_merge(base, (a,), density=1.0)
  np.testing.assert_allclose(got, a, atol=1e-6, rtol=0)
  got = breadcrumbs.keep_middle_and_merge(base, (a, b), density=(1.0, 0.0), gamma=(0.5, 0.0))
  np.testing.assert_allclose(got, a, atol=1e-6, rtol=0)


def test_bfloat16_zero_changes_and_scalars():
  base = jnp.ones((4, 4), jnp.bfloat16)
  for how in breadcrumbs.GRANULARITIES:
    got = breadcrumbs.keep_middle_and_merge(base, (base, base), granularity=how)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)
  one = jnp.ones(())
  assert breadcrumbs.keep_middle(one, density=0.5, gamma=0.0) == 0.0
  assert breadcrumbs.keep_middle(one, density=0.5, gamma=0.0, granularity="row") == 1.0


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="granularity='global'; valid: tensor, row"):
    registry.parse("merge.breadcrumbs(granularity='global')")
  with pytest.raises(ValueError, match=r"gamma=2 must lie between 0 and 1"):
    registry.parse("merge.breadcrumbs_ties(gamma=2)")
  with pytest.raises(ValueError, match=r"gamma=\(0.1,\) has 1 entries for 2 donors"):
    breadcrumbs.keep_middle_and_merge(jnp.ones(2), (jnp.ones(2), jnp.ones(2)), gamma=(0.1,))
