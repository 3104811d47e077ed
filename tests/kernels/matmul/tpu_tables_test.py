# SPDX-License-Identifier: Apache-2.0
"""Tables and 8-bit floats in the TPU kernel: interpreted with race detection it equals float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from treesurgeon import kernels
from treesurgeon.core import formats, leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import arg_specs, tpu, tpu_transposed, values

KEY = jax.random.key(3)
BFLOAT16 = ml_dtypes.bfloat16


def interpreted(fn, *args, **kwargs):
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    y = np.asarray(fn(*args, **kwargs), np.float64)
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  return y


def draw(format, bits, tokens=3, rows=300, cols=130, group_size=64):
  spec = arg_specs.ArgSpec(tokens, rows, cols, bits, group_size)
  x, leaf = arg_specs.operands(spec, KEY)
  if bits == 8:  # no code for what is no number
    leaf = dataclasses.replace(leaf, codes=leaf.codes & 0xBB)
  return x, dataclasses.replace(leaf, format=format)


def weights(leaf, ready, scaled=False):
  """Compute the weights in float64, rounded where the kernel rounds."""
  units = formats.levels(leaf.format, leaf.bits)[np.asarray(leaf.integers())]
  if ready.line.kind == "steps":
    codes = np.asarray(leaf.integers()) if ready.line.codes is None else None
    codes = ready.line.codes[np.asarray(leaf.integers())] if codes is None else codes
    units = (codes - ready.line.zero) * ready.line.factor
  elif ready.line.kind == "table":
    units = units.astype(BFLOAT16)
  scales = np.asarray(leaf.spread(leaf.scales))
  if scaled:
    w = units.astype(np.float32) * scales.astype(BFLOAT16).astype(np.float32)
    return w.astype(BFLOAT16).astype(np.float64)
  return units.astype(np.float64) * scales.astype(np.float64)


@pytest.mark.parametrize(
  ("format", "bits", "target", "tokens", "kind"),
  [
    ("nf", 4, "tpu-v5e", 3, "table"),
    ("nf", 3, "tpu-v5p", 3, "table"),
    pytest.param("nf", 4, "tpu-v5p", 3, "steps", marks=pytest.mark.slow),
    ("nf", 4, "tpu-v6e", 100, "table"),
    ("nf", 2, "tpu-v6e", 1, "table"),
    ("e2m1", 4, "tpu7x", 3, "table"),
    ("e4m3fn", 8, "tpu-v6e", 3, "e4m3fn"),
    pytest.param("e4m3fn", 8, "tpu-v5e", 3, "e4m3fn", marks=pytest.mark.slow),
    ("e5m2", 8, "tpu7x", 100, "e5m2"),
    ("shift", 5, "tpu-v5e", 3, "e5m2"),
  ],
)
def test_it_equals_float64(format, bits, target, tokens, kind):
  x, leaf = draw(format, bits, tokens)
  ready = kernels.prepare(leaf, target=target)
  assert ready.line.kind == kind
  np.testing.assert_array_equal(ready.restore().codes, leaf.codes)
  scaled = tpu.scales_weights(tokens, ready)
  expected = np.asarray(x).astype(BFLOAT16).astype(np.float64) @ weights(leaf, ready, scaled)
  got = interpreted(tpu.matmul, x, ready)
  share = 2e-3 if scaled else 3e-5
  np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
@pytest.mark.parametrize("rows", [77, 2048])
def test_every_table_on_every_chip(rows, target):
  cases = [("nf", b) for b in range(2, 8)] + [("pow2", 4), ("shift", 4), ("e3m2", 6), ("e3m3", 7)]
  for format, bits in cases:
    x, leaf = draw(format, bits, rows=rows, cols=9, group_size=256)
    ready = kernels.prepare(leaf, target=target)
    ready = getattr(ready, "matrix", ready)
    expected = np.asarray(x).astype(BFLOAT16).astype(np.float64) @ weights(leaf, ready)
    got = interpreted(tpu.matmul, x, ready)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_every_e4m3_comes_out_of_words():
  codes = np.arange(256, dtype=np.uint8)
  codes[[127, 255]] = 0  # no numbers
  stream = jnp.asarray(np.tile(codes[:, None], (1, 128)))
  leaf = leaves.QuantizedTensor(
    stream, jnp.ones((1, 128)), None, None, rows=256, cols=128, bits=8, group_size=256,
    format="e4m3fn",
  )  # fmt: skip
  ready = kernels.prepare(leaf, target="tpu-v6e")
  assert ready.layout == "gs32"
  got = interpreted(tpu.matmul, jnp.eye(256), ready)  # which scales weights: 1 is exact
  np.testing.assert_array_equal(got[:, 0], formats.levels("e4m3fn", 8)[codes])


@pytest.mark.parametrize("target", ["tpu-v6e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_inputs_in_8_bit_floats(target):
  x, weight = draw("e4m3fn", 8)
  leaf = leaves.ActivationQuantized(weight, None, format="e4m3fn")
  ready = kernels.prepare(leaf, target=target)
  assert ready.weight.inputs == "float8_e4m3fn"
  assert ready.weight.codes.dtype == jnp.float8_e4m3fn
  got = interpreted(kernels.matmul, x, ready, implementation="tpu")
  scales = leaf.scales_of(x)
  units = np.asarray(leaf.codes_of(x, scales), np.float64)
  expected = units @ np.asarray(weight.dense(), np.float64) * np.asarray(scales, np.float64)
  np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
  elsewhere = kernels.matmul(x, ready)
  np.testing.assert_allclose(elsewhere, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
  np.testing.assert_array_equal(kernels.restore(ready).weight.codes, weight.codes)


@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
def test_the_transposed_product_of_a_table(target):
  _, leaf = draw("nf", 4, rows=256)
  ready = kernels.prepare(leaf, target=target)
  g = jax.random.normal(KEY, (3, 130))
  got = interpreted(tpu_transposed.matmul, g, ready, dtype=jnp.float32, width=256)
  expected = np.asarray(g, np.float64) @ weights(leaf, ready).T
  np.testing.assert_allclose(got, expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_tables_of_integers_for_integers():
  x, weight = draw("nf", 4)
  leaf = leaves.ActivationQuantized(weight, None)
  ready = kernels.prepare(leaf, target="tpu-v6e")
  assert (ready.weight.inputs, ready.weight.layout) == ("int8", "native")
  got = interpreted(kernels.matmul, x, ready, implementation="tpu")
  scales = leaf.scales_of(x)
  units = np.asarray(leaf.codes_of(x, scales), np.float64)
  expected = units @ weights(weight, ready.weight) * np.asarray(scales, np.float64)
  np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_what_is_looked_up_is_in_short_runs():
  _, leaf = draw("nf", 2, rows=2048, group_size=640)
  ready = kernels.prepare(leaf, target="tpu-v6e")
  assert ready.matrix.group_size == 128 and ready.matrix.layout == "gs32"
  assert values.find("nf", 2, "tpu-v6e").by_pairs
  np.testing.assert_array_equal(ready.restore().scales, leaf.scales)
