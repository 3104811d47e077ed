# SPDX-License-Identifier: Apache-2.0
"""Rules that give a hyper-parameter one value here and another there."""

import jax
import jax.numpy as jnp
import pytest

from treesurgeon import registry
from treesurgeon.core import model, varied
from treesurgeon.run import collect, drivers


def test_the_first_matching_rule_wins_whole_address():
  rules = (("a", 1.0), ("a.*", 2.0), (".*", 3.0))
  assert [varied.at(rules, x) for x in ("a", "ab", "ba")] == [1.0, 2.0, 3.0]
  assert varied.at((0.5, rules), "ab") == (0.5, 2.0)


def test_no_rule_is_an_error():
  with pytest.raises(ValueError, match=r"layers/0/x: none of the rules 'a' matches it; end with"):
    varied.at((("a", 1.0),), "layers/0/x")


def pair():
  flat = {"layers": {"0:4": {"mlp": {"up": {"kernel": jnp.zeros((4, 2, 2))}}}}}
  other = jax.tree.map(jnp.ones_like, flat)
  return model.Model(None, flat), model.Model(None, other)


def test_a_merge_takes_rules_in_place_of_a_number():
  base, donor = pair()
  text = "merge.task_arithmetic(lam=(('layers/[01]/.*', 0.25), ('.*', 0.5)))"
  (one,) = registry.parse(text)
  out = drivers.run((one,), base, collect.Materials(donors=[donor]))
  got = [float(out.leaf(f"layers/{i}/mlp/up/kernel")[0, 0]) for i in range(4)]
  assert got == [0.25, 0.25, 0.5, 0.5]
  assert repr(registry.parse(repr(one))[0]) == repr(one)


def test_a_sweep_of_a_knob_compiles_once():
  base, donor = pair()
  seen = []

  def hear(event, duration, **more):
    del duration, more
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(event)

  brought = collect.Materials(donors=[donor])
  drivers.run(registry.parse("merge.task_arithmetic(lam=0.1)"), base, brought)
  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    for lam in (0.2, 0.3, 0.4):
      drivers.run(registry.parse(f"merge.task_arithmetic(lam={lam})"), base, brought)
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert not seen


def test_odd_values_are_refused():
  with pytest.raises(ValueError, match=r"merge.task_arithmetic: lam=.* must be"):
    registry.parse("merge.task_arithmetic(lam=(('.*', 'much'),))")
  with pytest.raises(ValueError, match=r"must lie between 0 and 1"):
    registry.parse("merge.ties(density=(('a', 0.5), ('.*', 1.5)))")
