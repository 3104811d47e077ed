# SPDX-License-Identifier: Apache-2.0
"""Named operands that tests and benchmarks share, and programs to compile ahead of time."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import formats, leaves, packing
from treesurgeon.kernels.matmul import api, arrange, reference, stacked, tpu
from treesurgeon.kernels.sparse_matmul import arg_specs as sparse


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """Shapes and format of one product with a quantized matrix.

  Attributes:
    tokens, rows, cols: the product is (tokens, rows) @ (rows, cols).
    bits, group_size: of the codes.
    symmetric: whether there are no zero points.
    dtype: of the activations.
  """

  tokens: int
  rows: int
  cols: int
  bits: int = 4
  group_size: int = 128
  symmetric: bool = True
  dtype: str = "float32"


TESTS = {
  "even": ArgSpec(3, 256, 24),
  "remainder": ArgSpec(2, 300, 9, symmetric=False),
  "odd rows": ArgSpec(2, 77, 5, bits=3, group_size=24, symmetric=False),
  "odd group": ArgSpec(2, 50, 6, group_size=7),
  "one group": ArgSpec(1, 333, 8, bits=8, group_size=333),
  "long group": ArgSpec(2, 1200, 8, bits=2, group_size=400, symmetric=False),
  "small groups": ArgSpec(5, 160, 7, bits=5, group_size=16, symmetric=False),
  "one bit": ArgSpec(1, 130, 4, bits=1, group_size=64, symmetric=False),
  "bfloat16": ArgSpec(2, 256, 16, dtype="bfloat16"),
  "many tokens": ArgSpec(130, 1100, 3, group_size=32, symmetric=False),
  "one row": ArgSpec(1, 1, 3, group_size=1),
}
BENCHMARKS = {
  "decode": ArgSpec(1, 4096, 4096),
  "batch 8": ArgSpec(8, 4096, 4096),
  "prefill": ArgSpec(512, 4096, 4096),
  "mlp": ArgSpec(1, 4096, 14336),
}


def operands(spec: ArgSpec, key: jax.Array) -> tuple[jax.Array, leaves.QuantizedTensor]:
  """Draw random operands of a product.

  Args:
    spec: shapes and format.
    key: random key.

  Returns:
    (x, leaf): activations of unit variance and a quantized matrix of variance 1 / rows.

  Example:
    >>> x, leaf = operands(TESTS["even"], jax.random.key(0))
    >>> x.shape, leaf.shape
    ((3, 256), (256, 24))
  """
  kx, kc, ks, kz = jax.random.split(key, 4)
  groups = -(-spec.rows // spec.group_size)
  top = 2**spec.bits
  codes = jax.random.randint(kc, (spec.rows, spec.cols), 0, top).astype(jnp.uint8)
  scales = jax.random.uniform(ks, (groups, spec.cols), minval=0.5, maxval=1.5)
  zeros = None
  if not spec.symmetric:
    zeros = jax.random.randint(kz, scales.shape, 0, top).astype(jnp.uint8)
  leaf = leaves.QuantizedTensor(
    packing.pack(codes, bits=spec.bits), scales * (4 / top / spec.rows**0.5), zeros, None,
    rows=spec.rows, cols=spec.cols, bits=spec.bits, group_size=spec.group_size,
  )  # fmt: skip
  return jax.random.normal(kx, (spec.tokens, spec.rows), jnp.dtype(spec.dtype)), leaf


def quantized(spec: ArgSpec, format: str = "int") -> leaves.QuantizedTensor:
  """Describe a quantized matrix without making one.

  Args:
    spec: shapes and bits.
    format: of the codes.

  Returns:
    A leaf of `jax.ShapeDtypeStruct`.

  Example:
    >>> quantized(ArgSpec(1, 256, 8)).codes.shape
    (128, 8)
  """
  packed = packing.packed_rows(spec.rows, spec.bits)
  if format == "ternary":
    packed = -(-spec.rows // formats.TRITS)
  per_group = (-(-spec.rows // spec.group_size), spec.cols)
  zeros = None if spec.symmetric else jax.ShapeDtypeStruct(per_group, jnp.uint8)
  return leaves.QuantizedTensor(
    jax.ShapeDtypeStruct((packed, spec.cols), jnp.uint8),
    jax.ShapeDtypeStruct(per_group, jnp.float32), zeros, None, rows=spec.rows, cols=spec.cols,
    bits=spec.bits, group_size=spec.group_size, format=format,
  )  # fmt: skip


def product(
  format: str,
  tokens: int,
  rows: int,
  cols: int,
  group_size: int,
  target: str,
  block: Sequence[int] | None = None,
  symmetric: bool = True,
  experts: int = 0,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe a product for `static_cost`: activations in bfloat16 by a matrix as a device has it.

  Args:
    format: "bf16", "int1" to "int8", "nf2" to "nf7", "ternary", "sign", "e2m1", "e4m3fn" or "e5m2";
      with "-a8" at the end inputs are quantized to 8 bits, to floats where weights are of 8, "-dx"
      is the gradient of the inputs from that of the product, for "-order" rows are in the order of
      activations, for "-inputs" scales are those of inputs, and for "-xla" the matrix is
      dequantized in plain XLA and multiplied. "mxfp4" and "nvfp4" are e2m1 with the groups and
      scales of their names. Others are those of `sparse_matmul.arg_specs`.
    tokens, rows, cols: the product is (tokens, rows) @ (rows, cols).
    group_size: rows of a group.
    target: name of the device.
    block: tokens and columns of a block of the kernel; None lets it choose.
    symmetric: whether there are no zero points.
    experts: so many products at once, by `vmap`; 0 is one.

  Returns:
    (function, shapes of its arguments).

  Example:
    >>> product("int4", 1, 256, 8, 128, "tpu-v5e")[1][1].codes.shape
    (64, 128)
  """
  if sparse.takes(format):
    return sparse.product(format, tokens, rows, cols, target, block)
  x = jax.ShapeDtypeStruct((tokens, rows), jnp.bfloat16)
  if format == "bf16":
    return api.matmul, (x, jax.ShapeDtypeStruct((rows, cols), jnp.bfloat16))
  format, _, how = format.partition("-")
  widths = {"ternary": 2, "sign": 1, "e2m1": 4, "e4m3fn": 8, "e5m2": 8, "mxfp4": 4, "nvfp4": 4}
  name = format if format in widths else format.rstrip("12345678")
  bits = widths.get(format) or int(format.removeprefix(name))
  group_size = {"mxfp4": 32, "nvfp4": 16}.get(format, group_size)
  spec = ArgSpec(tokens, rows, cols, bits, group_size, symmetric, "bfloat16")
  leaf = quantized(spec, "e2m1" if format in ("mxfp4", "nvfp4") else name)
  if format == "mxfp4":
    powers = jax.ShapeDtypeStruct(leaf.scales.shape, jnp.float8_e8m0fnu)
    leaf = dataclasses.replace(leaf, scales=powers)
  if format == "nvfp4":
    groups = leaf.scales.shape[0]
    scales = leaves.QuantizedTensor(
      jax.ShapeDtypeStruct((groups, cols), jnp.uint8), jax.ShapeDtypeStruct((1, 1), jnp.float32),
      None, None, rows=groups, cols=cols, bits=8, group_size=groups, format="e4m3fn",
      group_cols=cols,
    )  # fmt: skip
    leaf = dataclasses.replace(leaf, scales=scales)
  if how == "order":
    leaf = dataclasses.replace(leaf, group_index=jax.ShapeDtypeStruct((1, rows), jnp.int32))
  if how == "inputs":
    scales = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    leaf = dataclasses.replace(leaf, scales=scales, group_size=1, group_cols=cols)
  if how == "xla":
    return lambda x, w: reference.matmul(x, w).astype(x.dtype), (x, leaf)
  if how == "a8":
    leaf = leaves.ActivationQuantized(leaf, None, format=name if bits == 8 else "int")
  leaf = jax.eval_shape(lambda w: arrange.prepare(w, target=target), leaf)
  if how == "dx":
    dy = jax.ShapeDtypeStruct((tokens, cols), x.dtype)
    pull = lambda dy, leaf: jax.vjp(lambda x: api.matmul(x, leaf), jnp.zeros(x.shape, x.dtype))[1](
      dy
    )
    return pull, (dy, leaf)
  if experts:
    stack = lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype)
    return jax.vmap(api.matmul), jax.tree.map(stack, (x, leaf))
  if block is not None:
    tokens_of, width = block
    fn = functools.partial(tpu.matmul, dtype=jnp.bfloat16, block=(tokens_of, width))
    if how == "a8":
      x, leaf = jax.ShapeDtypeStruct(x.shape, leaf.weight.inputs), leaf.weight
    return fn, (x, stacked.matrix(leaf))
  return api.matmul, (x, leaf)
