# SPDX-License-Identifier: Apache-2.0
"""Compressed leaves: dense values by definition, shapes and bytes, files, stacking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import leaves, packing, paths

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def quantized(*batch, zeros=True, index=False):
  codes = RNG.integers(0, 8, (*batch, 10, 3)).astype(np.uint8)
  groups = jnp.asarray(RNG.integers(0, 3, (*batch, 1, 10)).astype(np.int32)) if index else None
  points = jnp.asarray(RNG.integers(0, 8, (*batch, 3, 3)).astype(np.uint8)) if zeros else None
  return leaves.QuantizedTensor(
    packing.pack(jnp.asarray(codes), bits=3), normal(*batch, 3, 3), points, groups,
    rows=10, cols=3, bits=3, group_size=4,
  )  # fmt: skip


def sparse(*batch):
  places = np.sort(RNG.permuted(np.tile(np.arange(4), (*batch, 2, 3, 1)), axis=-1)[..., :2], -1)
  places = np.moveaxis(places, -1, -2).reshape(*batch, 4, 3).astype(np.uint8)
  return leaves.SparseTensor(
    normal(*batch, 4, 3), packing.pack(jnp.asarray(places), bits=2), rows=8, cols=3, n=2, m=4
  )


def codebook(*batch):
  codes = jnp.asarray(RNG.integers(0, 16, (*batch, 5, 3)).astype(np.uint8))
  return leaves.Codebook(packing.pack(codes, bits=4), normal(*batch, 16, 2), 10, 3, 4, 2)


def low_rank(*batch):
  return leaves.LowRank(normal(*batch, 10, 2), normal(*batch, 2, 3), scale=0.5)


def total(*batch):
  return leaves.Sum((quantized(*batch), low_rank(*batch), normal(*batch, 10, 3)))


MAKERS = [quantized, sparse, codebook, low_rank, total]
every_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_quantized_by_definition(zeros, index):
  leaf = quantized(zeros=zeros, index=index)
  codes = np.asarray(packing.unpack(leaf.codes, bits=3, rows=10), int)
  for r in range(10):
    g = int(leaf.group_index[0, r]) if index else r // 4
    zero = np.asarray(leaf.zeros, int)[g] if zeros else 4
    expected = (codes[r] - zero) * np.asarray(leaf.scales)[g]
    np.testing.assert_allclose(leaf.dense()[r], expected, rtol=1e-6)


def test_sparse_by_definition():
  leaf = sparse()
  places = np.asarray(packing.unpack(leaf.positions, bits=2, rows=4))
  expected = np.zeros((8, 3), np.float32)
  for i in range(4):
    for c in range(3):
      expected[i // 2 * 4 + places[i, c], c] = leaf.values[i, c]
  np.testing.assert_array_equal(leaf.dense(), expected)


def test_codebook_by_definition():
  leaf = codebook()
  index = np.asarray(packing.unpack(leaf.codes, bits=4, rows=5))
  for run in range(5):
    for c in range(3):
      entry = leaf.codebook[index[run, c]]
      np.testing.assert_array_equal(leaf.dense()[2 * run : 2 * run + 2, c], entry)


def test_low_rank_and_sum_by_definition():
  factors, whole = low_rank(), total()
  np.testing.assert_allclose(factors.dense(), 0.5 * factors.a @ factors.b, rtol=1e-5, atol=1e-6)
  expected = sum(np.asarray(leaves.dense(p)) for p in whole.parts)
  np.testing.assert_allclose(whole.dense(), expected, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_shape_and_bytes(make, batch):
  leaf = make(*batch)
  assert leaf.dense().shape == leaf.shape == (*batch, leaf.rows, leaf.cols)
  assert (leaf.ndim, leaf.size) == (len(leaf.shape), leaf.dense().size)
  assert leaf.dense().dtype == leaf.dtype
  assert leaf.nbytes == sum(x.nbytes for x in jax.tree.leaves(leaf))
  assert leaves.bits_per_weight(leaf) == 8 * leaf.nbytes / leaf.size


@every_kind
def test_batches_are_independent(make):
  leaf = make(2)
  for i in range(2):
    np.testing.assert_array_equal(paths.take(leaf, i).dense(), leaf.dense()[i])
  again = paths.stack([paths.take(leaf, 0), paths.take(leaf, 1)])
  assert leaves.signature(again) == leaves.signature(leaf)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)


@every_kind
def test_files_round_trip(make):
  leaf = make()
  meta, arrays = leaves.to_parts(leaf)
  again = leaves.from_parts(meta, arrays)
  assert leaves.signature(again) == leaves.signature(leaf)
  np.testing.assert_array_equal(again.dense(), leaf.dense())


@every_kind
def test_jit_and_shapes(make):
  leaf = make(2)
  np.testing.assert_allclose(jax.jit(leaves.dense)(leaf), leaf.dense(), rtol=1e-6)
  shapes = jax.eval_shape(lambda x: x, leaf)
  assert shapes.shape == leaf.shape
  assert leaves.nbytes(shapes) == leaves.nbytes(leaf)


def test_arrays_pass_through():
  x = jnp.ones((2, 3))
  assert leaves.dense(x) is x
  assert leaves.from_parts(*leaves.to_parts(x)) is x
  assert leaves.nbytes(x.astype(jnp.int4)) == 3
  assert not leaves.is_leaf(x)


def test_storage_dtype():
  leaf = dataclasses.replace(quantized(), store="bfloat16")
  assert leaf.dense().dtype == jnp.bfloat16


def test_errors():
  factors = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}
  with pytest.raises(ValueError, match="unknown leaf type 'Nibbles'; known: Codebook, LowRank"):
    leaves.from_parts({"type": "Nibbles"}, {})
  with pytest.raises(ValueError, match="LowRank has no field 'c'; it has a, b, scale"):
    leaves.from_parts({"type": "LowRank"}, {**factors, "c": factors["a"]})
  with pytest.raises(ValueError, match="LowRank lacks the part 'b'"):
    leaves.from_parts({"type": "LowRank"}, {"a": factors["a"]})
