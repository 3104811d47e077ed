# SPDX-License-Identifier: Apache-2.0
"""SpQR: leave-one-out scores by brute force, planted outliers, bits, what outliers are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import outliers, rounding, spqr
from treesurgeon.core import leaves, model
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"
RUN = jax.jit(spqr.quantize, static_argnames=("bits", "group_size", "outliers"))


def problem(rows=40, cols=32, seed=0):
  rng = np.random.default_rng(seed)
  mixed = np.eye(rows) + 0.1 * rng.normal(size=(rows, rows))
  w, x = rng.normal(size=(rows, cols)), rng.normal(size=(300, rows)) @ mixed
  return w.astype(np.float32), (x.T @ x / 300).astype(np.float32)


def group_error(x, weight, keep, bits):
  s = (x[keep].max() - x[keep].min()) / (2**bits - 1)
  z = -x[keep].min() / s
  wrong = x - (np.clip(np.round(x / s + z), 0, 2**bits - 1) - z) * s
  return (wrong**2 * weight)[keep].sum()


def test_scores_by_brute_force():
  w, _ = problem(20, 5)
  weight = np.random.default_rng(1).uniform(0.5, 2, 20).astype("float32")
  got = spqr.scores(jnp.asarray(w), jnp.asarray(weight), bits=3, group_size=8)
  for r in range(20):
    group = slice(r // 8 * 8, min(r // 8 * 8 + 8, 20))
    for c in range(5):
      x, some = w[group, c].astype(np.float64), np.ones(group.stop - group.start, bool)
      base = group_error(x, weight[group], some, 3)
      some[r - group.start] = False
      expected = base - group_error(x, weight[group], some, 3)
      assert float(got[r, c]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def lost(w, h, q):
  d = np.asarray(q, np.float64) - w
  return np.trace(d.T @ h @ d)


def test_planted_outliers_are_found_and_kept():
  w, h = problem()
  rng = np.random.default_rng(2)
  at = rng.integers(0, 40, 6) * 32 + rng.permutation(32)[:6]  # one a group
  w.ravel()[at] = 12 * np.sign(rng.normal(size=6))
  leaf = RUN(jnp.asarray(w), jnp.asarray(h), bits=3, group_size=8, outliers=0.02)
  base, kept = leaf.parts
  # Next to an outlier other weights lose much too, and may score more than another's outlier.
  assert kept.values.shape == (1, 26) and set(np.asarray(kept.positions)[0]) >= set(at)
  # They are what they were but for the correction of the errors before them.
  assert np.abs(np.asarray(leaf.dense()).ravel()[at] - w.ravel()[at]).max() < 2
  none = RUN(jnp.asarray(w), jnp.asarray(h), bits=3, group_size=8, outliers=0.0)
  assert isinstance(none, leaves.QuantizedTensor)
  assert lost(w, h, leaf.dense()) < 0.6 * lost(w, h, none.dense())
  assert leaves.bits_per_weight(leaf) == pytest.approx(
    3 + 2 * (3 / 8 + 64 / (8 * 16)) + 64 * 26 / 1280, abs=0.05
  )


def test_bits_at_the_defaults_of_the_paper():
  shapes = jax.eval_shape(
    lambda w, h: spqr.quantize(w, h),
    jax.ShapeDtypeStruct((512, 512), "bfloat16"), jax.ShapeDtypeStruct((512, 512), "float32"),
  )  # fmt: skip
  # 3 + (3 + 3) / 16 + 4 * 16 / (16 * 16), and 48 bits for one weight in a hundred.
  assert leaves.bits_per_weight(shapes) == pytest.approx(3.625 + 0.48, abs=0.01)


def test_what_is_kept_is_what_the_correction_asks_for():
  w, h = problem(16, 16)
  leaf = RUN(jnp.asarray(w), jnp.asarray(h), bits=3, group_size=8, outliers=0.1)
  q, places = np.asarray(leaf.dense(), np.float64), np.asarray(leaf.parts[1].positions)[0]
  order = np.argsort(-np.diag(h), kind="stable")
  ratios = np.asarray(rounding.ratios(jnp.asarray(h[order][:, order]), 1.0), np.float64)
  wanted = w[order] + ratios @ (w[order] - q[order])
  back = np.argsort(order)
  np.testing.assert_allclose(q.ravel()[places], wanted[back].ravel()[places], atol=1e-3)
  scales = np.asarray(leaf.parts[0].scales.dense())[np.arange(16) // 8]
  inside = np.ones(w.size, bool)
  inside[places] = False
  off = np.abs(q - wanted[back]).ravel()[inside] / scales.ravel()[inside]
  assert (off <= 0.5 + 1e-3).mean() > 0.8  # the rest is rounded, or clipped


def test_leaf_and_its_fixed_point():
  w, h = problem()
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.asarray(w)[None]}}}}})
  given = {"hessian": {ADDRESS: folds.SecondMoment(jnp.asarray(h), jnp.asarray(300.0))}}
  (one,) = spqr.spqr(group_size=8)
  leaf = one.apply(m, given, KEY).leaf(ADDRESS)
  assert outliers.is_beside(leaf, leaves.QuantizedTensor)
  assert leaf.parts[0].scales.bits == leaf.parts[0].zeros.bits == 3
  again = one.apply(m.update({ADDRESS: leaf}), given, KEY).leaf(ADDRESS)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)


def test_arguments_are_checked():
  with pytest.raises(ValueError, match=r"outliers=1.5: valid is a fraction"):
    spqr.spqr(outliers=1.5)
  with pytest.raises(ValueError, match="scale_bits=9"):
    spqr.spqr(scale_bits=9)
  with pytest.raises(ValueError, match=r"damping=-1.0"):
    spqr.spqr(damping=-1.0)
