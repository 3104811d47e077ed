# SPDX-License-Identifier: Apache-2.0
"""Bad operands are refused, with one message that says what is wrong, where, and what is valid."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.matmul import arg_specs

KEY = jax.random.key(0)
X, LEAF = arg_specs.operands(arg_specs.ArgSpec(3, 300, 9, symmetric=False), KEY)
READY = kernels.prepare(LEAF, target="tpu-v6e")
INDEX = jnp.zeros((1, 299), jnp.int32)


@pytest.mark.parametrize(
  ("leaf", "change", "message"),
  [
    (LEAF, {"codes": LEAF.codes[1:]}, r"codes have shape \(149, 9\), but 300 rows .*\(150, 9\)"),
    (LEAF, {"codes": LEAF.codes.view(jnp.int8)}, r"codes have dtype int8, but .* in uint8"),
    (LEAF, {"cols": 8}, r"codes have shape \(150, 9\), but .*need \(150, 8\)"),
    (LEAF, {"scales": LEAF.scales[1:]}, r"scales have shape \(2, 9\), but .*need \(3, 9\)"),
    (LEAF, {"zeros": LEAF.zeros[:, 1:]}, r"zeros have shape \(3, 8\), but .*need \(3, 9\)"),
    (LEAF, {"group_index": INDEX}, r"group_index has shape \(1, 299\), but .*need \(1, 300\)"),
    (LEAF, {"bits": 9}, r"bits=9, but a code has 1 to 8"),
    (READY, {"codes": READY.codes[1:]}, r"codes have shape .*for tpu-v6e need \(384, 128\)"),
    (READY, {"cols": 200}, r"codes have shape \(384, 128\), but .*need \(384, 256\)"),
    (READY, {"scales": READY.scales[:, 1:]}, r"scales have shape \(1, 7, 128\), .*\(1, 8, 128\)"),
  ],
)
def test_parts_that_disagree_with_the_shape(leaf, change, message):
  wrong = dataclasses.replace(leaf, **change)
  name = type(leaf).__name__
  with pytest.raises(ValueError, match=f"matmul: in the {name} {message}"):
    jax.eval_shape(kernels.matmul, X, wrong)
  tree = {"layers": [leaves.Sum((jnp.ones((300, 9)), wrong))]}
  place = r"at \['layers'\]\[0\].*1.*"
  with pytest.raises(ValueError, match=f"prepare: in the {name} {place}{message}"):
    kernels.prepare(tree, target="tpu-v6e")


def test_a_stack_of_scales_for_fewer_codes():
  stacked = jax.tree.map(lambda a: jnp.stack([a, a]), LEAF)
  wrong = dataclasses.replace(stacked, scales=stacked.scales[:1])
  with pytest.raises(ValueError, match=r"scales have shape \(1, 3, 9\), .*need \(2, 3, 9\)"):
    kernels.prepare(wrong)


@pytest.mark.parametrize("leaf", [LEAF, READY])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_scales_that_are_not_finite(leaf, value):
  wrong = dataclasses.replace(leaf, scales=leaf.scales.at[..., 0, 3].set(value))
  message = r"prepare: in the \w+ at \['a'\] 1 of \d+ scales are NaN or infinite; quantize it from"
  with pytest.raises(ValueError, match=message):
    kernels.prepare({"a": wrong})
  with pytest.raises(ValueError, match=message):  # known, though within a trace
    jax.eval_shape(lambda: kernels.prepare({"a": wrong}))
  jax.eval_shape(lambda w: kernels.prepare({"a": w}), wrong)
  zeros = jnp.full(leaf.zeros.shape, value)
  with pytest.raises(ValueError, match=r"(\d+) of \1 zeros are NaN or infinite"):
    kernels.prepare(dataclasses.replace(leaf, zeros=zeros), target="tpu-v6e")


def test_scales_of_scales_that_are_not_finite():
  scales = arg_specs.operands(arg_specs.ArgSpec(1, 3, 9, 8, 3), KEY)[1]
  scales = dataclasses.replace(scales, scales=scales.scales * jnp.nan)
  with pytest.raises(ValueError, match="9 of 9 scales are NaN"):
    kernels.prepare(dataclasses.replace(LEAF, scales=scales, zeros=None))


@pytest.mark.parametrize("leaf", [LEAF, READY, jnp.ones((300, 9))])
@pytest.mark.parametrize("dtype", ["int8", "uint32", "complex64"])
def test_activations_that_are_no_floats(leaf, dtype):
  with pytest.raises(ValueError, match=f"x has dtype {dtype}; activations are floating point"):
    kernels.matmul(X.astype(dtype), leaf)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "rf8", "bits": 8}, "no codes for format 'rf8'"),
    ({"group_index": jnp.zeros((1, 300), jnp.int32)}, "up to 128 rows a group, not 300"),
  ],
)
def test_what_the_tpu_kernel_does_not_take(change, message):
  leaf = dataclasses.replace(LEAF, **change)
  if leaf.bits == 8:
    leaf = dataclasses.replace(leaf, codes=jnp.zeros((300, 9), jnp.uint8), zeros=None)
  message = f"'tpu' cannot multiply.*not QuantizedTensor, and prepare leaves this one: .*{message}"
  with pytest.raises(ValueError, match=f"{message}; supported here: .*reference"):
    kernels.matmul(X, leaf, implementation="tpu")


@pytest.mark.parametrize("name", ["grouped", "chunked"])
def test_prepared_leaves_are_for_the_tpu_kernel_and_the_reference(name):
  message = (
    f"'{name}' cannot.*takes QuantizedTensor, not Prepared.*; supported here: tpu, reference"
  )
  with pytest.raises(ValueError, match=message):
    kernels.matmul(X, READY, implementation=name)


def test_rows_that_the_grouped_product_does_not_take():
  message = "takes whole groups of a multiple of 2 rows, not 300 rows in groups of 128; supported"
  with pytest.raises(ValueError, match=message):
    kernels.matmul(X, LEAF, implementation="grouped")
