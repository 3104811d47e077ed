# SPDX-License-Identifier: Apache-2.0
"""oBERT on quadratics, where it is exact, and its Fisher blocks against single gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.prune import obert
from treesurgeon.core import leaves, model

DAMPING = 1e-3


def problem(rows=10, cols=3, block=4, examples=40, seed=0):
  """Draws weights, and gradients whose coordinates depend on each other."""
  rng = np.random.default_rng(seed)
  g = rng.normal(size=(examples, rows, cols))
  g = np.einsum("erc,rs->esc", g, np.eye(rows) + 2 * rng.normal(size=(rows, rows)) / rows**0.5)
  padded = np.pad(g, [(0, 0), (0, -rows % block), (0, 0)]).reshape(examples, -1, block, cols)
  fisher = np.einsum("ebic,ebjc->bcij", padded, padded) / examples
  return rng.normal(size=(rows, cols)), fisher


def spans(rows, block):
  return [(b, slice(i, min(i + block, rows))) for b, i in enumerate(range(0, rows, block))]


def cost(w, fisher, new, damping=DAMPING):
  """Computes half d' F d."""
  total = 0.0
  for (b, span), c in itertools.product(spans(len(w), fisher.shape[-1]), range(w.shape[1])):
    d = (np.asarray(new, np.float64) - w)[span, c]
    f = fisher[b, c][: len(d), : len(d)]
    total += 0.5 * d @ (f + damping * np.eye(len(d))) @ d
  return total


@functools.cache
def compiled(fn, **how):
  return jax.jit(functools.partial(fn, damping=DAMPING, **how))


def call(fn, w, fisher, *more, **how):
  return np.asarray(compiled(fn, **how)(*(jnp.asarray(x) for x in (w, fisher, *more))))


def test_scores_are_the_cost_of_removing_one_weight_by_the_woodbury_recursion():
  """The recursion of the paper, one gradient after another, arrives at the same inverse."""
  rng = np.random.default_rng(3)
  w, g = rng.normal(size=(4, 1)), rng.normal(size=(12, 4))
  inverse = np.eye(4) / DAMPING
  for one in g:
    v = inverse @ one
    inverse -= np.outer(v, v) / (len(g) + one @ v)
  fisher = (g.T @ g / len(g))[None, None]
  got = call(obert.score, w, fisher)
  np.testing.assert_allclose(got[:, 0], w[:, 0] ** 2 / (2 * np.diag(inverse)), rtol=1e-3)
  for i in range(4):
    keep = np.arange(4)[:, None] != i
    new = call(obert.update, w, fisher, keep)
    np.testing.assert_allclose(cost(w, fisher, new), got[i, 0], rtol=1e-3)
    surgeon = w[:, 0] - inverse[:, i] * w[i, 0] / inverse[i, i]
    np.testing.assert_allclose(new[:, 0], np.where(keep[:, 0], surgeon, 0), rtol=1e-3, atol=1e-4)


def test_what_is_kept_is_at_the_minimum():
  w, fisher = problem()
  keep = np.random.default_rng(5).random(w.shape) < 0.5
  new = call(obert.update, w, fisher, keep)
  want = np.zeros_like(w)
  for (b, span), c in itertools.product(spans(10, 4), range(3)):
    k = keep[span, c]
    f = fisher[b, c][: len(k), : len(k)] + DAMPING * np.eye(len(k))
    want[span, c][k] = w[span, c][k] + np.linalg.solve(f[np.ix_(k, k)], f[k] @ (w[span, c] * ~k))
  np.testing.assert_allclose(new, want, rtol=1e-3, atol=1e-4)
  assert cost(w, fisher, new) < 0.9 * cost(w, fisher, np.where(keep, w, 0))
  alone = np.where(keep, w, 0)  # the code's update: what each pruned weight needs alone, summed
  for (b, span), c in itertools.product(spans(10, 4), range(3)):
    size = len(w[span, c])
    inverse = np.linalg.inv(fisher[b, c][:size, :size] + DAMPING * np.eye(size))
    step = inverse @ (w[span, c] * ~keep[span, c] / np.diag(inverse))
    alone[span, c] = np.where(keep[span, c], w[span, c] - step, 0)
  assert cost(w, fisher, new) < cost(w, fisher, alone)
  np.testing.assert_array_equal(
    call(obert.update, w, fisher, np.ones(w.shape, bool)), np.float32(w)
  )


def test_patterns_are_the_cheapest_by_brute_force():
  w, fisher = problem(rows=8, block=4, seed=2)
  keep = call(obert.choose, w, fisher, pattern=(2, 4))
  for b, c in itertools.product(range(2), range(3)):
    span, f = slice(4 * b, 4 * b + 4), fisher[b, c] + DAMPING * np.eye(4)
    costs = {}
    for gone in itertools.combinations(range(4), 2):
      q = list(gone)
      inside = np.linalg.inv(np.linalg.inv(f)[np.ix_(q, q)])
      costs[gone] = 0.5 * w[span, c][q] @ inside @ w[span, c][q]
    assert tuple(np.flatnonzero(~keep[span, c])) == min(costs, key=costs.__getitem__)


def apply(transform, w, fisher):
  tree = {"layers": {"0:2": {"mlp": {"up": {"kernel": jnp.asarray(w, jnp.float32)}}}}}
  m = model.Model(None, tree)
  evidence = {f"layers/{i}/mlp/up/kernel": jnp.asarray(fisher[i], jnp.float32) for i in range(2)}
  return transform[0].apply(m, {"fisher": evidence}, jax.random.key(0)), m


def test_weights_are_ranked_over_the_model_or_the_matrix():
  w, fisher = zip(*(problem(rows=8, seed=s) for s in (0, 1)), strict=True)
  w, fisher = np.stack(w), np.stack([fisher[0], 100 * fisher[1]])
  for per in ("model", "matrix"):
    out, m = apply(obert.obert(per=per, block=4, damping=DAMPING), w, fisher)
    gone = [(np.asarray(out.leaf(a)) == 0).sum() for a in m.addresses()]
    assert sum(gone) == 24
    assert gone == [12, 12] if per == "matrix" else gone[0] > 18
  packed, m = apply(obert.obert(pattern="2:4", packed=True, block=7, damping=DAMPING), w, fisher)
  dense, _ = apply(obert.obert(pattern="2:4", block=4, damping=DAMPING), w, fisher)
  for a in m.addresses():
    assert isinstance(packed.leaf(a), leaves.SparseTensor)
    np.testing.assert_array_equal(packed.leaf(a).dense(), dense.leaf(a))


def test_dead_inputs_and_singular_blocks_are_finite():
  w, fisher = problem(rows=8)
  fisher[0] = 0  # no gradient ever
  fisher[1, :, :, :] = 1e6  # of rank one, too large for the damping to show in float32
  for keep in (np.ones(w.shape, bool), np.arange(8)[:, None] % 2 == np.zeros((1, 3))):
    assert np.isfinite(call(obert.update, w, fisher, keep)).all()
  assert np.isfinite(call(obert.score, w, fisher)).all()
  np.testing.assert_array_equal(call(obert.update, w, fisher, keep)[:4], np.float32(w * keep)[:4])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"per": "column"}, "per='column': valid are model, matrix"),
    ({"damping": 0.0}, "damping=0.0 above 0"),
    ({"block": 0}, "block=0 must be at least 1"),
    ({"pattern": "8:16"}, "of which there are 12870; valid are up to 100"),
    ({"pattern": "2:4", "block": 3}, "m up to block=3"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    obert.obert(**arguments)
