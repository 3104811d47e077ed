# SPDX-License-Identifier: Apache-2.0
"""VPTQ against the optimal-brain-surgeon recursion in float64, and its limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import kmeans, rounding, vptq
from treesurgeon.core import leaves, model
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"
HYPER = ("length", "entries", "residual", "outliers", "iterations")
solve = functools.partial(jax.jit, static_argnames=HYPER)(functools.partial(vptq.quantize, key=KEY))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Corrects several blocks of rows, the last of them not full."""
  monkeypatch.setattr(rounding, "BLOCK", 10)


def problem(rows=24, cols=18, seed=0):
  """Draws weights, whose last vectors stick out, and the second moment of correlated inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(6 * rows, rows)) @ (rng.normal(size=(rows, rows)) / rows**0.5)
  x = x * np.exp(rng.normal(size=rows))
  return jnp.asarray(rng.normal(size=(rows, cols)), jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


def error(w, h, q):
  wrong = np.asarray(q, np.float64) - np.asarray(w, np.float64)
  return np.einsum("ic,ij,jc->", wrong, np.asarray(h, np.float64), wrong)


def books(leaf):
  body = leaf.rest if isinstance(leaf, leaves.SplitRows) else leaf
  return body.parts if isinstance(body, leaves.Sum) else (body,)


def surgeon(w, h, tables, length, few):
  """Rounds row by row, with the inverse of what is left of H recomputed each time."""
  cols = w.shape[1]
  w = np.pad(np.asarray(w, np.float64), [(0, 0), (0, -cols % length)])
  h = np.asarray(h, np.float64)
  order = np.argsort(-np.diag(h), kind="stable")
  rest = order[few:]
  inner = h[np.ix_(rest, rest)]
  inner = inner + 0.01 * np.diag(inner).mean() * np.eye(len(rest))
  left, out = w[rest].copy(), w.copy()
  for k, j in enumerate(rest):
    x = left[k].reshape(-1, length)
    q = np.zeros_like(x)
    for t in tables:
      q += t[(((x - q)[:, None] - t) ** 2).sum(-1).argmin(1)]
    out[j] = q.ravel()
    inverse = np.linalg.inv(inner[k:, k:])
    left[k:] -= np.outer(inverse[:, 0] / inverse[0, 0], left[k] - out[j])
  return out[:, :cols]


@pytest.mark.parametrize(
  ("length", "residual", "outliers"), [(4, 0, 0.0), (1, 0, 0.0), (4, 4, 0.1)]
)
def test_equals_the_surgeon_with_its_tables(length, residual, outliers):
  w, h = problem()
  leaf = solve(w, h, length=length, entries=8, residual=residual, outliers=outliers)
  few = int(np.ceil(outliers * 24))
  tables = [np.asarray(b.codebook, np.float64) for b in books(leaf)]
  expected = surgeon(w, h, tables, length, few)
  assert np.isclose(np.asarray(leaf.dense()), expected, atol=1e-5).mean() > 0.97
  np.testing.assert_allclose(error(w, h, leaf.dense()), error(w, h, expected), rtol=0.03)
  if few:
    kept = np.argsort(-np.diag(h))[:few]
    np.testing.assert_array_equal(leaf.dense()[kept], w[kept])
    assert leaf.first.shape == (few, 18)


def test_uncorrelated_inputs_give_the_nearest_vectors():
  w, _ = problem()
  leaf = solve(w, jnp.eye(24), length=4, entries=8, outliers=0.0)
  index, _ = kmeans.nearest(jnp.pad(w, [(0, 0), (0, 2)]).reshape(-1, 4), leaf.codebook)
  np.testing.assert_array_equal(leaf.dense(), leaf.codebook[index].reshape(24, 20)[:, :18])


@pytest.mark.parametrize("seed", range(2))
def test_second_order_residuals_and_outliers_help(seed):
  w, h = problem(seed=seed)
  nearest = solve(w, jnp.diag(jnp.diag(h)), length=4, entries=8, outliers=0.0)  # same tables
  moved = solve(w, h, length=4, entries=8, outliers=0.0)
  twice = solve(w, h, length=4, entries=8, residual=4, outliers=0.1)
  errors = [error(w, h, leaf.dense()) for leaf in (nearest, moved, twice)]
  assert errors[1] < 0.9 * errors[0] and errors[2] < 0.7 * errors[1], errors


def test_dead_inputs_are_zeroed_unless_nothing_was_seen():
  w, h = problem()
  some = np.asarray(h).copy()
  some[5], some[:, 5] = 0, 0
  leaf = solve(w, jnp.asarray(some), length=4, entries=8, outliers=0.0)
  near, _ = kmeans.nearest(jnp.zeros((1, 4)), leaf.codebook)
  np.testing.assert_array_equal(leaf.dense()[5, :16], jnp.tile(leaf.codebook[near[0]], 4))
  unseen = solve(w, 0 * h, length=4, entries=8, outliers=0.0)
  alike = solve(w, jnp.eye(24), length=4, entries=8, outliers=0.0)
  np.testing.assert_array_equal(unseen.dense(), alike.dense())


def test_step_keeps_its_own_result_and_names_what_failed():
  w, h = problem()
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": w[None]}}}}})
  (one,) = vptq.vptq(length=4, entries=8, residual=4)

  def run(m, h):
    moment = folds.SecondMoment(h, jnp.asarray(9.0))
    return one.apply(m, {"hessian": {ADDRESS: moment}}, KEY)

  leaf = run(m, h).leaf(ADDRESS)
  again = run(m.update({ADDRESS: leaf}), h).leaf(ADDRESS)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)
  assert np.isnan(run(m, h.at[0, 0].set(jnp.nan)).leaf(ADDRESS).dense()).any()


def test_sizes_and_arguments():
  assert [vptq.default_entries(n) for n in (0, 64, 4096, 10**9)] == [2, 2, 128, 65536]
  for how, text in (
    ({"length": 0}, "length=0: a vector covers 1 weight or more"),
    ({"entries": 2**17}, "entries=131072: a table has 2 to 65536 vectors"),
    ({"residual": 1}, r"residual=1: valid is 0 \(no second table\) and 2 to 65536"),
    ({"outliers": 1.0}, r"outliers=1.0: valid is 0 \(none\) to below 1"),
    ({"damping": 2.0}, "damping=2.0: valid is 0 to 1"),
  ):
    with pytest.raises(ValueError, match=text):
      vptq.vptq(**how)
