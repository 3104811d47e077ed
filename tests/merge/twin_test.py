# SPDX-License-Identifier: Apache-2.0
"""Twin-Merging: exact at full rank, truncated SVD below it, sizes counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model
from treesurgeon.merge import task_arithmetic, twin

RNG = np.random.default_rng(0)


def draw(count, shape=(9, 6)):
  base = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
  return base, tuple(
    base + jnp.asarray(0.1 * RNG.standard_normal(shape), jnp.float32) for _ in range(count)
  )


def test_full_rank_and_a_one_hot_router_give_each_expert():
  for shape in ((9, 6), (7,)):
    base, donors = draw(3, shape)
    for i, donor in enumerate(donors):
      router = tuple(float(i == j) for j in range(3))
      got = twin.mix(base, donors, router=router, rank=1.0)
      np.testing.assert_allclose(got, donor, atol=1e-6)


def test_equals_the_definition():
  base, donors = draw(3)
  weights, router, lam = (1.0, 0.5, 2.0), (0.7, 0.2, 0.4), 0.3
  b, *ds = (np.asarray(x, np.float64) for x in (base, *donors))
  common = b + lam * sum(c * (d - b) for c, d in zip(weights, ds, strict=True))
  wanted = common.copy()
  for r, d in zip(router, ds, strict=True):
    u, s, vh = np.linalg.svd(d - common, full_matrices=False)
    wanted += r * (u[:, :3] * s[:3]) @ vh[:3]  # int(0.5 * 6)
  got = twin.mix(base, donors, router=router, rank=0.5, lam=lam, weights=weights)
  np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_without_exclusive_parts_it_is_task_arithmetic():
  base, donors = draw(2)
  got = twin.mix(base, donors, rank=0.0, lam=0.3)
  np.testing.assert_array_equal(got, task_arithmetic.add_task_vectors(base, donors, lam=0.3))


def test_factors_hold_what_is_mixed_and_the_ratio_counts_them():
  part = jnp.asarray(RNG.standard_normal((10, 8)), jnp.float32)
  low = twin.factors(part, rank=0.25)
  assert (low.a.shape, low.b.shape) == ((10, 2), (2, 8))
  np.testing.assert_allclose(low.dense(), twin.cut(part, rank=0.25), atol=1e-6)
  stack = jnp.stack([part, 2 * part])
  np.testing.assert_allclose(twin.cut(stack, rank=0.25)[1], 2 * low.dense(), atol=1e-5)
  m = model.Part(None, {"a": jnp.ones((10, 8)), "b": jnp.ones(8)})
  wanted = (88 + 3 * (2 * 18 + 8)) / (3 * 88)
  assert twin.size_ratio(m, 3, rank=0.25) == pytest.approx(wanted)
  assert twin.size_ratio(m, 3, rank=0.0) == pytest.approx(1 / 3)


def test_bfloat16_and_scalars():
  for shape in ((), (3,), (2, 2)):
    base = jnp.ones(shape, jnp.bfloat16)
    got = twin.mix(base, (base, base), rank=0.5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="rank=2 must lie between 0 and 1"):
    registry.parse("merge.twin(rank=2)")
  (one,) = twin.twin(router=(1.0,))
  donors = {"a": (jnp.ones(1), jnp.ones(1))}
  with pytest.raises(ValueError, match=r"router=\(1.0,\) has 1 entries for 2 donors"):
    one.apply(model.Part(None, {"a": jnp.ones(1)}), {"donors": donors}, jax.random.key(0))
