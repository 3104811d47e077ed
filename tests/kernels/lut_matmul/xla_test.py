# SPDX-License-Identifier: Apache-2.0
"""Products by table lookup equal float64, of vectors and of bit planes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import kernels
from treesurgeon.core import leaves, packing
from treesurgeon.kernels.lut_matmul import xla
from treesurgeon.kernels.matmul import api, arg_specs

KEY = jax.random.key(7)


def check(x, leaf, share=1e-5):
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  got = jax.jit(functools.partial(kernels.matmul, implementation="lut"))(x, leaf)
  assert got.dtype == x.dtype
  np.testing.assert_allclose(
    np.asarray(got, np.float64), expected, rtol=0, atol=share * np.abs(expected).max()
  )


def vectors(rows, cols, bits, length, width=1, books=1, scaled=False, key=KEY):
  down, across = -(-rows // length), -(-cols // width)
  index = jax.random.randint(key, (down, across), 0, 2**bits).astype(jnp.uint16)
  index = index.astype(jnp.uint8) if bits <= 8 else index
  book = jax.random.normal(key, (books * 2**bits, length * width))
  scales = jax.random.uniform(key, (1, cols)) if scaled else None
  codes = packing.pack(index, bits=bits)
  return leaves.Codebook(codes, book, rows, cols, bits, length, scales, width=width, books=books)


CASES = (
  # rows, columns, bits, length, width, tables, scales, tokens
  (50, 20, 8, 4, 1, 1, False, 3),
  (33, 7, 10, 5, 2, 3, True, 1),
  (5, 9, 3, 1, 3, 1, True, 2),
)


@pytest.mark.parametrize("table", [1, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_vectors(case, table, monkeypatch):
  monkeypatch.setattr(xla, "TABLE", table)
  *form, tokens = case
  check(jax.random.normal(KEY, (tokens, form[0])), vectors(*form))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
  rows=st.integers(1, 60),
  cols=st.integers(1, 20),
  bits=st.sampled_from((1, 3, 8, 10)),
  length=st.integers(1, 5),
  width=st.integers(1, 3),
  books=st.integers(1, 3),
  scaled=st.booleans(),
)
def test_vectors_of_many_shapes(rows, cols, bits, length, width, books, scaled):
  check(jax.random.normal(KEY, (2, rows)), vectors(rows, cols, bits, length, width, books, scaled))


PLANES = [n for n in arg_specs.TESTS if n in ("remainder", "odd group")]


@pytest.mark.parametrize(
  "name", [n if n in PLANES else pytest.param(n, marks=pytest.mark.slow) for n in arg_specs.TESTS]
)
def test_bit_planes(name):
  x, leaf = arg_specs.operands(arg_specs.TESTS[name], KEY)
  reason = xla.unsupported(x, leaf)
  if not reason:
    check(x, leaf, 1e-2 if x.dtype == jnp.bfloat16 else 1e-5)
    return
  assert "groups of a multiple of" in reason
  with pytest.raises(ValueError, match="'lut' cannot multiply.*groups of a multiple of"):
    kernels.matmul(x, leaf, implementation="lut")


def test_gradients():
  x, leaf = arg_specs.operands(arg_specs.TESTS["remainder"], KEY)
  for w in (leaf, vectors(300, 9, 4, 4)):
    loss = lambda x, w: kernels.matmul(x, w, implementation="lut").sum()
    g = jax.jit(jax.grad(loss))(x, w)
    np.testing.assert_allclose(g, w.dense().sum(1)[None].repeat(2, 0), rtol=1e-4, atol=1e-4)


def test_one_token_looks_vectors_up_under_vmap_and_scan():
  leaf = jax.vmap(lambda key: vectors(32, 300, 8, 4, key=key))(jax.random.split(KEY, 2))
  x = jax.random.normal(KEY, (2, 32))
  one = jax.tree.map(lambda a: a[0], leaf)
  assert not xla.unsupported_few(x[:1], one) and "lut" in api.supported(x[:1], one)
  expected = np.einsum("br,brc->bc", x, leaf.dense())
  mapped = jax.jit(jax.vmap(kernels.matmul))(x, leaf)
  scanned = jax.lax.scan(lambda c, pair: (c, kernels.matmul(*pair)), None, (x, leaf))[1]
  np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-4)


def test_when_lookups_are_not_worth_while():
  x = jnp.ones((1, 32))
  for leaf, tokens, reason in (
    (vectors(32, 300, 8, 4), 4, "fewer tokens than a vector has rows (4), not 4"),
    (vectors(32, 100, 8, 4), 1, "fewer of them in the table than columns"),
    (vectors(32, 300, 4, 1, 4), 1, "vectors of several rows"),
    (leaves.LowRank(jnp.ones((32, 1)), jnp.ones((1, 3))), 1, "not LowRank"),
  ):
    assert reason in xla.unsupported_few(jnp.broadcast_to(x, (tokens, 32)), leaf)
