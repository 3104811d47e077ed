# SPDX-License-Identifier: Apache-2.0
"""TIES against a float64 transcription of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model, needs, step
from treesurgeon.merge import ties

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def trimmed(delta, k):
  out = np.zeros(delta.size)
  order = np.argsort(-np.abs(delta.astype(np.float32)).ravel(), kind="stable")[:k]
  out[order] = delta.ravel()[order]
  return out.reshape(delta.shape)


def oracle(base, donors, weights, density, lam=1.0, normalize=True):
  deltas = [(d - base).astype(np.float32).astype(np.float64) for d in donors]
  return elect(base, [trimmed(d, max(1, int(density * d.size))) for d in deltas], weights, lam,
               normalize)  # fmt: skip


def elect(base, deltas, weights, lam, normalize):
  deltas = [w * d for w, d in zip(weights, deltas, strict=True)]
  sign = np.where(sum(deltas) >= 0, 1, -1)
  agrees = [np.sign(d) == sign for d in deltas]
  total = sum(np.where(a, d, 0) for a, d in zip(agrees, deltas, strict=True))
  divisor = sum(np.where(a, w, 0) for a, w in zip(agrees, weights, strict=True))
  if normalize:
    total = total / np.where(divisor == 0, 1, divisor)
  return base + lam * total


def draw(shape, count):
  base = RNG.standard_normal(shape).astype(np.float32)
  near = [(base + 0.1 * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]
  return base, near


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (1.0, -0.5, 1.0)])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.75])
def test_equals_the_definition(density, weights, normalize):
  base, donors = draw((17, 23), 3)
  got = ties.trim_elect_merge(
    jnp.asarray(base), tuple(map(jnp.asarray, donors)),
    weights=weights, density=density, lam=0.7, normalize=normalize,
  )  # fmt: skip
  wanted = oracle(base, donors, weights, density, 0.7, normalize)
  np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def test_global_granularity_trims_the_model_as_one_vector():
  shapes = {"a/kernel": (5, 6), "b/kernel": (7,), "c/kernel": (4, 4)}
  drawn = {n: draw(s, 2) for n, s in shapes.items()}
  m = model.Part(None, {n: jnp.asarray(b) for n, (b, _) in drawn.items()})
  donors = [model.Part(None, {n: jnp.asarray(d[i]) for n, (_, d) in drawn.items()}) for i in (0, 1)]
  (one,) = ties.ties(density=0.3, granularity="global", weights=[1.0, 0.5])
  out = one.apply(m, {"donors": needs.Aligned(donors)}, KEY)
  vector = np.concatenate([b.ravel() for b, _ in drawn.values()])
  both = [np.concatenate([d[i].ravel() for _, d in drawn.values()]) for i in (0, 1)]
  wanted = oracle(vector, both, (1.0, 0.5), 0.3)
  got = np.concatenate([np.asarray(out.leaf(n)).ravel() for n in shapes])
  np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def test_one_donor_at_density_one_is_that_donor():
  base, (donor,) = draw((9, 4), 1)
  got = ties.trim_elect_merge(jnp.asarray(base), (jnp.asarray(donor),), density=1.0)
  np.testing.assert_allclose(got, donor, atol=1e-6, rtol=0)


def test_density_zero_keeps_the_base():
  base, donors = draw((9, 4), 2)
  got = ties.trim_elect_merge(jnp.asarray(base), tuple(map(jnp.asarray, donors)), density=0.0)
  np.testing.assert_array_equal(got, base)


def test_opposite_equal_changes_go_to_plus():
  got = ties.trim_elect_merge(jnp.zeros(2), (jnp.array([1.0, 2.0]), -jnp.array([1.0, 2.0])),
                              density=1.0)  # fmt: skip
  assert got.tolist() == [1.0, 2.0]


def test_a_negative_weight_cancels_under_normalize():
  donors = (jnp.array([1.0]), jnp.array([2.0]))
  got = ties.trim_elect_merge(jnp.zeros(1), donors, weights=(1.0, -1.0), density=1.0)
  assert got.tolist() == [2.0]
  got = ties.trim_elect_merge(
    jnp.zeros(1), donors, weights=(1.0, -1.0), density=1.0, normalize=False
  )
  assert got.tolist() == [-2.0]


def test_each_donor_may_have_its_density():
  base, donors = draw((8, 8), 2)
  got = ties.trim_elect_merge(
    jnp.asarray(base), tuple(map(jnp.asarray, donors)), density=(1.0, 0.0)
  )
  np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)


def test_bfloat16_is_merged_in_float32():
  base, donors = draw((16, 16), 3)
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  got = ties.trim_elect_merge(cast[0], tuple(cast[1:]), density=0.5)
  assert got.dtype == jnp.bfloat16
  wide = [x.astype(jnp.float32) for x in cast]
  wanted = ties.trim_elect_merge(wide[0], tuple(wide[1:]), density=0.5).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wanted)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"density=1.5 must lie between 0 and 1"):
    registry.parse("merge.ties(density=1.5)")
  with pytest.raises(ValueError, match="granularity='layer'; valid: tensor, global"):
    registry.parse("merge.ties(granularity='layer')")
  base, donors = jnp.ones(3), (jnp.ones(3), jnp.ones(3))
  with pytest.raises(ValueError, match=r"weights=\(1.0,\) has 1 entries for 2 donors"):
    ties.trim_elect_merge(base, donors, weights=(1.0,))
  with pytest.raises(ValueError, match=r"density=\(0.5,\) has 1 entries for 2 donors"):
    ties.trim_elect_merge(base, donors, density=(0.5,))
  for how in ("tensor", "global"):
    (one,) = ties.ties(granularity=how)
    m = model.Part(None, {"a/kernel": jnp.ones((2, 3))})
    donor = model.Part(None, {"a/kernel": jnp.ones((2, 4))})
    with pytest.raises(ValueError, match=r"a/kernel: donor 0 has shape \(2, 4\), the base has"):
      one.apply(m, {"donors": needs.Aligned([donor])}, KEY)


def test_the_global_step_can_be_aimed():
  (one,) = step.by_path([("a/.*", ties.ties(granularity="global", density=0.5))])
  assert one.scope == "model"
  assert one.units(["a/kernel", "b/kernel", "a/bias"]) == [("a/kernel", "a/bias")]
