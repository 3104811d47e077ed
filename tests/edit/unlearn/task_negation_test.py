# SPDX-License-Identifier: Apache-2.0
"""Negation undoes addition."""

import jax.numpy as jnp
import numpy as np

from treesurgeon.edit.unlearn import task_negation
from treesurgeon.merge import task_arithmetic

RNG = np.random.default_rng(0)


def test_equals_the_definition():
  w, a, b = (RNG.standard_normal((4, 6)).astype(np.float32) for _ in range(3))
  got = task_negation.subtract_task_vectors(
    jnp.asarray(w), (jnp.asarray(a), jnp.asarray(b)), scale=0.6
  )
  wide = w.astype(np.float64)
  np.testing.assert_allclose(got, wide - 0.6 * ((a - wide) + (b - wide)), atol=1e-6, rtol=0)


def test_adding_then_negating_is_the_identity():
  w = jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)
  tau = jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)
  added = task_arithmetic.add_task_vectors(w, (w + tau,), lam=0.5)
  back = task_negation.subtract_task_vectors(added, (added + tau,), scale=0.5)
  np.testing.assert_allclose(back, w, atol=1e-6, rtol=0)


def test_without_donors_nothing_is_subtracted():
  w = jnp.arange(3.0)
  np.testing.assert_array_equal(task_negation.subtract_task_vectors(w, ()), w)
