# SPDX-License-Identifier: Apache-2.0
"""Isotropic merging against a float64 transcription of the paper, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.merge import iso_c

RNG = np.random.default_rng(0)
# Compiled as one program: by itself, each of its operations would be compiled for each shape.
one = jax.jit(iso_c.flatten_spectrum)
two = jax.jit(iso_c.flatten_common_and_task, static_argnames=("common", "axis"))


def draw(shape, count):
  base = RNG.standard_normal(shape).astype(np.float32)
  return base, [(base + 0.1 * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]


def arrays(base, donors):
  return jnp.asarray(base), tuple(map(jnp.asarray, donors))


def deltas_of(base, donors):
  return [d.astype(np.float64) - base for d in donors]


def oracle_c(base, donors, lam=1.0):
  u, s, v = np.linalg.svd(sum(deltas_of(base, donors)), full_matrices=False)
  return base + lam * s.mean() * u @ v


def oracle_cts(base, donors, lam=1.0, common=0.8):
  """The official algorithm; rows are output neurons."""
  deltas = deltas_of(base, donors)
  r, count = min(base.shape), len(donors)
  index = int(r * common)
  index = r - round((r - index) / count) * count
  each = (r - index) // count
  u, s, v = np.linalg.svd(sum(deltas), full_matrices=False)
  us, ss, vs = [], [], []
  for d in deltas:
    rest = d - u[:, :index] @ u[:, :index].T @ d
    a, b, c = np.linalg.svd(rest, full_matrices=False)
    us.append(a[:, :each]), ss.append(b[:each]), vs.append(c[:each])
  left = np.concatenate([*us, u[:, :index]], axis=1)
  right = np.concatenate([*vs, v[:index]], axis=0)
  sigma = np.concatenate([*ss, s[:index]]).mean()
  a, _, b = np.linalg.svd(left, full_matrices=False)
  c, _, d = np.linalg.svd(right, full_matrices=False)
  return base + lam * sigma * (a @ b) @ (c @ d)


@pytest.mark.parametrize("shape", [(17, 29), (29, 17)])
def test_equals_the_definition(shape):
  base, donors = draw(shape, 3)
  got = one(*arrays(base, donors), lam=1.3)
  np.testing.assert_allclose(got, oracle_c(base, donors, 1.3), atol=5e-6, rtol=0)


def test_the_nuclear_norm_is_kept_and_the_spectrum_flat():
  base, donors = draw((12, 20), 4)
  got = np.asarray(one(*arrays(base, donors)), np.float64) - base
  before = np.linalg.svd(sum(deltas_of(base, donors)), compute_uv=False)
  after = np.linalg.svd(got, compute_uv=False)
  np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-5)
  np.testing.assert_allclose(after, after.mean(), rtol=1e-4)


def test_the_nuclear_norm_is_kept_where_the_rank_is_low():
  low = [RNG.standard_normal((12, 2)) @ RNG.standard_normal((2, 20)) for _ in range(2)]
  donors = [d.astype(np.float32) for d in low]
  base = np.zeros((12, 20), np.float32)
  for fn in (one, two):
    after = np.linalg.svd(fn(*arrays(base, donors)), compute_uv=False)
    np.testing.assert_allclose(after[:4], after[0], rtol=1e-4)
    assert after[4] < 1e-4 * after[0]
  before = np.linalg.svd(sum(donors), compute_uv=False)
  after = np.linalg.svd(one(*arrays(base, donors)), compute_uv=False)
  np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-5)


@pytest.mark.parametrize(
  "shape, count, common", [((17, 29), 2, 0.8), ((17, 29), 3, 0.2), ((29, 17), 3, 0.5)]
)
def test_common_and_task_equals_the_definition(shape, count, common):
  base, donors = draw(shape, count)
  got = two(*arrays(base, donors), lam=1.3, common=common)
  np.testing.assert_allclose(got, oracle_cts(base, donors, 1.3, common), atol=2e-5, rtol=0)


def test_a_kernel_is_turned():
  base, donors = draw((10, 15), 2)
  turned = [d.T for d in donors]
  got = two(*arrays(base.T, turned), axis=0, common=0.5)
  np.testing.assert_allclose(got.T, oracle_cts(base, donors, common=0.5), atol=1e-5, rtol=0)


def test_one_donor_or_all_in_common_is_the_common_method():
  base, donors = draw((12, 9), 1)
  wanted = oracle_c(base, donors)
  got = two(*arrays(base, donors))
  np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
  base, donors = draw((12, 9), 3)
  got = two(*arrays(base, donors), common=1.0)
  np.testing.assert_allclose(got, oracle_c(base, donors), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fn", [one, two])
def test_edges(fn):
  base, donors = draw((6, 5), 2)
  np.testing.assert_array_equal(fn(*arrays(base, [base, base])), base)
  assert np.isfinite(fn(*arrays(base, [donors[0], base]))).all()
  assert np.isfinite(fn(*arrays(*draw((3, 4), 6)))).all()
  assert np.isfinite(fn(*arrays(*draw((1, 4), 2)))).all()
  base, donors = draw((2, 3, 4), 3)
  mean = np.mean(deltas_of(base, donors), axis=0)
  got = fn(*arrays(base, donors), lam=0.5)
  np.testing.assert_allclose(got, base + 0.5 * mean, atol=1e-6, rtol=0)
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  assert fn(cast[0], tuple(cast[1:])).dtype == jnp.bfloat16


def test_no_common_space_with_an_odd_share():
  # round(8 / 3) * 3 is more than 8 directions: rounded down here.
  got = two(*arrays(*draw((8, 10), 3)), common=0.0)
  assert np.isfinite(got).all()


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"common=1.5 must lie between 0 and 1"):
    registry.parse("merge.iso_cts(common=1.5)")
  with pytest.raises(ValueError, match=r"at least one model among the donors"):
    iso_c.flatten_spectrum(jnp.ones((2, 2)), ())
