# SPDX-License-Identifier: Apache-2.0
"""Aligned groups of two widths: the choice and the values by numpy, exact bits, random blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import aligned
from treesurgeon.core import leaves, model
from treesurgeon.run import dry

NAMES = ("count", "group_size", "outliers", "scale_dtype")
RUN = jax.jit(aligned.quantize, static_argnames=NAMES)


def problem(rows, cols, seed=0):
  """Returns weights whose ranges differ by block of 4 rows and 3 columns."""
  rng = np.random.default_rng(seed)
  size = np.exp(0.8 * rng.normal(size=(-(-rows // 4), -(-cols // 3))))
  size = np.kron(size, np.ones((4, 3)))[:rows, :cols]
  return (rng.normal(size=(rows, cols)) * size).astype(np.float32)


def rounded(x, bits):
  x = x.astype(np.float64)
  low, high = min(x.min(), 0), max(x.max(), 0)
  s = (high - low) / (2**bits - 1) or 1.0
  zero = np.clip(np.round(-low / s), 0, 2**bits - 1)
  return (np.clip(np.round(x / s + zero), 0, 2**bits - 1) - zero) * s


def test_choice_and_values_by_numpy():
  w = problem(18, 8)  # five groups, the last of 2 rows; blocks of 3, 3 and 2 columns
  chosen = np.asarray(aligned.widest(jnp.asarray(w), group_size=4, align=3, count=2))
  assert chosen.shape == (5, 8)
  for block in (slice(0, 3), slice(3, 6), slice(6, 8)):
    ranges = [
      sum(max(x.max(), 0) - min(x.min(), 0) for x in w[r : r + 4, block].T) for r in range(0, 18, 4)
    ]
    best = set(np.argsort(ranges)[-2:])
    for column in chosen[:, block].T:
      assert set(np.flatnonzero(column)) == best
  leaf = RUN(
    jnp.asarray(w), jnp.asarray(chosen), count=2, group_size=4, outliers=0.05, scale_dtype=None
  )
  narrow = np.repeat(~chosen, 4, axis=0)[:18]
  kept = np.zeros(18 * 8, bool)
  kept[np.argsort(-np.where(narrow, np.abs(w), 0).ravel())[:7]] = True
  kept = kept.reshape(18, 8)
  assert not (kept & ~narrow).any()
  expected = w.astype(np.float64)
  for g, c in np.ndindex(5, 8):
    at = (slice(4 * g, 4 * g + 4), c)
    x = rounded(np.where(kept, 0, w)[at], 4 if chosen[g, c] else 2)
    expected[at] = np.where(kept[at], w[at], x)
  np.testing.assert_allclose(leaf.dense(), expected, atol=2e-6)
  np.testing.assert_array_equal(np.asarray(leaf.dense())[kept], w[kept])


def test_bits_are_exact_and_the_papers():
  w = jax.ShapeDtypeStruct((1, 4096, 4096), "bfloat16")
  m = model.Model(None, {"layers": {"0:1": {"up": {"kernel": w}}}})
  (leaf,) = jax.tree.leaves(dry.dry_run(aligned.aligned(), m).params, is_leaf=leaves.is_leaf)
  # Codes; 8-bit scales and zero points; a scale and a zero point for 256 scales; two masks;
  # a weight and its place for 2 in a thousand.
  share = 13 / 128
  inside = 2 * (1 - share) + 4 * share + 16 / 32 + 2 / 32 + 0.002 * 48
  assert leaves.bits_per_weight(leaf) == pytest.approx(inside + 40 / (256 * 32), abs=2e-3)
  assert 2.8 < inside < 2.9


def test_the_widest_blocks_beat_random_ones_of_as_many_bits():
  w = jnp.asarray(problem(64, 12, seed=3))
  how = {"count": 4, "group_size": 4, "outliers": 0.0, "scale_dtype": None}

  def lost(chosen):
    leaf = RUN(w, chosen, **how)
    return float(jnp.square(leaf.dense() - w).sum()), leaves.nbytes(leaf)

  best, size = lost(aligned.widest(w, group_size=4, align=3, count=4))
  rng = np.random.default_rng(0)
  for _ in range(5):
    blocks = np.stack([rng.permutation(16) < 4 for _ in range(4)], axis=1)
    other, same = lost(jnp.asarray(np.repeat(blocks, 3, axis=1)))
    assert best < 0.8 * other and size == same
  # What alignment costs: single groups chosen for each column by itself are at least as good here.
  assert lost(aligned.widest(w, group_size=4, align=1, count=4))[0] < 1.1 * best


def test_what_is_out_of_range_is_named():
  with pytest.raises(ValueError, match=r"wide=1.5: valid is a fraction of the groups"):
    aligned.aligned(wide=1.5)
  with pytest.raises(ValueError, match="align=0: blocks have 1 column or more"):
    aligned.aligned(align=0)
  with pytest.raises(ValueError, match="bits=9"):
    aligned.aligned(wide_bits=9)
