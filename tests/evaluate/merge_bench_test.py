# SPDX-License-Identifier: Apache-2.0
"""The merge benchmark's arithmetic against definitions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import merge_bench

RNG = np.random.default_rng(0)
SPEC = models.Spec(vocab_size=7, d_model=8, num_layers=1, num_heads=2, d_ff=16)


def items(hits):
  return np.stack([np.asarray(hits, float), np.ones(len(hits))], axis=1)


def test_score_counts_what_is_weighted():
  m = model_lib.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  rows = {
    "tokens": RNG.integers(0, 7, (5, 9)).astype(np.int32),
    "weights": (RNG.random((5, 8)) < 0.5).astype(np.float32),
  }
  rows["weights"][:, 0] = 1.0
  logits = np.asarray(models.forward(SPEC, m.params, rows["tokens"][:, :-1]).logits)
  right = (logits.argmax(-1) == rows["tokens"][:, 1:]) & (rows["weights"] > 0)
  got = merge_bench.score(m, rows, exact=False, batch=2)
  np.testing.assert_array_equal(got[:, 0], right.sum(1))
  np.testing.assert_array_equal(got[:, 1], rows["weights"].sum(1))
  exact = merge_bench.score(m, rows, exact=True, batch=2)
  np.testing.assert_array_equal(exact[:, 0], right.sum(1) == rows["weights"].sum(1))
  np.testing.assert_array_equal(exact[:, 1], 1)


def test_standings_normalise_and_rank():
  experts = {"x": items([1, 1, 1, 0]), "y": items([1, 1, 0, 0])}
  sheets = {
    "even": {"x": items([1, 1, 0, 0]), "y": items([1, 0, 0, 0])},
    "uneven": {"x": items([1, 1, 1, 0]), "y": items([0, 0, 0, 0])},
  }
  found = merge_bench.standings(sheets, experts)
  assert found["even"].normalised == pytest.approx((2 / 3 + 1 / 2) / 2)
  assert found["uneven"].worst == 0
  assert [found[n].rank for n in ("even", "uneven")] == [1.5, 1.5]
  assert list(found)[0] == "even"


def test_equal_methods_share_a_rank_and_differ_by_nothing():
  sheet = {"x": items(RNG.integers(0, 2, 40))}
  experts = {"x": items(np.ones(40))}
  found = merge_bench.standings({"a": sheet, "b": sheet}, experts)
  assert found["a"].rank == found["b"].rank == 1.5
  assert merge_bench.difference(sheet, sheet, experts) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_difference_covers_as_often_as_it_says():
  experts = {"x": items(np.ones(200))}
  inside = 0
  for seed in range(60):
    rng = np.random.default_rng(seed)
    shared = rng.random(200)
    a, b = items(shared < 0.6), items(shared < 0.5)  # paired: the same items are hard for both
    _, low, high = merge_bench.difference({"x": a}, {"x": b}, experts, resamples=300, seed=seed)
    inside += low <= 0.1 <= high
    assert high - low < 0.12  # an unpaired interval would be about 0.19 wide
  assert inside >= 50


def test_conflicts_against_definitions():
  base = model_lib.Model(None, {"w": jnp.zeros((3, 4)), "v": jnp.zeros(5)})
  flat = RNG.standard_normal((2, 17)).astype(np.float32)
  experts = {
    n: base.replace(params={"w": jnp.asarray(x[:12]).reshape(3, 4), "v": jnp.asarray(x[12:])})
    for n, x in zip("ab", flat, strict=True)
  }
  _, cosines, clashes = merge_bench.conflicts(base, experts)
  a, b = flat.astype(np.float64)
  assert cosines[0, 1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
  mass = np.abs(a * b)
  assert clashes[0, 1] == pytest.approx(mass[a * b < 0].sum() / mass.sum(), abs=1e-6)
  assert clashes[0, 0] == 0


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="the expert of 'x' scores 0"):
    merge_bench.standings({"a": {"x": items([1])}}, {"x": items([0])})
  with pytest.raises(ValueError, match="'a' has no items of the task 'x'"):
    merge_bench.standings({"a": {}}, {"x": items([1])})
