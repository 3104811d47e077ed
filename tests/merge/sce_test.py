# SPDX-License-Identifier: Apache-2.0
"""SCE against a float64 transcription of its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.merge import sce

RNG = np.random.default_rng(0)
BASE = RNG.standard_normal((13, 11)).astype(np.float32)


def tuned(count, near=0.5):
  return [(BASE + near * RNG.standard_normal(BASE.shape)).astype(np.float32) for _ in range(count)]


def oracle(base, donors, share):
  d = np.stack([x - base for x in donors]).astype(np.float64)
  if share < 1:
    variance = d.var(0).ravel()
    keep = np.argsort(-variance, kind="stable")[: int(share * (variance != 0).sum())]
    mask = np.zeros(variance.size)
    mask[keep] = 1
    d = d * mask.reshape(base.shape)
  weight = (d**2).reshape(len(d), -1).mean(1)
  weight = weight / weight.sum() if weight.sum() > 1e-6 else np.full(len(d), 1 / len(d))
  sign = np.where(d.sum(0) >= 0, 1, -1)
  kept = weight[:, None, None] * (np.sign(d) == sign)
  return base + (d * kept).sum(0) / np.maximum(kept.sum(0), 1e-6)


def merged(donors, **more):
  return sce.select_calculate_erase(jnp.asarray(BASE), tuple(map(jnp.asarray, donors)), **more)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.1, 0.001, 0.0])
@pytest.mark.parametrize("near", [0.5, 1e-4])
def test_equals_the_definition(count, share, near):
  donors = tuned(count, near)
  wanted = oracle(BASE, donors, share)
  np.testing.assert_allclose(merged(donors, select_topk=share), wanted, rtol=0, atol=2e-6)


def test_only_varying_positions_are_counted():
  a, b = tuned(2)
  b[:, 3:] = a[:, 3:]  # all agree there: no variance
  got = np.asarray(merged([a, b], select_topk=0.5))
  np.testing.assert_allclose(got, oracle(BASE, [a, b], 0.5), rtol=0, atol=2e-6)
  assert (got[:, 3:] == BASE[:, 3:]).all()
  assert (got[:, :3] != BASE[:, :3]).sum() == 13 * 3 // 2


def test_equal_variances_are_kept_in_order():
  base = jnp.zeros(6)
  got = sce.select_calculate_erase(base, (base + 1, base - 3), select_topk=0.5)
  np.testing.assert_allclose(got, [-3, -3, -3, 0, 0, 0], rtol=1e-6)


def test_one_donor():
  (a,) = tuned(1)
  np.testing.assert_allclose(merged([a]), a, rtol=0, atol=1e-6)
  assert (merged([a], select_topk=0.9) == BASE).all()


def test_storage_dtype_and_mistakes():
  low = jnp.asarray(BASE, jnp.bfloat16)
  assert sce.select_calculate_erase(low, (low + 1,), select_topk=0.3).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="select_topk=1.5 must lie between 0 and 1"):
    sce.sce(select_topk=1.5)
