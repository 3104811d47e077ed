# SPDX-License-Identifier: Apache-2.0
"""Factors against float64 numpy: the best of a rank, for weights and for outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.compress.low_rank import asvd, eora, lorc, svd, svd_llm
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, model
from treesurgeon.run import collect, drivers
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"
ROWS, COLS, RANK = 12, 10, 3
RNG = np.random.default_rng(0)
W = RNG.normal(size=(ROWS, COLS))
X = RNG.normal(size=(200, ROWS)) @ RNG.normal(size=(ROWS, ROWS)) * np.linspace(0.1, 3, ROWS)
H = X.T @ X


def cut(m, rank):
  u, s, vt = np.linalg.svd(m, full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ vt[:rank], np.sqrt((s[rank:] ** 2).sum())


def single(w):
  return model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.asarray(w)[None]}}}}})


def given(**more):
  moment = folds.SecondMoment(jnp.asarray(H, jnp.float32), jnp.float32(len(X)))
  sizes = folds.PerFeature(jnp.asarray(np.abs(X).sum(0), jnp.float32), jnp.float32(len(X)))
  return {"moment": moment, "sizes": sizes, **more}


def output_error(change):
  return np.linalg.norm(X @ change)


def test_svd_is_the_nearest_of_its_rank_over_stacked_layers():
  stacked = jnp.asarray(np.stack([W, 2 * W[::-1]]), jnp.float32)
  a, b = svd.factorize(stacked, rank=RANK)
  for i in range(2):
    best, error = cut(np.asarray(stacked[i], float), RANK)
    np.testing.assert_allclose(a[i] @ b[i], best, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(stacked[i] - a[i] @ b[i]), error, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2), rtol=1e-5)


def test_ranks_follow_shares_of_the_numbers_held():
  m = single(jnp.ones((30, 20)))
  leaf = svd.svd(ratio=0.5)[0].apply(m, {}, KEY).leaf(ADDRESS)
  assert leaf.rank == 6 and leaf.nbytes <= 0.5 * 30 * 20 * 4
  assert svd.rank_of(3, 3, rank=None, ratio=0.1) == 1


def test_svd_llm_reaches_the_closed_form_and_plain_svd_does_not():
  low = np.linalg.cholesky(H)
  best = np.linalg.solve(low.T, cut(low.T @ W, RANK)[0])
  a, b = svd_llm.factorize(jnp.asarray(W), jnp.asarray(H), rank=RANK)
  error = output_error(W - np.asarray(a @ b, float))
  np.testing.assert_allclose(error, cut(low.T @ W, RANK)[1], rtol=1e-4)
  np.testing.assert_allclose(a @ b, best, atol=2e-3)
  plain = output_error(W - cut(W, RANK)[0])
  sizes = np.sqrt(np.abs(X).mean(0))
  oracle = cut(sizes[:, None] * W, RANK)[0] / sizes[:, None]
  magnitudes = jnp.asarray(np.abs(X).sum(0))
  a, b = asvd.factorize(jnp.asarray(W), magnitudes, rank=RANK, alpha=0.5)
  np.testing.assert_allclose(a @ b, oracle, atol=1e-4)
  assert error < output_error(W - oracle) < plain


def test_dead_inputs_and_no_inputs_leave_finite_factors():
  h = H.copy()
  h[2], h[:, 2] = 0, 0
  for moment in (h, np.zeros_like(H)):
    a, b = svd_llm.factorize(jnp.asarray(W), jnp.asarray(moment), rank=RANK)
    assert np.isfinite(a).all() and np.isfinite(b).all()
  np.testing.assert_allclose(a @ b, cut(W, RANK)[0], atol=1e-3)
  a, b = asvd.factorize(jnp.asarray(W), jnp.zeros(ROWS), rank=RANK, alpha=0.5)
  np.testing.assert_allclose(a @ b, cut(W, RANK)[0], atol=1e-4)


def quantized(bits=3):
  m = single(jnp.asarray(W, jnp.float32))
  return m, rtn.rtn(bits=bits, group_size=-1)[0].apply(m, {}, KEY)


def test_eora_is_optimal_on_outputs_and_beats_the_svd_of_the_error():
  m, q = quantized()
  one = eora.eora(rank=RANK)[0]
  evidence = {"original": {ADDRESS: (m.leaf(ADDRESS),)}, "inputs": {ADDRESS: given()["moment"]}}
  leaf = one.apply(q, evidence, KEY).leaf(ADDRESS)
  assert isinstance(leaf, leaves.Sum) and isinstance(leaf.parts[0], leaves.QuantizedTensor)
  lost = W - np.asarray(leaf.parts[0].dense(), float)
  values, vectors = np.linalg.eigh(H)  # as the paper writes it
  root = np.sqrt(values)[:, None] * vectors.T
  best = cut(root @ lost, RANK)[1]
  made = output_error(W - np.asarray(leaf.dense(), float))
  np.testing.assert_allclose(made, best, rtol=1e-3)
  assert made < output_error(lost - cut(lost, RANK)[0]) < output_error(lost)
  probe = jnp.asarray(X[:4], jnp.float32)
  np.testing.assert_allclose(
    kernels.matmul(probe, leaf), probe @ leaf.dense(), rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lorc_lowers_the_error_at_eight_bits_a_factor(bits):
  m, q = quantized(bits)
  one = lorc.lorc(rank=RANK)[0]
  leaf = one.apply(q, {"original": {ADDRESS: (m.leaf(ADDRESS),)}}, KEY).leaf(ADDRESS)
  base, term = leaf.parts
  assert term.a.bits == term.b.bits == 8
  assert term.nbytes == RANK * (ROWS + COLS) + 2 * RANK * 4
  lost = W - np.asarray(base.dense(), float)
  floor, made = cut(lost, RANK)[1], np.linalg.norm(W - np.asarray(leaf.dense(), float))
  assert floor <= made < np.linalg.norm(lost)
  assert made < 1.01 * floor


def test_lorc_helps_even_where_there_is_little_to_gain():
  stacked = jnp.asarray(np.stack([np.zeros((32, 32)), 1e-6 * np.eye(32)]), jnp.float32)
  rest = stacked - lorc.compensate(stacked, rank=1, store="float32").dense()
  assert not np.asarray(rest[0]).any()
  assert np.linalg.norm(rest[1]) < np.linalg.norm(stacked[1])


def test_compensation_needs_the_one_original():
  m, q = quantized()
  more = collect.Materials(donors=[m, m])
  with pytest.raises(ValueError, match="against one original model; 2 were given"):
    drivers.run(lorc.lorc(), q, more)
  with pytest.raises(ValueError, match="needs donor models and none was given"):
    drivers.run(lorc.lorc(), q)
  out = drivers.run(lorc.lorc(rank=2), q, collect.Materials(donors=[m]))
  assert out.leaf(ADDRESS).parts[1].rank == 2


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: svd.svd(rank=0), "rank=0 must be at least 1"),
    (lambda: svd.svd(ratio=1.5), "ratio=1.5: factors hold more than 0 and up to 1"),
    (lambda: svd_llm.svd_llm(ratio=0.0), "ratio=0.0: factors hold"),
    (lambda: asvd.asvd(alpha=-1.0), "alpha=-1.0 must not be negative"),
    (lambda: eora.eora(rank=-1), "rank=-1 must not be negative"),
    (lambda: lorc.lorc(rank=-1), "rank=-1 must not be negative"),
  ],
)
def test_arguments_out_of_range_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
