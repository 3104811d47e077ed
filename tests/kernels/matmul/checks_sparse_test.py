# SPDX-License-Identifier: Apache-2.0
"""Bad sparse and vector-quantized operands are refused, in words."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.sparse_matmul import arg_specs

KEY = jax.random.key(0)
SPARSE = arg_specs.sparse(32, 3, 2, 4, key=KEY)
CODES = arg_specs.sparse(32, 3, 2, 4, key=KEY, bits=8)
GROUPS = arg_specs.group_sparse(32, 3, key=KEY)
VECTORS = leaves.Codebook(jnp.zeros((16, 3), jnp.uint8), jnp.ones((4, 2)), 32, 3, 8, 2)


@pytest.mark.parametrize(
  ("leaf", "change", "message"),
  [
    (SPARSE, {"values": SPARSE.values[1:]}, r"values have shape \(15, 3\), but 2:4 .*\(16, 3\)"),
    (SPARSE, {"positions": SPARSE.positions[1:]}, r"positions have shape \(3, 3\), .*\(4, 3\)"),
    (SPARSE, {"m": 5}, r"2:5 of 32 rows; N is 1 to M, and M divides the rows"),
    (
      GROUPS,
      {"mask": GROUPS.mask[:, 1:]},
      r"mask have shape \(1, 2\), but 32 rows in groups of 16",
    ),
    (GROUPS, {"group": 24}, r"kept has 16 rows, not a multiple of the 24"),
    (VECTORS, {"codes": VECTORS.codes[1:]}, r"codes have shape \(15, 3\), .*2 x 1 need \(16, 3\)"),
    (VECTORS, {"length": 4}, r"codes have shape \(16, 3\), .*need \(8, 3\)"),
    (VECTORS, {"width": 3, "cols": 9}, r"codebook have shape \(4, 2\), .*need \(4, 6\)"),
  ],
)
def test_parts_that_disagree_with_the_shape(leaf, change, message):
  wrong = dataclasses.replace(leaf, **change)
  name = type(leaf).__name__
  with pytest.raises(ValueError, match=f"matmul: in the {name} {message}"):
    jax.eval_shape(kernels.matmul, jnp.ones((1, 32)), wrong)
  with pytest.raises(ValueError, match=rf"prepare: in the {name} at \['w'\] {message}"):
    kernels.prepare({"w": wrong}, target="tpu-v6e")


def test_parts_within_parts():
  wrong = dataclasses.replace(CODES.values, codes=CODES.values.codes[1:])
  message = r"matmul: in the QuantizedTensor at .values codes have shape \(15, 3\), .*\(16, 3\)"
  with pytest.raises(ValueError, match=message):
    kernels.matmul(jnp.ones((1, 32)), dataclasses.replace(CODES, values=wrong))
  scales = CODES.values.scales.at[0, 1].set(jnp.nan)
  wrong = dataclasses.replace(CODES, values=dataclasses.replace(CODES.values, scales=scales))
  with pytest.raises(ValueError, match=r"at \['w'\].values 1 of 3 scales are NaN"):
    kernels.prepare({"w": wrong}, target="tpu-v6e")


def test_positions_out_of_order():
  wrong = dataclasses.replace(SPARSE, positions=jnp.full((4, 3), 0b01_11_10_00, jnp.uint8))
  message = "in the SparseTensor 12 runs of 4 rows have positions that do not rise below 4"
  with pytest.raises(ValueError, match=message):
    kernels.prepare(wrong, target="tpu-v6e")
  stacked = jax.tree.map(lambda a: a[None], SPARSE)
  assert kernels.restore(kernels.prepare(stacked, target="tpu-v6e")).shape == (1, 32, 3)
