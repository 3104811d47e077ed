# SPDX-License-Identifier: Apache-2.0
"""SparseGPT against the optimal-brain-surgeon recursion in float64, and its limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.prune import sparsegpt
from treesurgeon.compress.quantize import gptq
from treesurgeon.core import leaves, model
from treesurgeon.stats import folds

ADDRESS = "layers/0/mlp/up/kernel"


def problem(rows, cols, seed=0):
  """Draws weights and the second moment of correlated inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(6 * rows, rows)) @ (rng.normal(size=(rows, rows)) / rows**0.5)
  x = x * np.exp(rng.normal(size=rows))
  return rng.normal(size=(rows, cols)).astype(np.float32), x.T @ x


def error(w, h, pruned):
  wrong = np.asarray(pruned, np.float64) - w
  return np.einsum("ic,ij,jc->", wrong, h, wrong)


@functools.cache
def compiled(block, **how):
  return jax.jit(functools.partial(sparsegpt.prune, **how))


def solve(w, h, *, sparsity=0.5, damping=0.01, **how):
  call = compiled(sparsegpt.BLOCK, sparsity=sparsity, damping=damping, **how)
  return call(jnp.asarray(w), jnp.asarray(h, jnp.float32))


def oracle(w, h, *, block, sparsity=0.5, pattern=None, damping=0.01):
  """Prunes row by row, with the inverse of what is left of H recomputed each time."""
  rows, cols = w.shape
  h = h + damping * np.diag(h).mean() * np.eye(rows)
  inverses = [np.linalg.inv(h[j:, j:]) for j in range(rows)]
  left, keep = w.astype(np.float64).copy(), np.ones(w.shape, bool)
  for j in range(rows):
    if pattern is None and j % block == 0:
      span = range(j, min(j + block, rows))
      score = np.stack([left[i] ** 2 / inverses[i][0, 0] for i in span])
      gone = np.argsort(score, axis=None, kind="stable")[: int(sparsity * score.size)]
      keep[j : j + block].reshape(-1)[gone] = False
    elif pattern is not None and j % pattern[1] == 0:
      n, m = pattern
      score = np.stack([left[i] ** 2 / inverses[i][0, 0] for i in range(j, j + m)])
      for c in range(cols):
        keep[j + np.argsort(score[:, c], kind="stable")[: m - n], c] = False
    wrong = np.where(keep[j], 0, left[j])
    left[j:] -= np.outer(inverses[j][:, 0] / inverses[j][0, 0], wrong)
    left[j] = np.where(keep[j], left[j], 0)
  return left


@pytest.mark.parametrize(("rows", "how"), [(37, {"sparsity": 0.8}), (24, {"pattern": (1, 3)})])
def test_equals_the_surgeon(monkeypatch, rows, how):
  monkeypatch.setattr(sparsegpt, "BLOCK", 16)
  monkeypatch.setattr(sparsegpt, "TILE", 4)
  w, h = problem(rows, 12)
  want, got = oracle(w, h, block=16, **how), np.asarray(solve(w, h, **how))
  np.testing.assert_array_equal(got != 0, want != 0)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_it_is_better_than_dropping_the_same_weights_and_than_magnitude():
  w, h = problem(32, 8)
  for pattern in (None, (2, 4)):
    pruned = np.asarray(solve(w, h, pattern=pattern))
    dropped = np.where(pruned == 0, 0, w)
    runs = np.abs(w).reshape(1, -1, 1) if pattern is None else np.abs(w).reshape(8, 4, 8)
    small = np.where((runs >= np.median(runs, axis=1, keepdims=True)).reshape(w.shape), w, 0)
    assert error(w, h, pruned) < 0.8 * error(w, h, dropped)
    assert error(w, h, pruned) < 0.5 * error(w, h, small)
  assert (pruned.reshape(8, 4, 8) != 0).sum(axis=1).max() == 2


def test_uncorrelated_inputs_leave_the_rest_as_it_is():
  w, _ = problem(32, 8)
  pruned = np.asarray(solve(w, np.diag(np.linspace(1, 2, 32) ** 2)))
  np.testing.assert_array_equal(pruned, np.where(pruned == 0, 0, w))
  assert (pruned == 0).sum() == w.size // 2


def test_quantized_without_pruning_it_is_gptq():
  w, h = problem(32, 8, 3)
  leaf = solve(w, h, sparsity=0.0, bits=4, group_size=16)
  found = gptq.quantize(jnp.asarray(w), jnp.asarray(h, jnp.float32), bits=4, group_size=16)
  np.testing.assert_array_equal(leaf.scales, found.grid.scales)
  ours = np.round(np.asarray(leaf.dense() / np.repeat(leaf.scales, 16, 0))).astype(int) + 8
  assert (ours == np.asarray(found.codes)).mean() > 0.99


def test_what_is_kept_may_be_quantized_on_the_way():
  w, h = problem(32, 8, 4)
  both = solve(w, h, pattern=(2, 4), bits=4, group_size=16, symmetric=False)
  assert isinstance(both, leaves.QuantizedTensor)
  dense = np.asarray(both.dense())
  assert ((dense != 0).reshape(8, 4, 8).sum(axis=1) <= 2).all()
  scales, zeros = (np.repeat(np.asarray(x, float), 16, 0) for x in (both.scales, both.zeros))
  late = np.asarray(solve(w, h, pattern=(2, 4)))
  late = (np.clip(np.round(late / scales + zeros), 0, 15) - zeros) * scales
  assert error(w, h, dense) < error(w, h, late)


def test_inputs_never_seen():
  w, h = problem(32, 8, 5)
  dead = np.arange(32) % 4 == 1
  h[dead], h[:, dead] = 0, 0
  pruned = np.asarray(solve(w, h))
  assert np.isfinite(pruned).all() and (pruned[dead] == 0).all()
  nothing = np.asarray(solve(w, np.zeros((32, 32)), pattern=(2, 4)))  # then it is magnitude's
  runs = np.abs(w).reshape(8, 4, 8)
  big = (runs >= np.median(runs, axis=1, keepdims=True)).reshape(w.shape)
  np.testing.assert_array_equal(nothing, np.where(big, w, 0))


def test_singular_moments_and_rows_of_zeros():
  w, _ = problem(32, 8, 6)
  w[5], w[:, 3] = 0, 0
  x = np.random.default_rng(0).normal(size=(6, 32))
  pruned = np.asarray(solve(w, x.T @ x))
  assert np.isfinite(pruned).all() and (pruned == 0).mean() >= 0.5
  assert error(w, x.T @ x, pruned) < error(w, x.T @ x, np.where(pruned == 0, 0, w))
  assert np.isnan(np.asarray(solve(w, np.full((32, 32), np.nan)))).any()


def apply(transform, w, h):
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.asarray(w)[None]}}}}})
  moment = folds.SecondMoment(jnp.asarray(h, jnp.float32), jnp.asarray(20.0))
  return transform[0].apply(m, {"hessian": {ADDRESS: moment}}, jax.random.key(0)).leaf(ADDRESS)


def test_packed_equals_dense():
  w, h = problem(16, 8)
  leaf = apply(sparsegpt.sparsegpt(pattern="2:4", packed=True), w, h)
  assert isinstance(leaf, leaves.SparseTensor)
  np.testing.assert_array_equal(leaf.dense(), apply(sparsegpt.sparsegpt(pattern="2:4"), w, h))


def test_bad_arguments():
  for arguments, message in (
    ({"sparsity": -1.0}, "sparsity=-1.0: valid is 0"),
    ({"damping": 2.0}, "damping=2.0: valid is 0 to 1"),
    ({"bits": 9}, "bits=9: the width of a code"),
    ({"pattern": "2:4", "packed": True, "bits": 4}, "does not go with bits=4"),
  ):
    with pytest.raises(ValueError, match=message):
      sparsegpt.sparsegpt(**arguments)
  with pytest.raises(ValueError, match=f"{ADDRESS}: 2:4 sparsity needs a multiple of 4 input rows"):
    apply(sparsegpt.sparsegpt(pattern="2:4"), *problem(6, 2))
