# SPDX-License-Identifier: Apache-2.0
"""The TPU's own compiler takes N:M kernels, and counts no more cycles than it did.

Counts are with those of the other kernels, in `tests/kernels/matmul/cycles.json`.
"""

import json
import pathlib
from importlib import metadata

import pytest

from treesurgeon.kernels import devices, static_cost

PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
CYCLES = pathlib.Path(__file__).parents[1] / "matmul" / "cycles.json"
KNOWN = json.loads(CYCLES.read_text()).get(metadata.version("libtpu"), {})
QUICK = ("tpu-v5e 2:4-int8 16 4096 4096",)
QUICK_CHIPS = ("tpu-v5p", "tpu7x")
PATTERNS = ("1:2", "2:4", "2:4-int8", "2:4-int4", "2:4-int8-g512", "1:4", "3:4", "2:8", "4:8")
SHAPES = (  # tokens, rows, columns
  (1, 4096, 4096),
  (256, 4096, 4096),
  (3, 600, 100),
  (16, 8192, 1000),
  (300, 1024, 512),
)


def request(target, format, tokens, rows, cols):
  shape = {"tokens": tokens, "rows": rows, "cols": cols, "group_size": 128}
  return static_cost.Request(PRODUCT, {"format": format, **shape, "target": target}, target)


def compiles(requests):
  for one, cost in zip(requests, static_cost.measure(requests, profile=False), strict=True):
    assert not cost.error, (one, cost.error)
    tokens, rows, cols = (one.kwargs[k] for k in ("tokens", "rows", "cols"))
    # On v5p activations are arranged lane by lane in memory, through a copy with lanes filled up.
    assert cost.temp_bytes <= 32 * tokens * rows + 16 * tokens * cols + 2**21, one
    if rows % 4096 == 0 and cols % 128 == 0 and one.kwargs["format"] in ("2:4", "2:4-int8"):
      per_value = 2 if one.kwargs["format"] == "2:4" else 1
      least = rows * cols * (per_value / 2 + 1 / 8) + 2 * tokens * (rows + cols)
      held = 4 * cols if per_value == 1 else 0
      assert cost.bytes - 2 * cost.temp_bytes <= 1.13 * least + held, one


@pytest.mark.parametrize(
  "target",
  [t if t in QUICK_CHIPS else pytest.param(t, marks=pytest.mark.slow) for t in devices.DEVICES],
)
def test_named_shapes_compile(target):
  compiles([request(target, f, 16, 4096, 14336) for f in ("2:4", "2:4-int8")])


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
def test_all_patterns_and_awkward_shapes_compile(target):
  compiles([request(target, f, *shape) for f in PATTERNS for shape in SHAPES])


def test_cycles_have_not_risen():
  requests = []
  for name in QUICK:
    target, format, *shape = name.split()
    requests.append(request(target, format, *map(int, shape)))
  for name, cost in zip(QUICK, static_cost.measure(requests), strict=True):
    assert cost.cycles is not None and cost.cycles <= 1.05 * KNOWN[name], (name, cost)
