# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import leaves
from treesurgeon.train import optimizers


def rates(**settings):
  plan = optimizers.build(lr=2.0, **settings).schedule
  return [float(plan(i)) for i in range(settings["steps"] + 1)]


def test_cosine_warms_up_and_ends_at_final():
  got = rates(schedule="cosine", steps=12, warmup=4, final=0.1)
  assert got[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
  assert got[4] == pytest.approx(2.0) and got[12] == pytest.approx(0.2)
  assert got[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
  assert all(a >= b for a, b in zip(got[4:], got[5:], strict=False))


def test_wsd_stays_then_decays():
  got = rates(schedule="wsd", steps=10, cooldown=0.4, final=0.0)
  assert got == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5, 0.0])


def test_constant_and_linear():
  assert rates(schedule="constant", steps=3) == pytest.approx([2.0] * 4)
  assert rates(schedule="linear", steps=4, final=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_adamw_equals_the_paper_in_float64():
  settings = {"weight_decay": 0.3, "clip": None, "b1": 0.8, "b2": 0.9, "eps": 1e-6}
  optimizer = optimizers.build(name="adamw", lr=0.1, schedule="constant", **settings)
  rng = np.random.default_rng(0)
  w = rng.standard_normal((3, 2))
  params = {"kernel": jnp.asarray(w, jnp.float32)}
  state = optimizer.direction.init(params)
  m = v = np.zeros((3, 2))
  for t in range(1, 5):
    g = rng.standard_normal((3, 2))
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) + 0.3 * w
    w = w - 0.1 * step
    updates, state = optimizer.direction.update(
      {"kernel": jnp.asarray(g, jnp.float32)}, state, params
    )
    params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
  np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(optimizers.DIRECTIONS))
def test_every_method_descends(name):
  optimizer = optimizers.build(name=name, lr=0.05, schedule="constant", weight_decay=0.0)
  params = {"kernel": jnp.full((2, 2), 3.0)}
  state = optimizer.direction.init(params)
  for _ in range(20):
    updates, state = optimizer.direction.update(params, state, params)
    params = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
  assert float(jnp.abs(params["kernel"]).max()) < 3.0


def test_decay_spares_norms_biases_and_unless_asked_embeddings():
  low = leaves.LowRank(jnp.ones((4, 1)), jnp.ones((1, 4)))
  params = {
    "embed": {"tokens": {"embedding": jnp.ones((3, 4))}},
    "layers": {"0:2": {"q": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}}},
    "o": {"kernel": leaves.Sum((None, low))},
    "final_norm": {"scale": jnp.ones(4), "frozen": None},
  }
  got = optimizers.decays(params)
  assert got["layers"]["0:2"]["q"] == {"kernel": True, "bias": False}
  assert got["o"]["kernel"].parts[1].a is True
  assert got["final_norm"] == {"scale": False, "frozen": None}
  assert not got["embed"]["tokens"]["embedding"]
  assert optimizers.decays(params, embeddings=True)["embed"]["tokens"]["embedding"]
  direction = optimizers.build(weight_decay=0.5, clip=None, name="sgd", b1=0.0).direction
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = direction.update(zero, direction.init(params), params)
  assert float(updates["layers"]["0:2"]["q"]["kernel"][0, 0, 0]) == 0.5
  assert float(jnp.abs(updates["layers"]["0:2"]["q"]["bias"]).max()) == 0


def test_clip_bounds_the_global_norm():
  direction = optimizers.build(name="sgd", b1=0.0, weight_decay=0.0, clip=1.0).direction
  grads = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0)}
  updates, _ = direction.update(grads, direction.init(grads), grads)
  norm = math.sqrt(sum(float((x**2).sum()) for x in updates.values()))
  assert norm == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"name": "adamW"}, "unknown optimizer 'adamW'; did you mean 'adamw'"),
    ({"name": "zzz"}, "unknown optimizer 'zzz'; valid: adamw, lion, sgd"),
    ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    ({"lr": -1.0}, r"lr=-1.0 must lie between 0.0 and inf"),
    ({"warmup": 9, "steps": 5}, "warmup=9 must lie between 0 and 5"),
    ({"b2": 1.5}, "b2=1.5"),
    ({"final": 2.0}, "final=2.0"),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    optimizers.build(**settings)
