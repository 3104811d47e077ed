# SPDX-License-Identifier: Apache-2.0
"""Causal tracing: what must come back, and what cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.edit import tokens, tracing

SPEC = models.Spec(vocab_size=24, d_model=16, num_layers=3, num_heads=2, d_ff=32, tied=True)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(lambda x: 4 * x, models.init(SPEC, jax.random.key(0), jnp.float32))


def test_without_noise_nothing_is_lost(params):
  rows = tokens.statements([(tokens.Prompt((1, 2, 3, 4), 1, 2), (5,))])
  t = tracing.trace(SPEC, params, rows, jax.random.key(1), noise=0.0, samples=2)
  np.testing.assert_allclose(t.corrupted, t.clean, rtol=1e-5)
  np.testing.assert_allclose(t.subject, np.broadcast_to(t.clean, (3, 1)), rtol=1e-5)


def test_the_last_layer_restores_all_at_the_last_token_and_nothing_before(params):
  rows = tokens.statements(
    [
      (tokens.Prompt((1, 2, 3, 4), 1, 2), (5,)),
      (tokens.Prompt((7, 8), 0, 0), (9, 3)),
    ]
  )
  t = tracing.trace(SPEC, params, rows, jax.random.key(1), samples=3)
  np.testing.assert_allclose(t.last[-1], t.clean, rtol=1e-4)
  np.testing.assert_allclose(t.subject[-1], t.corrupted, rtol=1e-4)
  subject, last = t.effect()
  assert subject.shape == last.shape == (3,)
  assert abs(float(subject[-1])) < 1e-5


def test_a_subject_at_the_end_is_restored_from_the_first_layer(params):
  # One token, last in the prompt: its hidden state is everything the answer reads.
  rows = tokens.statements([(tokens.Prompt((7,), 0, 0), (9,))])
  t = tracing.trace(SPEC, params, rows, jax.random.key(1), samples=2)
  np.testing.assert_allclose(t.subject, np.broadcast_to(t.clean, (3, 1)), rtol=1e-4)
