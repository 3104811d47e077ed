# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own assembler takes every kernel for Hopper GPUs and spills nothing; no GPU is needed.

It needs the plugin of jax for CUDA, 500 MB: `make test-gpu-aot` installs it and runs this.
"""

import importlib.util

import pytest

from treesurgeon.kernels import static_gpu

if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
  pytest.skip("it needs the CUDA plugin of jax: make test-gpu-aot", allow_module_level=True)

PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
TOKENS = (1, 16, 64, 128, 4096)
SHAPES = (  # rows, columns, group size
  (4096, 4096, 128),
  (8192, 28672, 128),
  (4096, 4096, 64),
  (4096, 4096, 1024),
  (4096, 4096, 4096),
  (4000, 1000, 128),
)


def check(formats, tokens, shapes, **more):
  asked = [
    {"format": f, "tokens": t, "rows": k, "cols": n, "group_size": g, "target": "gpu-sm90", **more}
    for f in formats
    for t in tokens
    for k, n, g in shapes
  ]
  wrong = []
  for one, built in zip(asked, static_gpu.build(PRODUCT, asked), strict=True):
    if built.error or built.spilled or not built.registers:
      wrong.append((one, built))
  assert not wrong


def test_int4_for_few_and_many_tokens():
  check(["int4"], (16, 64, 128), SHAPES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
  "format", ["int8", "int4", "int3", "ternary", "e2m1", "int8-a8", "int4-a8"]
)
def test_all_formats(format):
  check([format], TOKENS, (SHAPES[0], SHAPES[4]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_shapes(shape):
  check(["int4", "int8-a8"], (1, 64, 4096), [shape])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zero_points(format):
  check([format], TOKENS, (SHAPES[0], SHAPES[4]), symmetric=False)


@pytest.mark.slow
def test_many_experts():
  check(["int4"], (4, 128), SHAPES[:1], experts=3)
