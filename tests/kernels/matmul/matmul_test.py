# SPDX-License-Identifier: Apache-2.0
"""Every implementation of matmul against float64 numpy, and under the transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves, packing
from treesurgeon.kernels.matmul import api, arg_specs

KEY = jax.random.key(0)


def exact(x, leaf):
  return np.asarray(x, np.float64) @ np.asarray(leaves.dense(leaf), np.float64)


def close(y, expected, dtype="float32"):
  assert y.dtype == jnp.dtype(dtype)
  tolerance = 2e-2 if dtype == "bfloat16" else 3e-5
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance)


def with_group_index(leaf, seed=0):
  groups = leaf.scales.shape[-2]
  index = np.random.default_rng(seed).integers(0, groups, (1, leaf.rows)).astype(np.int32)
  return dataclasses.replace(leaf, group_index=jnp.asarray(index))


def sparse():
  keys = jax.random.split(KEY, 2)
  values = jax.random.normal(keys[0], (8, 5))
  places = jnp.asarray(np.tile([[0], [3], [1], [2]], (2, 5)).astype(np.uint8))
  return leaves.SparseTensor(values, packing.pack(places, bits=2), 16, 5, 2, 4)


def codebook():
  index = jax.random.randint(KEY, (8, 5), 0, 16).astype(jnp.uint8)
  book = jax.random.normal(KEY, (16, 2))
  return leaves.Codebook(packing.pack(index, bits=4), book, 16, 5, 4, 2)


def low_rank():
  keys = jax.random.split(KEY, 2)
  return leaves.LowRank(
    jax.random.normal(keys[0], (16, 2)), jax.random.normal(keys[1], (2, 5)), scale=0.5
  )


@pytest.mark.parametrize("name", arg_specs.TESTS)
@pytest.mark.parametrize("implementation", [None, "grouped", "chunked", "reference"])
def test_quantized(name, implementation):
  spec = arg_specs.TESTS[name]
  x, leaf = arg_specs.operands(spec, KEY)
  if implementation and implementation not in api.supported(x, leaf):
    with pytest.raises(ValueError, match=f"'{implementation}' cannot.*supported here: chunked"):
      kernels.matmul(x, leaf, implementation=implementation)
    return
  y = jax.jit(functools.partial(kernels.matmul, implementation=implementation))(x, leaf)
  close(y, exact(x, leaf), spec.dtype)


@pytest.mark.parametrize("name", ["remainder", "odd rows", "odd group", "even"])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_group_index(name, implementation):
  x, leaf = arg_specs.operands(arg_specs.TESTS[name], KEY)
  leaf = with_group_index(leaf)
  close(kernels.matmul(x, leaf, implementation=implementation), exact(x, leaf))


def clustered():
  index = jax.random.randint(KEY, (1, 5), 0, 3).astype(jnp.uint8)
  return leaves.ClusteredColumns(jax.random.normal(KEY, (16, 3)), index)


def split_rows():
  mask = np.zeros((16, 1), np.uint8)
  mask[[3, 7]] = 1
  few, rest = jax.random.normal(KEY, (2, 5)), leaves.LowRank(jnp.ones((14, 2)), jnp.ones((2, 5)))
  return leaves.SplitRows(few, rest, packing.pack(jnp.asarray(mask), bits=1))


def rotated():
  return leaves.Rotated(low_rank())


@pytest.mark.parametrize("make", [sparse, codebook, low_rank, clustered, split_rows, rotated])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_other_leaves(make, batch):
  leaf = make()
  x = jax.random.normal(KEY, (*batch, 16))
  close(kernels.matmul(x, leaf), exact(x, leaf))


def test_sum_adds_products():
  parts = (sparse(), low_rank(), jnp.ones((16, 5)))
  x = jax.random.normal(KEY, (3, 16))
  close(kernels.matmul(x, leaves.Sum(parts)), sum(exact(x, p) for p in parts))


def test_array_is_a_plain_product():
  x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
  y = kernels.matmul(x, w)
  assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 5)


def test_low_rank_never_forms_the_product():
  leaf = leaves.LowRank(jnp.ones((512, 2)), jnp.ones((2, 512)))
  compiled = jax.jit(kernels.matmul).lower(jnp.ones((1, 512)), leaf).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512


@pytest.mark.parametrize("differentiate", [False, True])
def test_quantized_product_reads_packed_bytes_only(differentiate):
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(1, 1024, 1024), KEY)
  function = kernels.matmul
  if differentiate:
    function = jax.grad(lambda x, leaf: kernels.matmul(x, leaf).sum())
  analysis = jax.jit(function).lower(x, leaf).compile().memory_analysis()
  dense = 1024 * 1024 * 4
  assert analysis.argument_size_in_bytes < dense / 6
  assert analysis.temp_size_in_bytes < dense / 3


@pytest.mark.parametrize(
  "name",
  [
    "even",
    "odd group",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("remainder", "small groups")),
  ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_scan_over_stacked_layers(name, indexed):
  spec = arg_specs.TESTS[name]
  pairs = [arg_specs.operands(spec, k) for k in jax.random.split(KEY, 3)]
  pairs = [(x, with_group_index(leaf, i) if indexed else leaf) for i, (x, leaf) in enumerate(pairs)]
  xs, stacked = jax.tree.map(lambda *a: jnp.stack(a), *pairs)

  def body(carry, layer):
    return carry, kernels.matmul(*layer)

  scanned = jax.lax.scan(body, None, (xs, stacked))[1]
  mapped = jax.vmap(kernels.matmul)(xs, stacked)
  for i, (x, leaf) in enumerate(pairs):
    close(scanned[i], exact(x, leaf))
    close(mapped[i], exact(x, leaf))


@pytest.mark.parametrize("name", ["even", "remainder", "odd group", "long group"])
@pytest.mark.parametrize("implementation", ["chunked", "grouped", "reference"])
def test_gradients(name, implementation):
  x, leaf = arg_specs.operands(arg_specs.TESTS[name], KEY)
  if implementation not in api.supported(x, leaf):
    implementation = "chunked"
  g = jax.random.normal(KEY, (x.shape[0], leaf.cols))

  def loss(x, scales):
    part = dataclasses.replace(leaf, scales=scales)
    return (kernels.matmul(x, part, implementation=implementation) * g).sum()

  dx, ds = jax.grad(loss, (0, 1))(x, leaf.scales)
  close(dx, np.asarray(g, np.float64) @ np.asarray(leaf.dense(), np.float64).T)
  by_dense = jax.grad(lambda s: (x @ dataclasses.replace(leaf, scales=s).dense() * g).sum())
  np.testing.assert_allclose(ds, by_dense(leaf.scales), rtol=1e-3, atol=1e-3)
  tangent = jax.jvp(lambda x: loss(x, leaf.scales), (x,), (jnp.ones_like(x),))[1]
  np.testing.assert_allclose(tangent, dx.sum(), rtol=1e-3, atol=1e-3)


def test_factors_beside_a_frozen_base_are_trainable():
  x, base = arg_specs.operands(arg_specs.ArgSpec(3, 16, 5, group_size=8), KEY)
  factors = low_rank()

  def loss(a, b):
    leaf = leaves.Sum((base, leaves.LowRank(a, b, 0.5)))
    return kernels.matmul(x, leaf).sum()

  da, db = jax.jit(jax.grad(loss, (0, 1)))(factors.a, factors.b)
  column_sums = x.sum(axis=0)[:, None] * jnp.ones((1, 5))
  np.testing.assert_allclose(da, 0.5 * column_sums @ factors.b.T, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(db, 0.5 * factors.a.T @ column_sums, rtol=1e-4, atol=1e-4)


def test_errors():
  x, leaf = arg_specs.operands(arg_specs.TESTS["even"], KEY)
  with pytest.raises(ValueError, match="no implementation 'cuda'; it has tpu, mosaic_gpu, g"):
    kernels.matmul(x, leaf, implementation="cuda")
  with pytest.raises(ValueError, match=r"x of shape \(3, 255\) does not fit a QuantizedTensor"):
    kernels.matmul(x[:, 1:], leaf)
  with pytest.raises(ValueError, match="'chunked' cannot multiply.*takes QuantizedTensor, not Spa"):
    kernels.matmul(x[:, :16], sparse(), implementation="chunked")
  with pytest.raises(ValueError, match=r"the leaf must be one \(rows, cols\) matrix"):
    kernels.matmul(x, jax.tree.map(lambda a: a[None], leaf))
