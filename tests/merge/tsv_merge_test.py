# SPDX-License-Identifier: Apache-2.0
"""TSV-M against a float64 transcription of the paper, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model, needs
from treesurgeon.merge import tsv_merge

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def oracle(base, donors, lam=1.0):
  """The official algorithm, null directions and all."""
  r, count = min(base.shape), len(donors)
  k = r // count
  u_all, s_all = np.zeros((base.shape[0], r)), np.zeros(r)
  v_all = np.zeros((r, base.shape[1]))
  for i, d in enumerate(donors):
    u, s, v = np.linalg.svd(d.astype(np.float64) - base, full_matrices=False)
    at = slice(i * k, (i + 1) * k)
    u_all[:, at], s_all[at], v_all[at] = u[:, :k], s[:k], v[:k]
  uu, _, uv = np.linalg.svd(u_all, full_matrices=False)
  vu, _, vv = np.linalg.svd(v_all, full_matrices=False)
  return base + lam * (uu @ uv) @ np.diag(s_all) @ (vu @ vv)


def draw(shape, count):
  base = RNG.standard_normal(shape).astype(np.float32)
  return base, [(base + 0.1 * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]


# Compiled as one program: by itself, each of its operations would be compiled for each shape.
run = jax.jit(tsv_merge.merge_singular_vectors, static_argnames="matrix")


def merge(base, donors, **more):
  return run(jnp.asarray(base), tuple(map(jnp.asarray, donors)), **more)


@pytest.mark.parametrize("shape, count", [((17, 29), 2), ((29, 17), 3), ((16, 16), 5)])
def test_equals_the_definition(shape, count):
  base, donors = draw(shape, count)
  got = merge(base, donors, lam=0.7)
  np.testing.assert_allclose(got, oracle(base, donors, 0.7), atol=3e-6, rtol=0)


def test_one_donor_is_returned():
  base, donors = draw((12, 20), 1)
  np.testing.assert_allclose(merge(base, donors), donors[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_orthogonal_subspaces_give_the_exact_sum(rank):
  # Rank 4 of 12 with three donors is k in full; of the lower ranks the official code would let
  # null vectors leak.
  left = np.linalg.qr(RNG.standard_normal((12, 12)))[0]
  right = np.linalg.qr(RNG.standard_normal((18, 18)))[0]
  base = RNG.standard_normal((12, 18)).astype(np.float32)
  deltas = []
  for i in range(3):
    at = slice(4 * i, 4 * i + rank)
    deltas.append(left[:, at] @ np.diag(RNG.uniform(0.5, 2, rank)) @ right[:, at].T)
  donors = [(base + d).astype(np.float32) for d in deltas]
  np.testing.assert_allclose(merge(base, donors), base + sum(deltas), atol=5e-6, rtol=0)


def test_equal_donors_of_low_rank_are_counted_once():
  base = np.zeros((10, 8), np.float32)
  delta = (RNG.standard_normal((10, 2)) @ RNG.standard_normal((2, 8))).astype(np.float32)
  np.testing.assert_allclose(merge(base, [delta, delta]), delta, atol=1e-5, rtol=0)


def test_small_directions_hold_in_float32():
  left = np.linalg.qr(RNG.standard_normal((24, 24)))[0]
  right = np.linalg.qr(RNG.standard_normal((32, 24)))[0]
  donors = []
  for i in range(2):
    s = np.logspace(0, -4, 24)
    turn = np.roll(np.arange(24), 12 * i)
    donors.append(((left[:, turn] * s) @ right[:, turn].T).astype(np.float32))
  base = np.zeros((24, 32), np.float32)
  got, wanted = np.asarray(merge(base, donors)), oracle(base, donors)
  small = left[:, 12:].T @ (got - wanted) @ right[:, 12:]
  assert np.abs(small).max() < 1e-5  # the largest direction is 1
  np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)


def test_weights_scale_the_changes_first():
  base, donors = draw((9, 14), 2)
  scaled = [base + c * (d - base) for c, d in zip((0.5, 2.0), donors, strict=True)]
  got = merge(base, donors, weights=(0.5, 2.0))
  np.testing.assert_allclose(got, oracle(base, scaled), atol=3e-6, rtol=0)


def test_other_leaves_receive_the_mean():
  for shape in ((7,), (2, 3, 4)):
    base, donors = draw(shape, 3)
    base, donors = np.asarray(base), [np.asarray(d) for d in donors]
    got = merge(base, donors, lam=0.5)
    mean = np.mean([d.astype(np.float64) - base for d in donors], axis=0)
    np.testing.assert_allclose(got, base + 0.5 * mean, atol=1e-6, rtol=0)
  base, donors = draw((6, 5), 2)
  got = merge(base, donors, matrix=False)
  np.testing.assert_allclose(got, np.mean(donors, axis=0), atol=1e-6, rtol=0)


def test_edges():
  base, donors = draw((6, 5), 2)
  np.testing.assert_array_equal(merge(base, [base, base]), base)
  got = merge(base, [donors[0], base])  # a donor that changed nothing takes no room
  assert np.isfinite(got).all()
  many = merge(*draw((3, 4), 6))  # more donors than directions
  assert np.isfinite(many).all()
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  got = merge(cast[0], cast[1:])
  assert got.dtype == jnp.bfloat16
  wide = [x.astype(jnp.float32) for x in cast]
  np.testing.assert_array_equal(got, merge(wide[0], wide[1:]).astype(jnp.bfloat16))


def test_rules_choose_the_matrices():
  base, donors = draw((6, 5), 2)
  m = model.Part(None, {"a/kernel": jnp.asarray(base), "b/kernel": jnp.asarray(base)})
  others = [m.update({"a/kernel": jnp.asarray(d), "b/kernel": jnp.asarray(d)}) for d in donors]
  (one,) = tsv_merge.tsv_merge(matrices="a/.*")
  out = one.apply(m, {"donors": needs.Aligned(others)}, KEY)
  np.testing.assert_allclose(out.leaf("a/kernel"), oracle(base, donors), atol=3e-6, rtol=0)
  np.testing.assert_allclose(out.leaf("b/kernel"), np.mean(donors, axis=0), atol=1e-6, rtol=0)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"matrices='\(' is not a regular expression"):
    registry.parse("merge.tsv_merge(matrices='(')")
  with pytest.raises(ValueError, match=r"weights=\(1.0,\) has 1 entries for 2 donors"):
    tsv_merge.merge_singular_vectors(jnp.ones(2), (jnp.ones(2),) * 2, weights=(1.0,))
