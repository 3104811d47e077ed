# SPDX-License-Identifier: Apache-2.0
"""Interpolation between two models: ends to the bit, layers apart, sweeps that compile once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import model
from treesurgeon.merge import wise_ft
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


def tree(dtype=jnp.float32):
  kernel = jnp.asarray(RNG.standard_normal((3, 4, 5)), dtype).at[0, 0, 0].set(-0.0)
  return model.Model(None, {"layers": {"0:3": {"mlp": {"up": {"kernel": kernel}}}}})


BASE, DONOR = tree(), tree()


def leaf(m, layer=0):
  return np.asarray(m.leaf(f"layers/{layer}/mlp/up/kernel"))


def merged(alpha, base=BASE, donor=DONOR):
  return drivers.run(wise_ft.wise_ft(alpha=alpha), base, collect.Materials(donors=[donor]))


@pytest.mark.parametrize("alpha", [0.25, 0.9, -0.5, 1.5])
def test_equals_the_definition(alpha):
  a, b = leaf(BASE).astype(np.float64), leaf(DONOR)
  np.testing.assert_allclose(leaf(merged(alpha)), (1 - alpha) * a + alpha * b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ends_are_exact_to_the_bit(dtype):
  base, donor = tree(dtype), tree(dtype)
  assert leaf(merged(0.0, base, donor)).tobytes() == leaf(base).tobytes()
  assert leaf(merged(1.0, base, donor)).tobytes() == leaf(donor).tobytes()


def test_layers_may_have_shares_of_their_own():
  out = merged((("layers/0/.*", 0.0), ("layers/1/.*", 0.5), (".*", 1.0)))
  assert (leaf(out, 0) == leaf(BASE, 0)).all()
  np.testing.assert_allclose(leaf(out, 1), (leaf(BASE, 1) + leaf(DONOR, 1)) / 2, atol=1e-6)
  assert (leaf(out, 2) == leaf(DONOR, 2)).all()


def test_a_sweep_compiles_once():
  seen = []

  def hear(event, duration, **more):
    del duration, more
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(event)

  steps = wise_ft.sweep(BASE, DONOR, [0.0, 0.3, (("layers/0/.*", 0.1), (".*", 0.6)), 1.0])
  first = next(steps)
  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    found = dict([first, *steps])
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert not seen
  assert (leaf(found[0.0], 2) == leaf(BASE, 2)).all()
  assert (leaf(found[1.0], 2) == leaf(DONOR, 2)).all()
  assert (leaf(found[0.3], 1) == leaf(merged(0.3), 1)).all()
  wanted = 0.4 * leaf(BASE, 2) + 0.6 * leaf(DONOR, 2)
  np.testing.assert_allclose(leaf(list(found.values())[2], 2), wanted, rtol=0, atol=1e-6)


def test_it_takes_one_donor():
  with pytest.raises(ValueError, match="it takes exactly 1 donor; got 2"):
    drivers.run(wise_ft.wise_ft(), BASE, collect.Materials(donors=[DONOR, DONOR]))
