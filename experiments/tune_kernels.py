# SPDX-License-Identifier: Apache-2.0
"""Search for the blocks of the TPU kernels, and write them to `kernels/tuned/<device>.json`.

python -P -m treesurgeon.experiments.tune_kernels --target=tpu-v5e,tpu-v6e --out=DIR

On the device itself every candidate is timed. Elsewhere its cost is the TPU compiler's
(`kernels/static_cost.py`): the longer of computation and transfers, and the transfer of the first
block, which nothing hides. A case is recorded where a candidate beats the rule of
`kernels/matmul/tpu.py` by 2 %. TREESURGEON_TUNED=DIR makes programs read DIR before what is
shipped.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import rich.progress
from absl import app, flags

from treesurgeon.core import leaves
from treesurgeon.kernels import devices, static_cost, tuning
from treesurgeon.kernels.matmul import arg_specs, tpu

PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
GROUP = 128
FORMATS = ("int8", "int4", "int2")
TOKENS = (1, 16)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # rows and columns
WIDTHS = (256, 512, 1024, 2048, 4096)
GAIN = 0.98


@dataclasses.dataclass(frozen=True)
class Case:
  """A product to tune.

  Attributes:
    format, tokens, rows, cols: as of `arg_specs.product`.
    target: name of the device.
  """

  format: str
  tokens: int
  rows: int
  cols: int
  target: str

  @property
  def kwargs(self) -> dict[str, Any]:
    """Arguments of `arg_specs.product`."""
    return {**dataclasses.asdict(self), "group_size": GROUP}

  def leaf(self) -> Any:
    """Return the prepared matrix, as shapes."""
    return arg_specs.product(**self.kwargs)[1][1]


def candidates(case: Case) -> Iterator[tuple[int, int]]:
  """List blocks, the rule's first.

  Args:
    case: the product.

  Yields:
    (tokens, columns).

  Example:
    >>> list(candidates(Case("int4", 1, 4096, 512, "tpu-v5e")))
    [(1, 128), (1, 256), (1, 512)]
  """
  leaf = case.leaf()
  rule = tpu.rule(case.tokens, leaf)
  yield rule
  for width in WIDTHS:
    if width <= leaf.codes.shape[-1] and width <= tpu.widest(leaf) and width != rule[1]:
      yield rule[0], width


def static_costs(case: Case, blocks: list[tuple[int, int]]) -> list[float]:
  """Ask the compiler for the microseconds of each candidate; infinity where it cannot say."""
  requests = [
    static_cost.Request(PRODUCT, {**case.kwargs, "block": block}, case.target) for block in blocks
  ]
  device, leaf = devices.find(case.target), case.leaf()
  column = sum(leaves.nbytes(a) for a in jax.tree.leaves(leaf)) / leaf.codes.shape[-1] / leaf.steps
  return [
    math.inf
    if cost.error or cost.cycles is None
    else cost.predicted_us + column * block[1] / device.bandwidth
    for cost, block in zip(static_cost.measure(requests), blocks, strict=True)
  ]


def measured_costs(case: Case, blocks: list[tuple[int, int]]) -> list[float]:
  """Time each candidate on the device, in microseconds: the least of twenty calls."""
  costs = []
  for block in blocks:
    fn, shapes = arg_specs.product(**case.kwargs, block=block)
    args = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
    try:
      run = jax.jit(fn).lower(*args).compile()
    except Exception:  # whatever the compiler refuses is no candidate
      costs.append(math.inf)
      continue
    run(*args).block_until_ready()
    took = []
    for _ in range(20):
      start = time.perf_counter()
      run(*args).block_until_ready()
      took.append(time.perf_counter() - start)
    costs.append(min(took) * 1e6)
  return costs


def tune(cases: list[Case], target: str) -> dict[str, Any]:
  """Search for the blocks of some products on one device.

  Args:
    cases: products.
    target: name of the device.

  Returns:
    What `tuning.load` reads.
  """
  here = devices.here() == target
  source = f"measured, jax {jax.__version__}" if here else f"static, {metadata.version('libtpu')}"
  found: dict[str, Any] = {}
  for case in rich.progress.track(cases, description=target):
    blocks = list(candidates(case))
    costs = (measured_costs if here else static_costs)(case, blocks)
    best = min(costs)
    if best < GAIN * costs[0]:
      leaf = case.leaf()
      name = tuning.case_of(leaf.layout, leaf.width, GROUP, case.tokens, case.rows, case.cols)
      block = blocks[costs.index(best)]
      found[name] = {"block": list(block), "us": round(best, 3), "rule_us": round(costs[0], 3)}
  return {"source": source, "matmul": dict(sorted(found.items()))}


def main(argv: list[str]) -> None:
  """Tune and write one file a device.

  Args:
    argv: no positional arguments.
  """
  if len(argv) > 1:
    raise app.UsageError(f"no positional argument is taken, not {argv[1]!r}")
  values = flags.FLAGS
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  for target in values.target:
    devices.find(target)
    cases = [Case(f, m, *s, target) for s in SHAPES for f in values.format for m in TOKENS]
    text = json.dumps(tune(cases, target), indent=1)
    (out / f"{target}.json").write_text(text + "\n")


if __name__ == "__main__":
  flags.DEFINE_list("target", list(devices.DEVICES), "Devices to tune for.")
  flags.DEFINE_multi_enum("format", FORMATS, FORMATS, "Weights to tune for.")
  flags.DEFINE_string("out", str(tuning.FOLDER), "Folder to write to.")
  app.run(main)
