# SPDX-License-Identifier: Apache-2.0
"""The TPU's own compiler takes every kernel, leaves nothing in memory, and counts no more cycles.

`cycles.json` holds counts by version of libtpu. To renew it after a gain or for another libtpu:

  python -P -m treesurgeon.experiments.bench_kernels --static --tokens=16 \
    --cycles=tests/kernels/matmul/cycles.json
"""

import json
import pathlib
from importlib import metadata

import pytest

from treesurgeon.kernels import devices, static_cost
from treesurgeon.kernels.matmul import arg_specs

PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
INTEGERS = ("int8", "int5", "int4", "int3", "int2", "int1")
OTHERS = ("ternary", "sign", "nf4", "nf3", "e2m1", "e4m3fn", "e5m2")
OTHER_GROUPS = ("mxfp4", "nvfp4", "e4m3fn-a8", "nf4-a8", "nf4-dx", "e4m3fn-dx")
NAMED = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096), (16, 4096, 14336))
AWKWARD = (  # tokens, rows, cols, group size, symmetric
  (1, 512, 256, 16, False),
  (3, 600, 100, 32, True),
  (16, 2048, 1000, 64, False),
  (100, 1024, 256, 32, False),
  (300, 1024, 512, 256, False),
  (16, 4096, 512, 4096, True),
)
CYCLES = json.loads((pathlib.Path(__file__).parent / "cycles.json").read_text())
KNOWN = CYCLES.get(metadata.version("libtpu"), {})
QUICK = ("tpu-v5e int4 16 4096 4096", "tpu-v6e int2 16 4096 4096", "tpu-v5e nf4 16 4096 4096")


def request(target, format, tokens, rows, cols, group_size=128, **more):
  shape = {"tokens": tokens, "rows": rows, "cols": cols, "group_size": group_size}
  kwargs = {"format": format, **shape, "target": target, **more}
  return static_cost.Request(PRODUCT, kwargs, target)


def compiles(requests):
  for one, cost in zip(requests, static_cost.measure(requests, profile=False), strict=True):
    assert not cost.error, (one, cost.error)
    if one.kwargs["rows"] % 128 == 0 and one.kwargs["cols"] % 128 == 0:
      assert cost.temp_bytes == 0, one
    packed = weights(one.kwargs)
    # What is not a multiple of the tiles is filled up, at worst one unit of 16, and padded.
    as_wide = one.kwargs["format"] not in ("int3", "int5", "nf3") and fits(one)
    if one.kwargs["rows"] % 2048 == 0 and as_wide:
      assert cost.bytes <= 1.05 * packed


def fits(one):
  """Tell whether a device has codes as wide as a format's."""
  wider = {"tpu-v5e": ("e2m1",), "tpu-v5p": ("e2m1", "nf4")}
  return one.kwargs["format"] not in wider.get(one.target, ())


def weights(kwargs):
  """Count what a product must at least move: codes, scales, zeros, activations, output."""
  bits = {"ternary": 2, "sign": 1, "e2m1": 4, "e4m3fn": 8, "e5m2": 8}.get(kwargs["format"])
  bits = bits or int(kwargs["format"][-1])
  tokens, rows, cols = (kwargs[k] for k in ("tokens", "rows", "cols"))
  groups = -(-rows // kwargs["group_size"])
  per_scale = 4 if kwargs.get("symmetric", True) else 6
  return rows * cols * bits / 8 + groups * cols * per_scale + 2 * tokens * (rows + cols)


@pytest.mark.parametrize("target", devices.DEVICES)
def test_named_shapes_compile(target):
  requests = [request(target, "int4", *shape) for shape in NAMED]
  compiles(requests + [request(target, f, 16, 4096, 4096) for f in ("int8", "int3", "int2", "nf4")])


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
def test_all_formats_and_awkward_shapes_compile(target):
  requests = [request(target, f, *shape) for f in (*INTEGERS, *OTHERS) for shape in NAMED]
  for *shape, symmetric in AWKWARD:
    requests += [request(target, f, *shape, symmetric=symmetric) for f in INTEGERS]
    requests += [request(target, f, *shape) for f in OTHERS]
  compiles(requests)


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
def test_what_is_more_than_a_kernel_compiles(target):
  requests = [request(target, f, 16, 4096, 4096) for f in OTHER_GROUPS]
  # Rows in the order of activations, groups that are filled up, scales of inputs.
  requests += [request(target, f, 16, 4096, 1024, 128) for f in ("int4-order", "int4-inputs")]
  requests += [request(target, "int4", 16, 4096, 1024, 100)]
  for one, cost in zip(requests, static_cost.measure(requests, profile=False), strict=True):
    assert not cost.error, (one, cost.error)
    assert cost.temp_bytes < 4 << 20, one  # no more than inputs and outputs


def test_many_experts_are_one_program():
  compiles([request("tpu-v6e", "int2", 4, 1024, 1024, experts=3)])
  fn, args = arg_specs.product("int2", 4, 1024, 1024, 128, "tpu-v6e", experts=3)
  assert args[1].batch == (3,) and callable(fn)


def regressions(names):
  """Compile and list what takes over 5 % more cycles than it did."""
  requests = []
  for name in names:
    target, format, *shape = name.split()
    requests.append(request(target, format, *map(int, shape)))
  costs = static_cost.measure(requests)
  found = {n: c.cycles for n, c in zip(names, costs, strict=True)}
  return {n: (KNOWN[n], c) for n, c in found.items() if c is None or c > 1.05 * KNOWN[n]}


def test_cycles_are_known_for_the_pinned_compiler():
  assert set(QUICK) <= set(KNOWN), f"no cycles for libtpu {metadata.version('libtpu')}; see above"


def test_cycles_have_not_risen():
  assert not regressions(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
def test_no_cycles_have_risen(target):
  assert not regressions([n for n in KNOWN if n.startswith(target + " ")])
