# SPDX-License-Identifier: Apache-2.0
"""Evolution over the numbers of registered methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model
from treesurgeon.run import collect, drivers, evolve

RNG = np.random.default_rng(0)


def make():
  draw = lambda: jnp.asarray(RNG.standard_normal((2, 4, 6)), jnp.float32)
  return model.Model(None, {"layers": {"0:2": {"mlp": {"up": {"kernel": draw()}}}}})


BASE, DONORS = make(), [make(), make()]
GIVEN = collect.Materials(donors=DONORS)
WANTED = drivers.run(registry.parse("merge.task_arithmetic(weights=(0.8, 0.3))"), BASE, GIVEN)


def distance(m):
  flat = [(m.leaf(a) - WANTED.leaf(a)).ravel() for a in m.addresses()]
  return float(jnp.sum(jnp.concatenate(flat) ** 2))


BOUNDS = {"weights": ((0.0, 1.0), (0.0, 1.0))}


def test_finds_the_weights_that_were_used():
  found = evolve.search(
    registry.load("merge.task_arithmetic"), BOUNDS, distance, BASE, GIVEN, budget=150, seed=1
  )
  np.testing.assert_allclose(found.arguments["weights"], (0.8, 0.3), atol=0.02)
  np.testing.assert_allclose(found.value, distance(found.model), rtol=1e-4)
  assert found.value == min(found.values)
  assert found.model.lineage[0].arguments["weights"] == list(found.arguments["weights"])
  assert repr(found.transform[0]).startswith("merge.task_arithmetic(weights=(0.")


@pytest.mark.parametrize("name", ["merge.ties", "merge.linear", "merge.task_arithmetic"])
def test_candidates_share_the_programs_of_the_first(name):
  template = registry.load(name)
  bounds = {"weights": ((0.1, 1.0),) * (3 if name == "merge.linear" else 2)}
  evolve.search(template, bounds, distance, BASE, GIVEN, budget=2)
  seen = []

  def hear(event, duration, **more):
    del duration, more
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    found = evolve.search(template, bounds, distance, BASE, GIVEN, budget=12, seed=3)
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert len(set(found.values)) > 6
  assert not seen


def test_the_start_is_the_incumbent_and_the_history_resumes(tmp_path):
  path = tmp_path / "trials.jsonl"
  template = registry.load("merge.task_arithmetic")
  more = {"start": {"weights": (0.8, 0.3)}, "budget": 6, "history": path}
  found = evolve.search(template, BOUNDS, distance, BASE, GIVEN, **more)
  assert found.arguments["weights"] == (0.8, 0.3)
  assert found.value < 1e-10
  calls = []

  def counted(m):
    calls.append(m)
    return distance(m)

  again = evolve.search(template, BOUNDS, counted, BASE, GIVEN, **{**more, "budget": 8})
  assert len(calls) == 2
  assert again.values[:6] == found.values


def test_several_steps_and_bound_arguments():
  def template(lam, alpha):
    merge = registry.load("merge.task_arithmetic")(lam=lam)
    return merge + registry.load("merge.linear")(weights=(1.0, alpha, alpha))

  found = evolve.search(
    template, {"lam": (0.0, 1.0), "alpha": (0.0, 1.0)}, distance, BASE, GIVEN, budget=10
  )
  assert len(found.model.lineage) == 2
  narrow = functools.partial(registry.load("merge.task_arithmetic"), normalize=True)
  found = evolve.search(narrow, {"lam": (0.0, 2.0)}, distance, BASE, GIVEN, budget=4)
  assert "normalize=True" in repr(found.transform[0])


def test_mistakes_are_named():
  template = registry.load("merge.task_arithmetic")
  for bounds, more, message in (
    ({}, {}, "bounds name no argument"),
    ({"lam": (1.0, 0.0)}, {}, r"bounds of 'lam': \(1.0, 0.0\) must be \(low, high\)"),
    ({"lam": (0.0, 1.0)}, {"start": {"mal": 1.0}}, "start names 'mal', which has no bounds: lam"),
    (BOUNDS, {"start": {"weights": (1.0,)}}, "start of 'weights' has 1 numbers, its bounds 2"),
    ({"mal": (0.0, 1.0)}, {}, "merge.task_arithmetic has no argument 'mal'"),
  ):
    with pytest.raises(ValueError, match=message):
      evolve.search(template, bounds, distance, BASE, GIVEN, budget=2, **more)
