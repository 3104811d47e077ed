# SPDX-License-Identifier: Apache-2.0
"""DeepShape: the histogram asked for, the order kept, fewer bits of entropy at small errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from treesurgeon.compress.quantize import deepshape
from treesurgeon.stats import generalized_gaussian

STEP = 2.0**-13


def weights(shape=2.0, seed=0):
  x = stats.gennorm.rvs(shape, scale=0.03, size=(128, 96), random_state=seed)
  return x.astype(np.float32)


def entropy(w):
  _, counts = np.unique(np.round(np.asarray(w) / STEP), return_counts=True)
  return stats.entropy(counts, base=2)


def test_every_weight_gets_the_quantile_of_its_rank():
  w = weights(1.5)
  found = generalized_gaussian.fit(jnp.asarray(w))
  at = (stats.rankdata(w).reshape(w.shape) - 0.5) / w.size
  target = stats.gennorm(float(found.shape) * 0.8, scale=float(found.scale) * 0.6)
  expected = w.mean() + target.ppf(at)
  got = np.asarray(deepshape.specify(jnp.asarray(w)))
  np.testing.assert_array_equal(got / STEP, np.round(got / STEP))
  # Half a step of rounding, and the table's error in the tails.
  np.testing.assert_allclose(got, expected, atol=0.51 * STEP, rtol=3e-3)
  assert (np.diff(got.ravel()[np.argsort(w.ravel())]) >= 0).all()


def bargain(w, got):
  """Returns bits gained a weight, and the share of the weights' square that is lost."""
  return entropy(w) - entropy(got), np.square(got - w).sum() / np.square(w).sum()


def test_entropy_falls_while_the_error_is_small():
  w = weights() / 8
  gained, lost = bargain(w, np.asarray(deepshape.specify(jnp.asarray(w))))
  assert gained > 0.5  # the published setting shrinks normal weights by a third, and trains on
  assert lost == pytest.approx(0.1, abs=0.02)
  # Normal weights gain by the narrower range alone: as much as if they were scaled.
  assert gained == pytest.approx(bargain(w, w * 0.69)[0], abs=0.05)
  # The shape alone, at the deviation that was, gains a little of peaked weights.
  peaked = weights(1.0) / 8
  shaped = np.asarray(deepshape.specify(jnp.asarray(peaked), scale=0.64))
  gained, lost = bargain(peaked, shaped)
  assert shaped.std() == pytest.approx(peaked.std(), rel=0.02)
  assert 0.01 < gained < 0.1 and lost < 0.02
  # By the error of the weights a coarser step is the better bargain at either.
  coarse = np.round(w / (4 * STEP)) * (4 * STEP)
  assert bargain(w, coarse)[0] > 1.9 and bargain(w, coarse)[1] < 0.01


def test_neutral_and_arguments():
  w = jnp.asarray(weights())
  assert deepshape.specify(w, shape=1.0, scale=1.0) is w
  assert not np.asarray(deepshape.specify(0 * w)).any()
  with pytest.raises(ValueError, match=r"shape=0, scale=0.6: both factors must be positive"):
    deepshape.deepshape(shape=0)
  with pytest.raises(ValueError, match="fraction_bits=30 is a whole number from 1 to 24"):
    deepshape.deepshape(fraction_bits=30)
