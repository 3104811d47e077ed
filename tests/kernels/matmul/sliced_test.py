# SPDX-License-Identifier: Apache-2.0
"""Products run by run of rows equal float64, whatever the leaf and wherever it is cut."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.matmul import sliced
from treesurgeon.kernels.sparse_matmul import arg_specs

_SPEC = importlib.util.spec_from_file_location(
  "makers", pathlib.Path(__file__).parents[2] / "core" / "leaves_test.py"
)
assert _SPEC is not None and _SPEC.loader is not None
makers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(makers)
KEY = jax.random.key(3)
CUT = [m for m in makers.MAKERS if not sliced.unsupported(jnp.ones((1, 1)), m())]


def check(leaf, tokens=3):
  x = jax.random.normal(KEY, (tokens, leaf.rows))
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  got = jax.jit(functools.partial(kernels.matmul, implementation="sliced"))(x, leaf)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("make", CUT, ids=lambda make: make.__name__)
def test_it_equals_float64(make, whole, monkeypatch):
  if not whole:
    monkeypatch.setattr(sliced, "TILE", 4)
  leaf = make()
  assert (sliced.rows_of_run(leaf, tokens=1) >= leaf.rows) == whole or leaf.rows < 17
  check(leaf)


def test_kinds_that_are_cut():
  kinds = {type(make()).__name__ for make in CUT}
  assert kinds == {
    "Codebook", "GroupSparse", "OutlierVictim", "Outliers", "QuantizedTensor", "SignedLowRank",
    "SparseTensor",
  }  # fmt: skip


def test_runs_within_a_long_group(monkeypatch):
  monkeypatch.setattr(sliced, "TILE", 4 * 40 * 3)
  leaf = dataclasses.replace(
    makers.quantized(), codes=jnp.arange(45 * 3, dtype=jnp.uint8).reshape(45, 3) * 11, rows=120,
    group_size=40, format="nf", zeros=None,
  )  # fmt: skip
  monkeypatch.setattr(sliced, "TILE", 4 * 9 * 3)
  assert sliced.rows_of_run(leaf, tokens=1) == 8
  check(leaf)


@pytest.mark.parametrize(
  ("pattern", "runs", "bits", "size", "tile"),
  [((2, 4), 9, 0, 0, 1), ((1, 5), 7, 8, 0, 1), ((3, 4), 11, 3, 5, 300), ((2, 2), 5, 4, 0, 999)],
)
def test_n_of_m(pattern, runs, bits, size, tile, monkeypatch):
  monkeypatch.setattr(sliced, "TILE", tile)
  n, m = pattern
  check(arg_specs.sparse(runs * m, 3, n, m, key=KEY, bits=bits, group_size=size))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
  pattern=st.sampled_from(((1, 2), (2, 4), (3, 4), (1, 5), (4, 8), (5, 16), (2, 2), (1, 1))),
  runs=st.integers(1, 40),
  cols=st.integers(1, 9),
  bits=st.sampled_from((0, 3, 8)),
  size=st.integers(1, 50),
  tile=st.sampled_from((1, 300, 10_000)),
)
def test_n_of_m_of_many_shapes(pattern, runs, cols, bits, size, tile):
  n, m = pattern
  size = size if size < runs * n else 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sliced, "TILE", tile)
    check(arg_specs.sparse(runs * m, cols, n, m, key=KEY, bits=bits, group_size=size))


def test_one_group_of_fewer_rows_than_a_run(monkeypatch):
  monkeypatch.setattr(sliced, "TILE", 4)
  leaf = dataclasses.replace(makers.quantized(), group_size=10, zeros=None)
  check(dataclasses.replace(leaf, scales=leaf.scales[:1]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kept_groups_of_codes(bits, monkeypatch):
  monkeypatch.setattr(sliced, "TILE", 4)
  leaf = arg_specs.group_sparse(301, 5, key=KEY, bits=bits, zeros=bits == 4)
  check(leaf)
  check(dataclasses.replace(leaf, kept=leaf.kept.dense()))


def test_gradients_reach_values_and_inputs(monkeypatch):
  monkeypatch.setattr(sliced, "TILE", 4)
  leaf = arg_specs.sparse(32, 5, 2, 4, key=KEY)
  leaf = dataclasses.replace(leaf, values=leaf.values.astype(jnp.float32))
  x = jax.random.normal(KEY, (3, 32))

  def loss(product, x, values):
    return jnp.square(product(x, dataclasses.replace(leaf, values=values))).sum()

  got = jax.jit(jax.grad(lambda *a: loss(sliced.matmul, *a), (0, 1)))(x, leaf.values)
  dense = lambda x, leaf: x @ leaf.dense()
  want = jax.grad(lambda *a: loss(dense, *a), (0, 1))(x, leaf.values)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_stacked_leaves_under_vmap_and_scan(monkeypatch):
  monkeypatch.setattr(sliced, "TILE", 4)
  stacked = makers.sparse(3)
  x = jax.random.normal(KEY, (3, 2, 8))
  mapped = jax.jit(jax.vmap(kernels.matmul))(x, stacked)
  scanned = jax.lax.scan(lambda c, pair: (c, kernels.matmul(*pair)), None, (x, stacked))[1]
  expected = np.asarray(x, np.float64) @ np.asarray(stacked.dense(), np.float64)
  np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)


def test_refusals():
  x = jnp.ones((1, 301))
  whole = arg_specs.group_sparse(301, 5, key=KEY)
  odd = dataclasses.replace(whole, kept=dataclasses.replace(whole.kept, group_size=8))
  index = dataclasses.replace(whole.kept, group_index=jnp.zeros((1, 144), jnp.int32))
  nested = arg_specs.sparse(8, 3, 2, 4, key=KEY, bits=4)
  nested = dataclasses.replace(nested, values=leaves.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3))))
  for leaf, reason in (
    (odd, "a scale a kept group of 16 rows, not one for 8"),
    (dataclasses.replace(whole, kept=index), "kept groups that are an array or quantized"),
    (nested, "values that are an array or quantized"),
    (makers.total(), "cut by rows, not Sum"),
  ):
    assert reason in sliced.unsupported(x, leaf)
