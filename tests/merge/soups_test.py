# SPDX-License-Identifier: Apache-2.0
"""Soups: never worse than the best ingredient, whatever the order; learned ones improve."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs
from treesurgeon.merge import linear, soups
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
TEXT = [np.random.default_rng(5 + n).integers(0, 11, (n, 8)) for n in (4, 2)]


def near(base, seed, size=0.2):
  rng = np.random.default_rng(seed)
  return base.replace(
    params=jax.tree.map(
      lambda x: (x + size * rng.standard_normal(x.shape)).astype(x.dtype), base.params
    )
  )


BASE = near(model.Model(SPEC, models.init(SPEC, jax.random.key(0))), 9, 0.3)
DONORS = [near(BASE, i) for i in (1, 2, 3)]
GIVEN = collect.Materials(batches=TEXT, donors=DONORS)


loss = jax.jit(functools.partial(models.nll, SPEC))


def nll(m):
  rows = [(float(loss(m.params, b)), len(b)) for b in TEXT]
  return sum(v * n for v, n in rows) / sum(n for _, n in rows)


def greedy_by_hand(ingredients):
  """The paper's loop, with averages made by `merge.linear`."""
  best, soup = np.inf, []
  for one in sorted(ingredients, key=nll):
    trial = [*soup, one]
    flat = {
      a: linear.average(trial[0].leaf(a), tuple(m.leaf(a) for m in trial[1:]))
      for a in BASE.addresses()
    }
    merged = BASE.update(flat)
    if nll(merged) <= best:
      best, soup, kept = nll(merged), trial, merged
  return kept, len(soup)


def test_greedy_is_the_papers_loop():
  done = drivers.run(soups.soup_greedy(), BASE, GIVEN)
  note = done.lineage[0].notes
  want, size = greedy_by_hand([BASE, *DONORS])
  assert sum(w > 0 for w in note["weights"]) == size
  np.testing.assert_allclose(sum(note["weights"]), 1.0, rtol=1e-6)
  for a in BASE.addresses():
    np.testing.assert_allclose(done.leaf(a), want.leaf(a), atol=1e-6)
  np.testing.assert_allclose(note["losses"], [nll(m) for m in (BASE, *DONORS)], rtol=1e-5)
  np.testing.assert_allclose(note["loss"], nll(done), rtol=1e-5)
  assert nll(done) <= min(note["losses"]) + 1e-6


def test_greedy_does_not_mind_the_order():
  values = []
  for order in itertools.islice(itertools.permutations(DONORS), 0, 6, 2):
    given = collect.Materials(batches=TEXT, donors=list(order))
    values.append(drivers.run(soups.soup_greedy(), BASE, given).leaf("layers/0/mlp/up/kernel"))
  for other in values[1:]:
    np.testing.assert_allclose(other, values[0], atol=1e-6)


def test_greedy_against_brute_force_on_points():
  rng = np.random.default_rng(0)
  for _ in range(20):
    aims, goal = rng.standard_normal((5, 3)), rng.standard_normal(3)
    loss = lambda c, a=aims, g=goal: jnp.sum((c @ a - g) ** 2)
    alone = np.array([loss(row) for row in np.eye(5)])
    weights, best = soups.greedy(alone, loss)
    soup, lowest = [], np.inf
    for i in np.argsort(alone):
      value = float(np.sum((aims[[*soup, i]].mean(0) - goal) ** 2))
      if value <= lowest:
        soup, lowest = [*soup, i], value
    assert sorted(np.flatnonzero(weights)) == sorted(soup)
    np.testing.assert_allclose(best, lowest, rtol=1e-4)


def test_ingredients_that_only_hurt_are_left_out():
  wild = [near(BASE, i, 30.0) for i in (1, 2)]
  done = drivers.run(soups.soup_greedy(), BASE, collect.Materials(batches=TEXT, donors=wild))
  assert done.lineage[0].notes["weights"] == [1.0, 0.0, 0.0]
  for a in BASE.addresses():
    np.testing.assert_array_equal(done.leaf(a), BASE.leaf(a))


@pytest.mark.parametrize("normalize", ["softmax", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("granularity", [pytest.param("task", marks=pytest.mark.slow), "layer"])
def test_learned_weights_lower_the_loss_of_the_uniform_soup(granularity, normalize):
  transform = soups.soup_learned(granularity=granularity, normalize=normalize, steps=30)
  done = drivers.run(transform, BASE, GIVEN)
  uniform = drivers.run(linear.linear(), BASE, GIVEN)
  assert nll(done) < nll(uniform)
  start = drivers.run(soups.soup_learned(granularity=granularity, normalize=normalize, steps=0),
                      BASE, GIVEN)  # fmt: skip
  for a in BASE.addresses():
    np.testing.assert_allclose(start.leaf(a), uniform.leaf(a), atol=1e-6)
  shares = np.array(list(done.aux["coefficients"].values()))
  if normalize == "softmax":
    assert (shares > 0).all() and (shares.sum(1) < 1).all()


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="normalize='max'; valid: softmax, none"):
    registry.parse("merge.soup_learned(normalize='max')")
  with pytest.raises(ValueError, match="merge.soup_greedy.* needs calibration text and none"):
    drivers.run(soups.soup_greedy(), BASE, collect.Materials(donors=DONORS))
  (one,) = soups.soup_greedy()
  with pytest.raises(ValueError, match="there is no batch to learn from"):
    one.apply(BASE, {"donors": needs.Aligned(DONORS), "batches": []}, jax.random.key(0))
