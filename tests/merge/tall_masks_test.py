# SPDX-License-Identifier: Apache-2.0
"""TALL masks against their definition, consensus at its ends, the choice of thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model
from treesurgeon.merge import tall_masks, task_arithmetic

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def draw(count, shape=(8, 9)):
  base = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
  return base, tuple(
    base + jnp.asarray(0.1 * RNG.standard_normal(shape), jnp.float32) for _ in range(count)
  )


def by_definition(base, donors, lams):
  base, *donors = (np.asarray(x, np.float64) for x in (base, *donors))
  merged = base + sum(d - base for d in donors)
  return merged - base, [
    np.abs(base - d) > lam * np.abs(merged - d) for d, lam in zip(donors, lams, strict=True)
  ]


def test_equals_the_definition():
  base, donors = draw(4)
  lams = (0.2, 0.4, 0.6, 1.0)
  merged, masks = by_definition(base, donors, lams)
  got, found = tall_masks.masks(base, donors, lam=lams)
  np.testing.assert_allclose(got, merged, atol=1e-6)
  for mask, wanted in zip(found, masks, strict=True):
    np.testing.assert_array_equal(mask, wanted)
  served = tall_masks.rebuild(base, donors, task=2, lam=lams, alpha=0.5)
  np.testing.assert_allclose(served, np.asarray(base) + 0.5 * merged * masks[2], atol=1e-6)
  for k in range(6):
    wanted = np.asarray(base) + 0.5 * merged * (sum(m.astype(int) for m in masks) >= k)
    got = tall_masks.agree(base, donors, k=k, lam=lams, alpha=0.5)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_consensus_ends_are_task_arithmetic_and_the_base():
  base, donors = draw(3)
  weights = (1.0, 0.5, -1.0)
  got = tall_masks.agree(base, donors, k=0, alpha=0.3, weights=weights)
  wanted = task_arithmetic.add_task_vectors(base, donors, lam=0.3, weights=weights)
  np.testing.assert_array_equal(got, wanted)
  np.testing.assert_array_equal(tall_masks.agree(base, donors, k=4), base)


def test_what_one_task_alone_changed_is_its_own_and_unchanged_is_nobodys():
  base = jnp.zeros(3)
  donors = (jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, -2.0, 0.0]))
  _, (first, second) = tall_masks.masks(base, donors, lam=100.0)
  assert first.tolist() == [True, False, False]
  assert second.tolist() == [False, True, False]
  for task in (0, 1):
    np.testing.assert_array_equal(tall_masks.rebuild(base, donors, task=task), donors[task])


def test_one_donor_is_rebuilt():
  base, donors = draw(1)
  np.testing.assert_allclose(tall_masks.rebuild(base, donors, task=0), donors[0], atol=1e-6)


def test_bfloat16_scalars_and_zero_changes():
  for shape in ((), (3,)):
    base = jnp.ones(shape, jnp.bfloat16)
    got = tall_masks.rebuild(base, (base, base), task=1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)


def test_each_task_gets_the_threshold_that_validates_best():
  base = model.Part(None, {"w": jnp.zeros((4, 4))})
  wide = [model.Part(None, {"w": jnp.asarray(RNG.standard_normal((4, 4)))}) for _ in range(3)]
  asked = []

  def evaluate(m, task):
    asked.append(task)
    return -float(jnp.abs(m.leaf("w") - wide[task].leaf("w")).sum())

  chosen, scores = tall_masks.choose(base, wide, evaluate, grid=(0.1, 0.5, 1.0))
  assert asked == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  for task, lam in enumerate(chosen):
    best = max(range(3), key=scores[task].__getitem__)
    assert lam == (0.1, 0.5, 1.0)[best]
    served = tall_masks.rebuild(
      base.leaf("w"), tuple(d.leaf("w") for d in wide), task=task, lam=lam
    )
    assert float(jnp.abs(served - wide[task].leaf("w")).sum()) == pytest.approx(-max(scores[task]))


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="lam=-1.0 must not be negative"):
    registry.parse("merge.consensus(lam=-1.0)")
  with pytest.raises(ValueError, match="merge.tall_masks needs the argument 'task'"):
    registry.parse("merge.tall_masks()")
  (one,) = tall_masks.tall_masks(task=2)
  donors = {"a": (jnp.ones(1), jnp.ones(1))}
  with pytest.raises(ValueError, match="task=2: there are 2 donors; valid: 0 to 1"):
    one.apply(model.Part(None, {"a": jnp.ones(1)}), {"donors": donors}, KEY)
