# SPDX-License-Identifier: Apache-2.0
"""The TPU's own compiler takes decode attention, and counts no more cycles than before.

`cycles.json` holds counts by version of libtpu. To renew it after a gain or for another libtpu:

  python -P -m treesurgeon.experiments.bench_attention --static \
    --cycles=tests/kernels/attention_lowbit/cycles.json
"""

import json
import pathlib
from importlib import metadata

import pytest

from treesurgeon.experiments import bench_attention
from treesurgeon.kernels import devices, static_cost

DECODE = "treesurgeon.kernels.attention_lowbit.arg_specs:decode"
CYCLES = json.loads((pathlib.Path(__file__).parent / "cycles.json").read_text())
KNOWN = CYCLES.get(metadata.version("libtpu"), {})
QUICK = ("tpu-v5e 2 4096 128",)


def compiles(target, *cases):
  """Compile programs for (bits, tokens, group size, other sizes)."""
  requests = []
  for bits, length, group_size, more in cases:
    kwargs = {"bits": bits, "length": length, "group_size": group_size, **more}
    requests.append(static_cost.Request(DECODE, kwargs, target))
  for one, cost in zip(requests, static_cost.measure(requests, profile=False), strict=True):
    assert not cost.error, (one, cost.error)
    if one.kwargs["length"] >= 4096:  # v5p copies what is smaller to fast memory
      assert cost.temp_bytes < 2**18, one


@pytest.mark.parametrize("target", devices.DEVICES)
def test_named_shapes_compile(target):
  compiles(target, (2, 1024, 32, {}))


@pytest.mark.slow
@pytest.mark.parametrize("target", devices.DEVICES)
def test_all_widths_and_awkward_shapes_compile(target):
  cases = [(bits, 32768, group, {}) for bits in (2, 4, 8) for group in (16, 32, 64, 128)]
  cases.append((8, 200, 128, {"rows": 1}))
  for bits in (2, 4, 8):
    cases.append((bits, 5000, 32, {"rows": 1, "channels": 256, "residual": 96}))
    cases.append((bits, 100, 16, {"rows": 9, "many": 3, "residual": 16}))
  compiles(target, *cases)


def regressions(names):
  """Compile and list what takes over 5 % more cycles than it did."""
  requests = []
  for name in names:
    target, *sizes = name.split()
    requests.append(bench_attention.request(target, *map(int, sizes)))
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
