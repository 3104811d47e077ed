# SPDX-License-Identifier: Apache-2.0
"""Magnitude and Wanda pruning against brute force, counts, packed leaves, neutral settings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.compress.prune import magnitude, masks, wanda
from treesurgeon.core import leaves, model, paths
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ADDRESS = "layers/0/mlp/up/kernel"


def weights(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(rows, seed=1):
  return np.random.default_rng(seed).normal(size=(20, rows)) * np.linspace(0.1, 3, rows)


def apply(transform, w, x):
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.asarray(w)[None]}}}}})
  squares = folds.PerFeature(jnp.asarray((x**2).sum(0), jnp.float32), jnp.asarray(20.0))
  return transform[0].apply(m, {"inputs": {ADDRESS: squares}}, KEY).leaf(ADDRESS)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_wanda_unstructured(sparsity):
  w, x = weights(17, 5), inputs(17)
  expected = w.copy()
  for j in range(5):
    score = np.abs(w[:, j]) * np.linalg.norm(x, axis=0)
    expected[np.argsort(score, kind="stable")[: int(17 * sparsity)], j] = 0
  np.testing.assert_array_equal(apply(wanda.wanda(sparsity=sparsity), w, x), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 8), (4, 4), (3, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_wanda_n_of_m(n, m, packed):
  rows = 120
  w, x = weights(rows, 6), inputs(rows)
  expected = np.zeros_like(w)
  score = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
  for start, j in itertools.product(range(0, rows, m), range(6)):
    kept = start + np.argsort(-score[start : start + m, j], kind="stable")[:n]
    expected[kept, j] = w[kept, j]
  leaf = apply(wanda.wanda(pattern=f"{n}:{m}", packed=packed), w, x)
  np.testing.assert_array_equal(leaves.dense(leaf), expected)
  if packed:
    assert isinstance(leaf, leaves.SparseTensor) and leaf.values.shape == (rows * n // m, 6)
    probe = jnp.asarray(weights(2, rows))
    np.testing.assert_allclose(kernels.matmul(probe, leaf), probe @ expected, rtol=1e-4, atol=1e-4)


def test_wanda_differs_from_magnitude_where_inputs_do():
  w, x = weights(16, 4), inputs(16)
  by_input = apply(wanda.wanda(), w, x)
  by_size = apply(magnitude.magnitude(per="column"), w, x)
  flat = apply(wanda.wanda(), w, np.ones((3, 16)))
  assert (np.asarray(by_input) != np.asarray(by_size)).any()
  np.testing.assert_array_equal(flat, by_size)
  output = np.linalg.norm(x @ (np.asarray(by_input) - w))
  assert output < np.linalg.norm(x @ (np.asarray(by_size) - w))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_magnitude_per_matrix(sparsity):
  w = weights(9, 7)
  pruned = np.asarray(magnitude.prune(jnp.asarray(w), sparsity=sparsity))
  assert (pruned == 0).sum() == int(63 * sparsity)
  kept = np.abs(w[pruned != 0])
  assert not kept.size or kept.min() >= np.abs(w[pruned == 0]).max(initial=0)
  np.testing.assert_array_equal(pruned[pruned != 0], w[pruned != 0])


def test_magnitude_over_the_model():
  flat = {f"layers/{i}/mlp/{n}/kernel": weights(6, 5, seed=7 * i + len(n)) * (1 + i)
          for i in range(2) for n in ("up", "down")}  # fmt: skip
  m = model.Model(None, paths.unflatten({a: jnp.asarray(w) for a, w in flat.items()}))
  (one,) = magnitude.magnitude(sparsity=0.7, per="model")
  out = one.apply(m, {}, KEY)
  least = np.sort(np.concatenate([np.abs(w).ravel() for w in flat.values()]))[int(0.7 * 120)]
  for address, w in flat.items():
    np.testing.assert_array_equal(out.leaf(address), np.where(np.abs(w) < least, 0, w))
  aimed = one.reselect("layers/1/.*").apply(m, {}, KEY)
  assert (np.asarray(aimed.leaf("layers/0/mlp/up/kernel")) != 0).all()
  gone = [(np.asarray(aimed.leaf(f"layers/1/mlp/{n}/kernel")) == 0).sum() for n in ("up", "down")]
  assert sum(gone) == int(0.7 * 60)
  assert one.scope == "model"


def test_wanda_without_any_input_goes_by_magnitude():
  w = weights(16, 4)
  np.testing.assert_array_equal(
    apply(wanda.wanda(), w, np.zeros((3, 16))), apply(magnitude.magnitude(per="column"), w, w.T)
  )


def test_dead_inputs_go_first():
  x = inputs(16)
  x[:, [3, 8]] = 0
  out = np.asarray(apply(wanda.wanda(sparsity=0.125), weights(16, 4), x))
  np.testing.assert_array_equal(np.flatnonzero((out == 0).all(axis=1)), [3, 8])
  assert (out == 0).sum() == 8


def test_ties_keep_exact_counts():
  pruned = np.asarray(magnitude.prune(jnp.ones((8, 2)), sparsity=0.5, per="column"))
  np.testing.assert_array_equal(pruned, np.repeat([[1.0], [0.0]], 4, 0) * np.ones(2))


def test_dtype_and_packed_bytes():
  w = weights(64, 8)
  leaf = apply(
    magnitude.magnitude(pattern="2:4", packed=True), jnp.asarray(w, jnp.bfloat16), inputs(64)
  )
  assert leaf.dtype == jnp.bfloat16
  assert leaves.bits_per_weight(leaf) == 8 + 1  # half the values, and 2 bits for each of those
  assert magnitude.prune(jnp.asarray(w, jnp.bfloat16), sparsity=0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("transform", [
  wanda.wanda(sparsity=0.0), magnitude.magnitude(sparsity=0.0), wanda.wanda(pattern="4:4"),
])  # fmt: skip
def test_neutral_settings(transform):
  w = weights(16, 4)
  np.testing.assert_array_equal(apply(transform, w, inputs(16)), w)


def test_stacked_matrices_are_independent():
  w = jnp.asarray(weights(2, 8, 4))
  both = masks.n_of_m(jnp.abs(w), n=1, m=4)
  leaf = masks.pack_n_of_m(w, both, n=1, m=4)
  np.testing.assert_array_equal(leaf.dense(), jnp.where(both, w, 0))
  np.testing.assert_array_equal(both[1], masks.n_of_m(jnp.abs(w[1]), n=1, m=4))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"sparsity": 1.5}, "sparsity=1.5: valid is 0"),
    ({"packed": True}, "packed=True stores N:M sparsity; it needs a pattern"),
    ({"pattern": "5:4"}, "pattern='5:4': valid is 'n:m', n of m kept"),
    ({"pattern": "half"}, "pattern='half': valid is 'n:m'"),
  ],
)
def test_arguments(arguments, message):
  for method in (wanda.wanda, magnitude.magnitude):
    with pytest.raises(ValueError, match=message):
      method(**arguments)
  with pytest.raises(ValueError, match="per='row': valid are matrix, column, model"):
    magnitude.magnitude(per="row")


def test_rows_must_fit_the_pattern():
  with pytest.raises(
    ValueError, match="2:4 sparsity needs a multiple of 4 input rows; the kernel has 6"
  ):
    apply(wanda.wanda(pattern="2:4"), weights(6, 2), inputs(6))
