# SPDX-License-Identifier: Apache-2.0
"""Task vectors against float64 arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.merge import linear, task_arithmetic

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, (2.0, -0.5), (1.0, -1.0)])
def test_equals_the_definition(weights, normalize):
  base, *donors = (RNG.standard_normal((5, 7)).astype(np.float32) for _ in range(3))
  got = task_arithmetic.add_task_vectors(
    jnp.asarray(base), tuple(map(jnp.asarray, donors)),
    weights=weights, lam=0.3, normalize=normalize,
  )  # fmt: skip
  w = weights or (1.0, 1.0)
  total = sum(c * (d.astype(np.float64) - base) for c, d in zip(w, donors, strict=True))
  scale = sum(w) if normalize and sum(w) != 0 else 1.0
  np.testing.assert_allclose(got, base + 0.3 * total / scale, atol=2e-6, rtol=0)


def test_normalized_over_donors_is_their_average():
  base, a, b = (jnp.asarray(RNG.standard_normal(9), jnp.float32) for _ in range(3))
  got = task_arithmetic.add_task_vectors(base, (a, b), normalize=True)
  wanted = linear.average(a, (b,))
  np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def test_no_donors():
  with pytest.raises(ValueError, match="at least one model among the donors"):
    task_arithmetic.add_task_vectors(jnp.ones(1), ())
