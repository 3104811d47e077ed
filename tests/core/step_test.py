# SPDX-License-Identifier: Apache-2.0
"""Aiming and spelling of steps."""

import zlib

import jax
import jax.numpy as jnp
import pytest

from treesurgeon import registry
from treesurgeon.core import leaves, lifting, model, needs, step

KEY = jax.random.key(0)
TREE = {
  "embed": {"kernel": jnp.ones((2, 3))},
  "layers": {"0:3": {"up": {"kernel": jnp.ones((3, 2, 4))}, "norm": {"scale": jnp.ones((3, 2))}}},
}


def times(w, *, factor):
  return w * factor


def scale(factor, select=None, **more):
  return lifting.over_leaves(times, hyper={"factor": factor}, select=select, **more)


def values(m):
  return {a: float(jnp.ravel(leaves.dense(m.leaf(a)))[0]) for a in m.addresses()}


def test_leaf_keys_are_pinned():
  # crc32 of the address, not Python's salted hash: the same in every process, for ever.
  wanted = jax.random.fold_in(KEY, zlib.crc32(b"w/kernel"))
  assert step.leaf_key(KEY, "w/kernel") == wanted


def demo(name, factor):
  return (step.named(scale(factor), {"name": name, "given": {}, "arguments": {}}),)


def test_by_path_first_match_wins():
  (one,) = step.by_path([
    ("layers/0/.*", demo("a", 2.0)),
    ("layers/.*", demo("b", 3.0)),
    (".*", demo("c", 5.0)),
  ])  # fmt: skip
  m = one.apply(model.Model(None, TREE), {}, KEY)
  got = values(m)
  assert [got[f"layers/{i}/up/kernel"] for i in range(3)] == [2.0, 3.0, 3.0]
  assert got["embed/kernel"] == 5.0
  assert got["layers/0/norm/scale"] == 1.0


def test_by_path_names_a_rule_without_a_match():
  (one,) = step.by_path([("layers/.*", demo("a", 2.0)), ("layers/1/.*", demo("b", 3.0))])
  with pytest.raises(ValueError, match="no address matches"):
    one.units(model.Model(None, TREE).addresses())


def test_by_path_keeps_each_rules_evidence_apart():
  def add(w, donors):
    return w + donors[0]

  one = lifting.over_leaves(add, hyper={}, wants={"donors": needs.Donors()})
  info = {"name": "x", "given": {}, "arguments": {}}
  (both,) = step.by_path(
    [("layers/0/.*", (step.named(one, info),)), ("layers/1/.*", demo("y", 7.0))]
  )
  assert list(both.needs) == ["0.donors"]
  m = model.Model(None, TREE)
  out = both.apply(m, {"0.donors": needs.Aligned([m])}, KEY)
  assert [values(out)[f"layers/{i}/up/kernel"] for i in range(3)] == [2.0, 7.0, 1.0]


def test_by_path_refuses_whole_model_steps():
  with pytest.raises(ValueError, match="grow.g_stack.* works on whole models"):
    step.by_path([(".*", registry.parse("grow.g_stack()"))])


def test_chain_is_concatenation():
  a, b = registry.parse("merge.linear()"), registry.parse("merge.ties()")
  assert step.chain(a, b) == a + b
  assert step.spell(a + b) == "merge.linear() + merge.ties()"
