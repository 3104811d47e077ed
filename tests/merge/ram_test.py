# SPDX-License-Identifier: Apache-2.0
"""Reinforced Agent Merging against a loop over entries."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.merge import ram

RNG = np.random.default_rng(0)
BASE = RNG.standard_normal((7, 6)).astype(np.float32)


def tuned(count, share=0.5):
  return [
    np.where(RNG.random(BASE.shape) < share, BASE + RNG.standard_normal(BASE.shape), BASE).astype(
      np.float32
    )
    for _ in range(count)
  ]


def oracle(donors, epsilon, r=0.0, alpha=0.0):
  d = np.stack([x - BASE for x in donors]).astype(np.float64)
  counts = np.abs(d) > epsilon
  makers = counts.sum(0)
  lam = []
  for c in counts:
    ratio = (c & (makers > 1)).sum() / max((c & (makers == 1)).sum(), epsilon)
    lam.append(1 + r * min(max(ratio, 0), alpha))
  out = BASE.astype(np.float64)
  for at in np.ndindex(BASE.shape):
    made = [i for i in range(len(d)) if counts[(i, *at)]]
    if len(made) == 1:
      out[at] += lam[made[0]] * d[(made[0], *at)]
    elif made:
      out[at] += np.mean([d[(i, *at)] for i in made])
  return out


def merged(donors, **more):
  return ram.merge_changes(jnp.asarray(BASE), tuple(map(jnp.asarray, donors)), **more)


@pytest.mark.parametrize("epsilon", [1e-5, 0.4])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_the_definition(epsilon, count):
  donors = tuned(count)
  got = merged(donors, epsilon=epsilon)
  np.testing.assert_allclose(got, oracle(donors, epsilon), rtol=0, atol=1e-6)
  for r, alpha in ((0.1, 0.2), (0.5, 9.0), (0.0, 1.0)):
    got = merged(donors, epsilon=epsilon, r=r, alpha=alpha)
    np.testing.assert_allclose(got, oracle(donors, epsilon, r, alpha), rtol=0, atol=2e-6)


def test_a_model_without_a_change_of_its_own_is_strengthened_nowhere():
  (a,) = tuned(1)
  assert (merged([a, a], r=0.5) == merged([a, a])).all()
  np.testing.assert_allclose(merged([a, a]), a, rtol=0, atol=1e-6)


def test_storage_dtype_and_mistakes():
  low = jnp.asarray(BASE, jnp.bfloat16)
  assert ram.merge_changes(low, (low + 1,), r=0.1).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="epsilon=0.0 must be positive"):
    ram.ramplus_tl(epsilon=0.0)
