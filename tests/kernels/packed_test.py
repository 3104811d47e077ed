# SPDX-License-Identifier: Apache-2.0
"""A compressed model runs on packed bytes: a product with any leaf never makes the matrix dense.

Each kind of leaf is multiplied by on a CPU, compiled from shapes alone. The program's arguments are
the leaf's own bytes, and its temporaries fall well short of the dense matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves, packing

ROWS, COLS = 8192, 1024


def shape(*size, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(size, dtype)


def stream(rows, cols, bits):
  return shape(packing.packed_rows(rows, bits), cols, dtype=jnp.uint8)


def quantized(bits=4, size=128, rows=ROWS, zeros=False, **more):
  groups = (-(-rows // size), -(-COLS // more.get("group_cols", 1)))
  points = shape(*groups, dtype=jnp.uint8) if zeros else None
  codes = stream(rows, COLS, bits)
  if more.get("format") == "ternary":
    codes = shape(-(-rows // 5), COLS, dtype=jnp.uint8)
  return leaves.QuantizedTensor(
    codes, shape(*groups), points, None, rows=rows, cols=COLS, bits=bits, group_size=size, **more
  )


def nested():
  scales = leaves.QuantizedTensor(
    shape(ROWS // 16, COLS, dtype=jnp.uint8), shape(1, 1), None, None, rows=ROWS // 16, cols=COLS,
    bits=8, group_size=ROWS, format="e4m3fn", group_cols=COLS,
  )  # fmt: skip
  return dataclasses.replace(quantized(size=16, format="e2m1"), scales=scales)


def ordered():
  index = shape(1, ROWS, dtype=jnp.int32)
  return dataclasses.replace(quantized(zeros=True), group_index=index)


def sparse(values):
  kept = ROWS // 2
  return leaves.SparseTensor(values, stream(kept, COLS, 2), ROWS, COLS, 2, 4)


def codebook(length=4, width=1, bits=8, **more):
  codes = stream(ROWS // length, COLS // width, bits)
  return leaves.Codebook(
    codes, shape(2**bits, length * width), ROWS, COLS, bits, length, width=width, **more
  )


def groups(kept):
  return leaves.GroupSparse(kept, stream(ROWS // 16, COLS, 1), ROWS, 16)


def factors(rank=8):
  return leaves.LowRank(shape(ROWS, rank), shape(rank, COLS))


def outliers(count=4096):
  return leaves.Outliers(shape(1, count), shape(1, count, dtype=jnp.int32), ROWS, COLS)


LEAVES = {
  **{f"int{bits}": lambda bits=bits: quantized(bits) for bits in range(1, 9)},
  "zero points": lambda: quantized(zeros=True),
  "one group": lambda: quantized(size=ROWS),
  "order of activations": ordered,
  "odd groups": lambda: quantized(3, 36),
  **{
    name: lambda name=name, bits=bits: quantized(bits, 32, format=name)
    for name, bits in (("nf", 4), ("ternary", 2), ("sign", 1), ("e2m1", 4), ("e4m3fn", 8))
  },
  "scale an input": lambda: quantized(size=1, group_cols=COLS),
  "tiles": lambda: quantized(format="nf", group_cols=128),
  "NVFP4": nested,
  "2:4": lambda: sparse(shape(ROWS // 2, COLS)),
  "2:4 of bfloat16": lambda: sparse(shape(ROWS // 2, COLS, dtype=jnp.bfloat16)),
  "2:4 of int8": lambda: sparse(quantized(8, ROWS // 2, ROWS // 2)),
  "2:4 of int4": lambda: sparse(quantized(4, 64, ROWS // 2)),
  "vectors": codebook,
  "vectors across": lambda: codebook(1, 8, 12, scales=shape(1, COLS)),
  "residual vectors": lambda: leaves.Sum((codebook(8), codebook(8))),
  "low rank": factors,
  "single weights": outliers,
  "SpQR": lambda: leaves.Sum((quantized(3, 16), outliers(), factors())),
  "quantized inputs": lambda: leaves.ActivationQuantized(quantized(), None),
  "W8A8": lambda: leaves.ActivationQuantized(quantized(8, ROWS), None),
  "W4A8 of floats": lambda: leaves.ActivationQuantized(quantized(format="nf"), None, 8, "e4m3fn"),
  "rows apart": lambda: leaves.SplitRows(
    shape(256, COLS), quantized(rows=ROWS - 256), stream(ROWS, 1, 1)
  ),
  "signs and factors": lambda: leaves.SignedLowRank(
    stream(ROWS, COLS, 1), shape(ROWS, 8), shape(8, COLS)
  ),
  "clustered columns": lambda: leaves.ClusteredColumns(
    quantized(), shape(1, 4 * COLS, dtype=jnp.uint16)
  ),
  "groups": lambda: groups(shape(ROWS // 2, COLS)),
  "groups of bfloat16": lambda: groups(shape(ROWS // 2, COLS, dtype=jnp.bfloat16)),
  "GQSA": lambda: groups(quantized(4, 16, ROWS // 2)),
  "turned": lambda: leaves.Rotated(quantized()),
  "outlier and victim": lambda: leaves.OutlierVictim(
    stream(ROWS, COLS, 4), shape(1, COLS), shape(1, 1, dtype=jnp.uint8), ROWS, COLS
  ),
}
# What does make a matrix, and why.
EXCEPTIONS: dict[str, str] = {}


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("name", LEAVES)
def test_no_dense_matrix_is_made(name, tokens):
  leaf = LEAVES[name]()
  program = jax.jit(kernels.matmul).lower(shape(tokens, leaf.rows), leaf).compile()
  memory = program.memory_analysis()
  dense = 4 * leaf.rows * leaf.cols
  assert memory.argument_size_in_bytes <= leaf.nbytes + 4 * tokens * leaf.rows + 1024
  assert leaf.nbytes < 0.6 * dense
  if name in EXCEPTIONS:
    assert memory.temp_size_in_bytes >= dense / 4, f"{name} is no exception any more"
  else:
    assert memory.temp_size_in_bytes < dense / 2


def test_every_kind_of_leaf_is_here():
  kinds = set()
  for make in LEAVES.values():
    found = [make()]
    while found:
      leaf = found.pop()
      kinds.add(type(leaf).__name__)
      found += [v for v in vars(leaf).values() if leaves.is_leaf(v)]
      found += getattr(leaf, "parts", ())
  assert kinds == set(leaves.TYPES)
