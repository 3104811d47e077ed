# SPDX-License-Identifier: Apache-2.0
"""Products on Hopper GPUs, as far as they go without one: layout, choice, lowering, interpreter."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.experiments import bench_kernels
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import api, arg_specs, gpu, prepared

KEY = jax.random.key(0)
TARGET = "gpu-sm90"
HERE = pathlib.Path(__file__)


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the interpreter of this jax lacks transposed references"
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted_it_equals_float64(which):
  command = [sys.executable, "-P", "-m", "pytest", str(HERE.with_name("gpu_interpreted.py")), "-q",
             "-p", "no:cacheprovider", "-m", which]  # fmt: skip
  # A fault in a warpgroup leaves the others waiting for it.
  done = subprocess.run(
    command,
    env={**os.environ, "NPROC": "16"},
    cwd=HERE.parents[3],
    capture_output=True,
    text=True,
    check=False,
    timeout=1200,
  )
  assert done.returncode == 0, done.stdout[-4000:]
  assert " passed" in done.stdout


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@settings(max_examples=6, deadline=None)
@given(
  rows=st.integers(1, 700),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((64, 128, 256, 10_000)),
  symmetric=st.booleans(),
  scales=st.sampled_from(["float32", "bfloat16", "float16"]),
  zeros=st.sampled_from(["uint8", "float32"]),
)
def test_restoring_is_exact(rows, bits, group_size, symmetric, scales, zeros):
  leaf = arg_specs.operands(arg_specs.ArgSpec(1, rows, 5, bits, group_size, symmetric), KEY)[1]
  leaf = dataclasses.replace(
    leaf,
    scales=leaf.scales.astype(scales),
    zeros=None if leaf.zeros is None else leaf.zeros.astype(zeros),
  )
  ready = kernels.prepare(leaf, target=TARGET)
  assert ready.codes.dtype == (jnp.int4 if bits <= 4 else jnp.int8)
  whole = 128 if group_size >= rows else max(128, group_size)
  assert ready.codes.shape == (128, -(-rows // whole) * whole)
  same(ready.restore(), leaf)
  same(kernels.prepare(ready, target="tpu-v6e"), kernels.prepare(leaf, target="tpu-v6e"))


def test_stacks_and_quantized_inputs_are_arranged():
  leaf = arg_specs.operands(arg_specs.ArgSpec(1, 256, 5), KEY)[1]
  stack = jax.tree.map(lambda a: jnp.stack([a, a + 0])[None], leaf)
  ready = kernels.prepare({"a": stack, "b": leaves.ActivationQuantized(leaf, None)}, target=TARGET)
  assert ready["a"].shape == (1, 2, 256, 5) and ready["b"].weight.inputs == "int8"
  same(kernels.restore(ready), {"a": stack, "b": leaves.ActivationQuantized(leaf, None)})
  uneven = arg_specs.operands(arg_specs.ArgSpec(1, 256, 5, symmetric=False), KEY)[1]
  ready = kernels.prepare(leaves.ActivationQuantized(uneven, None), target=TARGET)
  assert ready.weight.inputs == "bfloat16"  # its integers are less a zero point


def test_elsewhere_it_is_plain_xla():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, dtype="bfloat16"), KEY)
  ready = kernels.prepare(leaf, target=TARGET)
  assert isinstance(ready, prepared.PreparedTensor)
  np.testing.assert_allclose(
    kernels.matmul(x, ready), kernels.matmul(x, leaf), rtol=2e-2, atol=2e-2
  )
  quantized = leaves.ActivationQuantized(leaf, None)
  got = kernels.matmul(x, kernels.prepare(quantized, target=TARGET))
  np.testing.assert_allclose(got, kernels.matmul(x, quantized), rtol=2e-2, atol=2e-2)


def lowered(fn, *args):
  """Lower for a GPU, of which nothing needs to be installed."""
  allowed = [jax.export.DisabledSafetyCheck.custom_call(n) for n in ("mosaic_gpu_v2", "Sharding")]
  return jax.export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=allowed)(*args)


@pytest.mark.parametrize("tokens", [3, 300])
def test_it_is_lowered_per_platform(tokens):
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(tokens, 256, 8, dtype="bfloat16"), KEY)
  ready = kernels.prepare(leaf, target=TARGET)
  assert "mosaic_gpu" in lowered(kernels.matmul, x, ready).mlir_module()
  assert "mosaic_gpu" not in jax.jit(kernels.matmul).lower(x, ready).as_text()
  wide = x.astype(jnp.float32)  # XLA multiplies these with more bits
  assert "mosaic_gpu" not in lowered(kernels.matmul, wide, ready).mlir_module()


def test_a_model_runs_it_in_its_layers():
  fn, (params, tokens) = bench_kernels.forward(TARGET, "compress.quantize.rtn(bits=4)")
  text = lowered(fn, params, tokens).mlir_module()
  # Layers are scanned over: one body has the seven or so kernels of a layer, read in their stack.
  assert text.count("mosaic_gpu_v2") >= 6
  stack = params["layers"]["0:3"]["attn"]["q"]["kernel"].codes
  shape = "x".join(map(str, stack.shape))
  calls = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
  assert any(f"tensor<{shape}xi4>" in line for line in calls)


def test_refusals():
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, dtype="bfloat16"), KEY)
  ready = kernels.prepare(leaf, target=TARGET)
  named = lambda x, leaf, name="mosaic_gpu": kernels.matmul(x, leaf, implementation=name)
  with pytest.raises(ValueError, match="'mosaic_gpu' cannot.*made for a GPU, not QuantizedTensor"):
    named(x, leaf)
  with pytest.raises(ValueError, match="'mosaic_gpu' cannot.*activations in bfloat16, not float32"):
    named(x.astype(jnp.float32), ready)
  with pytest.raises(ValueError, match="'mosaic_gpu' cannot.*at least one token"):
    named(x[:0], ready)
  with pytest.raises(ValueError, match="'mosaic_gpu' cannot.*for a GPU, not for tpu-v6e"):
    named(x, kernels.prepare(leaf, target="tpu-v6e"))
  with pytest.raises(ValueError, match="'tpu' cannot.*for a TPU, not for gpu-sm90"):
    named(x, ready, "tpu")
  assert "mosaic_gpu" in api.supported(x, ready) and "tpu" not in api.supported(x, ready)
  small = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, group_size=32), KEY)[1]
  assert kernels.prepare(small, target=TARGET) is small
  with pytest.raises(ValueError, match="on a GPU it takes groups of 64 or a multiple of 128 rows"):
    named(x, small)


class Hopper:
  device_kind = "NVIDIA H200"
  compute_capability = "9.0"


class Ampere:
  device_kind = "NVIDIA A100"
  compute_capability = "8.0"


def test_gpus_are_found_by_their_capability(monkeypatch):
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(3, 256, 8, dtype="bfloat16"), KEY)
  ready = kernels.prepare(leaf, target=TARGET)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [Hopper])
  assert devices.here() == TARGET and not gpu.unsupported(x, ready)
  monkeypatch.setattr(jax, "devices", lambda: [Ampere])
  assert devices.here() is None
  assert "made for this GPU, not for gpu-sm90" in gpu.unsupported(x, ready)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128, 1024, 20_000])
@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (4096, 4096), (14336, 4096), (1408, 384)])
def test_tiles_cover_the_matrix(rows, cols, group_size, bits):
  spec = arg_specs.ArgSpec(1, rows, cols, bits, group_size)
  leaf = jax.eval_shape(lambda w: kernels.prepare(w, target=TARGET), arg_specs.quantized(spec))
  for tokens in (1, 16, 64, 65, 300, 4096):
    tile = gpu.choose(tokens, leaf)
    covered = leaf.codes.shape[-1]
    assert tile.depth * tile.steps * tile.splits == covered and cols % (64 * tile.groups) == 0
    of_block = tile.depth * tile.steps
    assert group_size >= rows or of_block % group_size == 0 or group_size % of_block == 0
    assert 2 <= tile.slots <= gpu.SLOTS
    step = tile.tokens * tile.depth * 2 + 64 * tile.groups * (tile.depth * leaf.width / 8 + 8)
    out = tile.groups * 64 * min(tile.tokens, 64) * 4
    assert tile.slots * step + out < 227 << 10  # bytes of shared memory that a block may have
  one = gpu.choose(1, leaf)
  if (rows, cols) == (4096, 4096):  # all multiprocessors work on a single token
    assert 0.9 * 132 < one.splits * cols // (64 * one.groups) <= 132


@pytest.mark.parametrize("groups", [2, 4])
def test_warpgroups_exchange_the_registers_they_start_with(groups):
  block = gpu._block()
  warpgroups = groups + 1
  first = (1 << 16) // (128 * warpgroups) // 8 * 8  # what a thread can start with
  copies, multiplies = block._REGISTERS.get(groups, (first, first))
  assert copies % 8 == multiplies % 8 == 0 and copies <= first <= multiplies
  assert copies + groups * multiplies <= warpgroups * first


def test_importing_does_not_load_the_gpu_part():
  code = (
    "import sys, treesurgeon.kernels; assert 'jax._src.pallas.mosaic_gpu.core' not in sys.modules"
  )
  subprocess.run([sys.executable, "-P", "-c", code], check=True)
