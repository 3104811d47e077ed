# SPDX-License-Identifier: Apache-2.0
"""Shards of N:M weights are the blocks of the matrix, and multiply to its product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.sparse_matmul import arg_specs

KEY = jax.random.key(17)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("bits", [0, 8])
def test_shards_are_the_blocks_of_the_matrix(rows, cols, bits):
  leaf = arg_specs.sparse(64, 6, 2, 4, key=KEY, bits=bits)
  shards = kernels.split(leaf, rows=rows, cols=cols)
  assert shards.shape == (rows * cols, 64 // rows, 6 // cols)
  whole = np.asarray(leaf.dense()).reshape(rows, 64 // rows, cols, 6 // cols)
  np.testing.assert_array_equal(shards.dense(), whole.swapaxes(1, 2).reshape(shards.shape))


@pytest.mark.parametrize("target", [None, "tpu-v6e"])
def test_products_of_shards_add_up(target):
  leaf = arg_specs.sparse(64, 6, 2, 4, key=KEY)
  shards = kernels.prepare(kernels.split(leaf, rows=2), target=target)
  x = jax.random.normal(KEY, (3, 64))
  parts = jax.vmap(kernels.matmul)(jnp.stack([x[:, :32], x[:, 32:]]), shards)
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  np.testing.assert_allclose(parts.sum(axis=0), expected, rtol=1e-4, atol=1e-4)


def test_cuts_that_are_refused():
  leaf = arg_specs.sparse(64, 6, 2, 4, key=KEY)
  with pytest.raises(ValueError, match="rows=3 cuts 64 rows within a run.*valid are 1, 2, 4, 8"):
    kernels.split(leaf, rows=3)
  with pytest.raises(ValueError, match="cols=4 does not divide the 6 columns"):
    kernels.split(leaf, cols=4)
  with pytest.raises(ValueError, match="takes QuantizedTensor and SparseTensor, not LowRank"):
    kernels.split(leaves.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3))))
