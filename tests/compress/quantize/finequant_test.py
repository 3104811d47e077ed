# SPDX-License-Identifier: Apache-2.0
"""FineQuant: finer groups where outliers are planted, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import finequant, rtn
from treesurgeon.core import leaves, model, paths

KEY = jax.random.key(0)
SIZES = (-1, 128, 64, 32, 16)


def weights(outliers, seed=0):
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(200, 24))
  at = rng.permuted(np.tile(np.arange(200)[:, None], (1, 24)), axis=0)[:outliers]
  np.put_along_axis(w, at, 12.0, axis=0)
  return jnp.asarray(w, jnp.float32)


def halvings(w, shrink):
  """Goes through the sizes in float64, as the definition says."""
  before, picked = np.abs(w).max(axis=0).mean(), 0
  for i, size in enumerate(SIZES[1:], 1):
    runs = [np.abs(w[r : r + size]).max(axis=0) for r in range(0, len(w), size)]
    if not np.mean(runs) < shrink * before:
      return picked
    before, picked = np.mean(runs), i
  return picked


@pytest.mark.parametrize(("outliers", "shrink"), [(0, 0.8), (1, 0.8), (2, 0.8), (4, 0.9), (1, 0.0)])
def test_by_definition(outliers, shrink):
  w = weights(outliers)
  got = int(finequant.choose_size(w, sizes=SIZES, shrink=shrink))
  assert got == halvings(np.asarray(w, np.float64), shrink)


def test_only_matrices_with_outliers_get_finer_groups():
  tree = {f"layers/{i}:{i + 1}/up/kernel": weights(n)[None] for i, n in enumerate((0, 1, 0))}
  m = model.Model(None, paths.nest(tree))
  out = finequant.finequant(smallest=16)[0].apply(m, {}, KEY)
  kernels = [out.leaf(f"layers/{i}/up/kernel") for i in range(3)]
  assert [k.group_size for k in kernels] == [200, 16, 200]
  assert leaves.bits_per_weight(kernels[0]) < 4.2 < leaves.bits_per_weight(kernels[1])
  alone = rtn.rtn(group_size=16)[0].apply(m, {}, KEY).leaf("layers/1/up/kernel")
  np.testing.assert_array_equal(kernels[1].dense(), alone.dense())
  column = rtn.rtn(group_size=-1)[0].apply(m, {}, KEY).leaf("layers/1/up/kernel")
  w = m.leaf("layers/1/up/kernel")
  assert ((kernels[1].dense() - w) ** 2).sum() < 0.25 * ((column.dense() - w) ** 2).sum()


def test_arguments_are_checked():
  with pytest.raises(ValueError, match=r"smallest=64, shrink=1.5: .* shrink is 0 to 1"):
    finequant.finequant(shrink=1.5)
  with pytest.raises(ValueError, match="group_size=0"):
    finequant.finequant(smallest=0)
