# SPDX-License-Identifier: Apache-2.0
"""Lifting: what is selected changes, with its own key and evidence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import leaves, lifting, model, needs, step

KEY = jax.random.key(0)
TREE = {
  "embed": {"kernel": jnp.ones((2, 3))},
  "layers": {"0:3": {"up": {"kernel": jnp.ones((3, 2, 4))}, "norm": {"scale": jnp.ones((3, 2))}}},
}


def times(w, *, factor):
  return w * factor


def noise(w, key):
  return w + jax.random.normal(key, w.shape)


def scale(factor, select=None, **more):
  return lifting.over_leaves(times, hyper={"factor": factor}, select=select, **more)


def values(m):
  return {a: float(jnp.ravel(leaves.dense(m.leaf(a)))[0]) for a in m.addresses()}


def test_over_leaves_changes_what_is_selected():
  m = scale(2.0, "layers/1/.*").apply(model.Model(None, TREE), {}, KEY)
  changed = {a for a, v in values(m).items() if v != 1}
  assert changed == {"layers/1/up/kernel"}  # norms are outside the domain
  everything = scale(2.0).apply(model.Model(None, TREE), {}, KEY)
  assert values(everything)["embed/kernel"] == 1  # the default is the blocks' kernels


def test_a_selection_without_a_match_is_named():
  with pytest.raises(ValueError, match="nearest: .*up/kernel"):
    scale(2.0, "layers/9/.*").units(model.Model(None, TREE).addresses())


def cut(w, *, keep, by):
  return w[..., :keep] * by


def fewest(w, *, options, by):
  del by
  return jnp.argmax(jnp.array([dict(o)["keep"] >= w[0, 0] for o in options]))


def test_a_leaf_chooses_an_option_by_its_weights():
  options = [{"keep": 1}, {"keep": 2}, {"keep": 4}]
  one = lifting.over_leaves(cut, hyper={"by": 10.0}, options=options, choose=fewest)
  m = model.Model(None, {"layers": {f"{i}:{i + 1}": {"kernel": jnp.full((1, 2, 4), i + 1.0)}
                                    for i in range(3)}})  # fmt: skip
  out = one.apply(m, {}, KEY)
  assert [out.leaf(f"layers/{i}/kernel").shape for i in range(3)] == [(2, 1), (2, 2), (2, 4)]
  assert values(out) == {f"layers/{i}/kernel": 10.0 * (i + 1) for i in range(3)}
  (aimed,) = step.by_path([("layers/2/.*", (step.named(one, {"name": "cut", "given": {}}),))])
  assert aimed.apply(m, {}, KEY).leaf("layers/2/kernel").shape == (2, 4)
  planned = jax.eval_shape(lambda p: one.apply(m.replace(params=p), {}, KEY).params, m.params)
  assert {x.shape for x in jax.tree.leaves(planned)} == {(3, 2, 1)}  # it sees no weights


def test_keys_depend_on_the_address_alone():
  one = lifting.over_leaves(noise, hyper={}, random=True)
  m = model.Model(None, TREE)
  whole = one.apply(m, {}, KEY)
  names = [f"layers/{i}/up/kernel" for i in (2, 0, 1)]
  for order in (names, names[::-1]):
    part = one.apply(model.Part(None, {a: m.leaf(a) for a in order}), {}, KEY)
    for a in order:
      np.testing.assert_array_equal(part.leaf(a), whole.leaf(a))
  drawn = [np.asarray(whole.leaf(a)) for a in names]
  assert not np.array_equal(drawn[0], drawn[1])
  other = one.apply(m, {}, jax.random.key(1))
  assert not np.array_equal(other.leaf(names[0]), drawn[0])


def test_over_groups_hands_over_what_belongs_together():
  def swap(w, *, by):
    return {"q": w["k"] * by, "k": w["q"] * by}

  one = lifting.over_groups(swap, groups=r"(?P<group>.*)/(?P<role>q|k)", hyper={"by": 2.0})
  tree = {"layers": {"0:2": {"q": jnp.array([1.0, 2.0]), "k": jnp.array([3.0, 4.0])}}}
  m = one.apply(model.Model(None, tree), {}, KEY)
  assert values(m) == {
    "layers/0/k": 2.0, "layers/0/q": 6.0, "layers/1/k": 4.0, "layers/1/q": 8.0,
  }  # fmt: skip
  assert one.units(m.addresses()) == [
    ("layers/0/k", "layers/0/q"), ("layers/1/k", "layers/1/q"),
  ]  # fmt: skip


def test_compressed_leaves_come_dense_unless_raw():
  low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
  m = model.Model(None, {"x": {"kernel": low}})
  assert isinstance(scale(2.0, ".*").apply(m, {}, KEY).leaf("x/kernel"), jax.Array)

  def kind(w):
    return leaves.LowRank(w.a * 2, w.b)

  raw = lifting.over_leaves(kind, hyper={}, select=".*", raw=True).apply(m, {}, KEY)
  assert raw.leaf("x/kernel").dense().tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_statistics_are_aimed_at_the_selection():
  def fn(w, moment):
    return w + moment

  wants = {"moment": needs.Statistic("absmax")}
  one = lifting.over_leaves(fn, hyper={}, select="layers/1/.*", wants=wants)
  assert re.fullmatch(one.needs["moment"].select, "layers/1/up/kernel")
  assert not re.fullmatch(one.needs["moment"].select, "layers/0/up/kernel")
