# SPDX-License-Identifier: Apache-2.0
"""Compressed leaves: dense values by definition, shapes and bytes, files, stacking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import formats, hadamard, leaves, packing, paths

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


def sparse_codes(*batch):
  codes = jnp.asarray(RNG.integers(0, 256, (*batch, 4, 3)).astype(np.uint8))
  values = leaves.QuantizedTensor(
    codes, normal(*batch, 1, 3), None, None, rows=4, cols=3, bits=8, group_size=4
  )
  return dataclasses.replace(sparse(*batch), values=values)


def codebook(*batch):
  codes = jnp.asarray(RNG.integers(0, 16, (*batch, 5, 3)).astype(np.uint8))
  return leaves.Codebook(packing.pack(codes, bits=4), normal(*batch, 16, 2), 10, 3, 4, 2)


def low_rank(*batch):
  return leaves.LowRank(normal(*batch, 10, 2), normal(*batch, 2, 3), scale=0.5)


def total(*batch):
  return leaves.Sum((quantized(*batch), low_rank(*batch), normal(*batch, 10, 3)))


def table(*batch, name="e2m1", bits=4, group_cols=1, nested=False):
  codes = jnp.asarray(RNG.integers(0, 3 if name == "ternary" else 2**bits, (*batch, 10, 4)))
  codes = codes.astype(jnp.uint8)
  packed = formats.pack_trits(codes) if name == "ternary" else packing.pack(codes, bits=bits)
  scales = normal(*batch, 3, -(-4 // group_cols))
  if nested:  # NVFP4: the scales are 8-bit floats with one scale a tensor
    floats = jnp.asarray(RNG.integers(0, 120, scales.shape).astype(np.uint8))
    scales = leaves.QuantizedTensor(
      floats, normal(*batch, 1, 1), None, None, rows=3, cols=scales.shape[-1], bits=8,
      group_size=3, format="e4m3fn", group_cols=scales.shape[-1],
    )  # fmt: skip
  return leaves.QuantizedTensor(
    packed, scales, None, None, rows=10, cols=4, bits=bits, group_size=4, format=name,
    group_cols=group_cols,
  )  # fmt: skip


def double(*batch):
  return table(*batch, nested=True)


def tiles(*batch):
  return table(*batch, name="ternary", bits=2, group_cols=3)


def outliers(*batch):
  at = np.stack([RNG.permutation(30)[:5] for _ in range(int(np.prod(batch)))])
  at = jnp.asarray(at.reshape(*batch, 1, 5).astype(np.int32))
  return leaves.Outliers(normal(*batch, 1, 5), at, rows=10, cols=3)


def activations(*batch):
  return leaves.ActivationQuantized(quantized(*batch), normal(*batch, 1, 1) if batch else None)


def tables(*batch):
  index = jnp.asarray(RNG.integers(0, 700, (*batch, 4, 2)).astype(np.uint16))
  return leaves.Codebook(
    packing.pack(index, bits=10), normal(*batch, 2 * 700, 6), 10, 4, 10, 3, normal(*batch, 1, 4),
    width=2, books=2,
  )  # fmt: skip


def signed(*batch):
  signs = jnp.asarray(RNG.integers(0, 2, (*batch, 10, 3)).astype(np.uint8))
  order = jnp.asarray(RNG.integers(0, 9, (*batch, 1, 1)).astype(np.int32))
  return leaves.SignedLowRank(
    packing.pack(signs, bits=1), normal(*batch, 10, 2), normal(*batch, 2, 3), order
  )


def clustered(*batch):
  index = jnp.asarray(RNG.integers(0, 4, (*batch, 1, 6)).astype(np.uint8))
  return leaves.ClusteredColumns(normal(*batch, 10, 4), index)


def marks(*batch, kept, of, cols):
  """Draws packed marks, as many in every column."""
  places = RNG.permuted(np.tile(np.arange(of), (*batch, cols, 1)), axis=-1) < kept
  return packing.pack(jnp.asarray(np.moveaxis(places, -1, -2).astype(np.uint8)), bits=1)


def groups(*batch):
  return leaves.GroupSparse(
    normal(*batch, 8, 3), marks(*batch, kept=2, of=3, cols=3), rows=10, group=4
  )


def split_rows(*batch):
  few = leaves.LowRank(normal(*batch, 3, 2), normal(*batch, 2, 3))
  return leaves.SplitRows(few, normal(*batch, 7, 3), marks(*batch, kept=3, of=10, cols=1))


def pairs(*batch):
  codes = jnp.asarray(RNG.integers(0, 16, (*batch, 10, 3)).astype(np.uint8))
  kind = jnp.asarray(RNG.integers(0, 2, (*batch, 1, 1)).astype(np.uint8))
  return leaves.OutlierVictim(packing.pack(codes, bits=4), normal(*batch, 1, 3), kind, 9, 3)


def rotated(*batch):
  return leaves.Rotated(quantized(*batch))


MAKERS = [
  quantized, sparse, codebook, low_rank, total, table, double, tiles, outliers, activations,
  tables, signed, clustered, groups, split_rows, pairs,
  rotated, sparse_codes,
]  # fmt: skip
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


@pytest.mark.parametrize(("name", "bits"), [("e2m1", 4), ("nf", 3), ("ternary", 2), ("sign", 1)])
def test_tables_and_tiles_by_definition(name, bits):
  leaf = table(name=name, bits=bits, group_cols=3)
  codes, levels = np.asarray(leaf.integers()), formats.levels(name, bits)
  for r in range(10):
    for c in range(4):
      expected = levels[codes[r, c]] * np.asarray(leaf.scales)[r // 4, c // 3]
      np.testing.assert_allclose(leaf.dense()[r, c], expected, rtol=1e-6)


@pytest.mark.parametrize(("size", "cols"), [(10, 4), (1, 4), (10, 1), (1, 2), (64, 64)])
def test_one_scale_a_tensor_an_input_an_output(size, cols):
  codes = jnp.asarray(RNG.integers(0, 256, (10, 4)).astype(np.uint8))
  scales = normal(-(-10 // size), -(-4 // cols))
  leaf = leaves.QuantizedTensor(codes, scales, None, None, 10, 4, 8, size, group_cols=cols)
  rows, columns = np.arange(10) // size, np.arange(4) // cols
  expected = (np.asarray(codes, float) - 128) * np.asarray(scales)[rows[:, None], columns]
  np.testing.assert_allclose(leaf.dense(), expected, rtol=1e-6)


def test_outliers_by_definition():
  leaf = outliers()
  expected = np.zeros(30, np.float32)
  expected[np.asarray(leaf.positions)[0]] = np.asarray(leaf.values)[0]
  np.testing.assert_array_equal(leaf.dense(), expected.reshape(10, 3))


def test_inputs_are_quantized_by_token_or_tensor():
  x = normal(5, 10)
  for per, axis in (("token", 1), ("tensor", None)):
    leaf = leaves.ActivationQuantized(normal(10, 3), None, per=per)
    scale = np.broadcast_to(np.abs(x).max(axis=axis, keepdims=True) / 127.5, (5, 1))
    np.testing.assert_array_equal(leaf.scales_of(x), scale)
    expected = np.clip(np.round(np.asarray(x) / scale), -128, 127)
    # Exact division: the largest input is 127.5 units, a tie.
    np.testing.assert_array_equal(leaf.codes_of(x, leaf.scales_of(x)), expected)
  static = dataclasses.replace(leaf, scale=jnp.full((1, 1), 0.5))
  np.testing.assert_array_equal(static.scales_of(x), 0.5)
  zero = leaves.ActivationQuantized(normal(10, 3), None, format="e4m3fn")
  assert not np.asarray(zero.codes_of(0 * x, zero.scales_of(0 * x))).any()


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


def test_wide_vectors_from_several_tables_with_scales_by_definition():
  leaf = tables()
  index = np.asarray(packing.unpack(leaf.codes, bits=10, rows=4), int)
  dense = np.asarray(leaf.dense())
  for r in range(10):
    for c in range(4):
      entry = leaf.codebook[700 * (c // 2) + index[r // 3, c // 2]]
      expected = entry[2 * (r % 3) + c % 2] * leaf.scales[0, c]
      np.testing.assert_allclose(dense[r, c], expected, rtol=1e-6)


def test_a_table_shared_by_stacked_layers_survives_slicing():
  one = codebook()
  codes = jnp.stack([one.codes, one.codes[::-1]])
  both = dataclasses.replace(
    one, codes=codes, codebook=jnp.broadcast_to(one.codebook, (2, *one.codebook.shape))
  )
  for i in range(2):
    alone = dataclasses.replace(one, codes=codes[i])
    assert leaves.signature(paths.take(both, i)) == leaves.signature(alone)
    np.testing.assert_array_equal(paths.take(both, i).dense(), alone.dense())


def test_signed_low_rank_by_definition():
  leaf = signed()
  signs = 2.0 * np.asarray(packing.unpack(leaf.signs, bits=1, rows=10)) - 1
  np.testing.assert_allclose(leaf.dense(), signs * (leaf.a @ leaf.b), rtol=1e-5, atol=1e-6)


def test_clustered_columns_by_definition():
  leaf = clustered()
  np.testing.assert_array_equal(leaf.dense(), np.asarray(leaf.centroids)[:, leaf.index[0]])


def test_group_sparse_by_definition():
  leaf = groups()
  mask, expected = np.asarray(leaf.places()), np.zeros((12, 3), np.float32)
  for c in range(3):
    for i, g in enumerate(np.flatnonzero(mask[:, c])):
      expected[4 * g : 4 * g + 4, c] = leaf.kept[4 * i : 4 * i + 4, c]
  np.testing.assert_array_equal(leaf.dense(), expected[:10])


def test_split_rows_by_definition():
  leaf = split_rows()
  mask = np.asarray(packing.unpack(leaf.mask, bits=1, rows=10))[:, 0] == 1
  expected = np.zeros((10, 3), np.float32)
  expected[mask], expected[~mask] = leaf.first.dense(), leaf.rest
  np.testing.assert_array_equal(leaf.dense(), expected)


def test_rotated_by_definition():
  w = normal(12, 3)
  leaf = leaves.Rotated.of(w)
  h = np.asarray(hadamard.matrix(12), np.float64)
  np.testing.assert_allclose(leaf.weight, h.T @ np.asarray(w), atol=1e-6)
  np.testing.assert_allclose(leaf.dense(), w, atol=1e-6)


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
    # Not to the bit: a product may sum in another order for more rows at once.
    np.testing.assert_allclose(paths.take(leaf, i).dense(), leaf.dense()[i], rtol=1e-5, atol=1e-5)
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
  np.testing.assert_allclose(jax.jit(leaves.dense)(leaf), leaf.dense(), rtol=1e-6, atol=1e-5)
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
  with pytest.raises(ValueError, match="unknown leaf type 'Nibbles'; known: Activation"):
    leaves.from_parts({"type": "Nibbles"}, {})
  with pytest.raises(ValueError, match="LowRank has no field 'c'; it has a, b, scale"):
    leaves.from_parts({"type": "LowRank"}, {**factors, "c": factors["a"]})
  with pytest.raises(ValueError, match="LowRank lacks the part 'b'"):
    leaves.from_parts({"type": "LowRank"}, {"a": factors["a"]})
