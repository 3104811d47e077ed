# SPDX-License-Identifier: Apache-2.0
"""OliVe: pairs by brute force, scales by exhaustive search, heavy tails, integers without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import olive, rtn
from treesurgeon.core import leaves, model, packing, paths
from treesurgeon.core.leaves import outlier_victim

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"
NORMAL = {False: [4.0 * i for i in range(8)], True: [0.0, 2, 4, 6, 8, 12, 16, 32]}
FAR = [48.0, 64, 96, 128, 192, 256, 384]


def pair(a, b, flint):
  """Rounds a pair as the paper says: both to the nearest value, then the neighbour is zeroed."""
  signed = sorted({s * v for v in NORMAL[flint] + FAR for s in (1, -1)}, key=abs)
  x, y = (min(signed, key=lambda v, z=z: abs(v - z)) for z in (a, b))
  if abs(x) > 32:
    return x, 0.0
  return (0.0, y) if abs(y) > 32 else (x, y)


def stored(units, flint, bits=4):
  codes = olive.encode(jnp.asarray(units, jnp.float32), bits=bits, flint=flint)
  rows, cols = units.shape
  kind = jnp.full((1, 1), flint, jnp.uint8)
  return leaves.OutlierVictim(
    packing.pack(codes, bits=bits), jnp.ones((1, cols)), kind, rows, cols, bits
  )


@pytest.mark.parametrize("flint", [False, True])
def test_pairs_by_brute_force(flint):
  units = np.random.default_rng(0).standard_t(2, size=(40, 30)) * 20
  got = np.asarray(stored(units, flint).dense())
  for r in range(0, 40, 2):
    for c in range(30):
      assert tuple(got[r : r + 2, c]) == pair(units[r, c], units[r + 1, c], flint)
  assert (np.abs(units) > 40).reshape(20, 2, 30).all(axis=1).any()  # pairs of two outliers


def test_every_pair_of_codes_decodes_and_comes_back():
  codes = np.stack(np.meshgrid(np.arange(16), np.arange(16)), axis=0).reshape(2, -1)
  leaf = leaves.OutlierVictim(
    packing.pack(jnp.asarray(codes, jnp.uint8), bits=4), jnp.ones((1, 256)), None, 2, 256
  )
  values = np.asarray(leaf.dense())
  for i, (a, b) in enumerate(codes.T):
    table = [NORMAL[False] if other != 8 else [0.0, *FAR] for other in (b, a)]
    expected = [t[c % 8] * (-1 if c > 8 else 1) for t, c in zip(table, (a, b), strict=True)]
    assert values[:, i].tolist() == expected
  again = np.asarray(olive.encode(leaf.dense(), bits=4))
  marked = (codes == 8).sum(axis=0)
  # Two identifiers, or one beside the unused outlier code 0, are never written: they mean zeros.
  written = (marked == 0) | ((marked == 1) & (codes != 0).all(axis=0))
  np.testing.assert_array_equal(again[:, written], codes[:, written])
  assert not values[:, ~written].any()


def test_eight_bits_are_the_tables_of_the_published_code():
  far = [2.0**i * (1 + j / 32) for i in range(5, 9) for j in range(32)][1:]
  np.testing.assert_array_equal(outlier_victim.outliers(8), far)
  np.testing.assert_array_equal(outlier_victim.normals(8, flint=False), np.arange(128) / 4)
  units = np.random.default_rng(1).normal(size=(6, 9)) * 40
  got, table = np.asarray(stored(units, False, 8).dense()), np.r_[np.arange(128) / 4, far]
  whole = np.abs(np.abs(units)[..., None] - table).argmin(axis=-1)
  far = whole >= 128
  alone = ~far.reshape(3, 2, 9).any(axis=1).repeat(2, axis=0)
  np.testing.assert_array_equal(got[alone], (np.sign(units) * table[whole])[alone])


def test_scales_are_the_best_of_the_search():
  w = np.random.default_rng(2).standard_t(3, size=(31, 4)).astype(np.float32)
  _, scales, flint = jax.jit(olive.quantize)(jnp.asarray(w))
  units = stored(w / np.asarray(scales), bool(flint[0, 0])).dense()
  top = np.abs(w.mean(0) + np.outer([3, -3], w.std(0, ddof=1))).max(axis=0)
  losses = {}
  for kind in (False, True):
    grid = top / NORMAL[kind][-1]
    trials = [grid * (i * 0.01) for i in range(75, 250, 2)]
    tried = [((np.asarray(stored(w / s, kind).dense()) * s - w) ** 2).sum(axis=0) for s in trials]
    losses[kind] = np.min(tried, axis=0)
  best = min(losses, key=lambda kind: losses[kind].sum())
  assert bool(flint[0, 0]) == best
  np.testing.assert_allclose(((units * scales - w) ** 2).sum(axis=0), losses[best], rtol=1e-4)


def lost(step, m):
  w = m.leaf(ADDRESS)
  return float(((step.apply(m, {}, KEY).leaf(ADDRESS).dense() - w) ** 2).sum())


def test_planted_tails_gain_and_normal_weights_do_not_need_them():
  rng = np.random.default_rng(3)
  w = rng.normal(size=(256, 16))
  heavy = w.copy()
  heavy[rng.integers(0, 256, 48), rng.integers(0, 16, 48)] *= 12
  both = [olive.olive()[0], rtn.rtn(bits=4, group_size=-1, mse=True)[0]]
  losses = []
  for x in (w, heavy):
    kernel = jnp.asarray(x[None], jnp.float32)
    m = model.Model(None, paths.nest({"layers/0:1/mlp/up/kernel": kernel}))
    losses.append([lost(s, m) for s in both])
  assert losses[1][0] < 0.3 * losses[1][1], losses
  assert losses[0][0] < 1.5 * losses[0][1], losses
  leaf = olive.olive()[0].apply(m, {}, KEY).leaf(ADDRESS)
  assert leaf.nbytes == 256 * 16 // 2 + 16 * 4 + 1  # four bits a weight, scales, the kind


def test_without_outliers_it_is_int4_of_the_same_scale():
  w = np.random.default_rng(4).uniform(-1, 1, size=(16, 5))
  got = np.asarray(stored(w * 28, False).dense()) / 28
  np.testing.assert_allclose(got, np.round(w * 7) / 7, atol=1e-6)


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="bits=3: outlier-victim pairs have codes of 4 or 8 bits"):
    olive.olive(bits=3)
