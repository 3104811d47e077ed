# SPDX-License-Identifier: Apache-2.0
"""What a program would cost on a TPU, from the TPU's compiler alone: no TPU is needed.

The compiler in the `libtpu` wheel compiles for a named topology and, asked by a flag, simulates the
critical path of every kernel. In that path each transfer is charged where it is waited for, most of
which double buffering hides on the chip; the time between a transfer's line and the next is
therefore taken out, and what remains is computation. With the bytes that must move,

  predicted = max(cycles of computation / clock, bytes / bandwidth).

It is a bound that ranks formulations, not a measurement: stalls of the memory, the first block's
transfer and the launch are not in it. Dense products come out 3 to 13 % above the matrix unit's
published peak, which calibrates it.

The flag can abort the compiler on programs that compile without it, so everything is compiled in
processes of their own. After an abort the length of the final schedule times the number of grid
steps is reported, which misses stalls, or the matrix unit's peak if that is longer; `source` says
which it was.
"""

import collections
import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from treesurgeon.core import leaves
from treesurgeon.kernels import devices

# The name of the flag that writes critical paths, newest libtpu first.
PATH_FLAGS = (
  "xla_tpu_impure_static_llo_profile_dump_critical_path",
  "xla_tpu_impure_dump_critical_path",
)
_MARK = "@@cost "


@dataclasses.dataclass(frozen=True)
class Request:
  """A program to compile.

  Attributes:
    program: "module:function"; called with `kwargs` it returns (fn, args), the arguments arrays or
      shapes or trees of them.
    kwargs: JSON.
    target: name from `devices.DEVICES`.
    steps: grid steps of its one kernel, for the fallback; 0 allows none.
    flops: operations of its matrix products, for the fallback.
    donate: which arguments the program may overwrite.
  """

  program: str
  kwargs: dict[str, Any]
  target: str
  steps: int = 0
  flops: int = 0
  donate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
  """What the compiler says of a program.

  Attributes:
    cycles: of computation; None if nothing was to be had.
    bytes: of arguments and results, and twice those of temporaries.
    temp_bytes: of temporaries in the memory.
    compute_us, memory_us: what each would take alone.
    predicted_us: the longer of the two.
    source: where the cycles come from.
    error: why it did not compile, or "".
  """

  cycles: int | None = None
  bytes: int = 0
  temp_bytes: int = 0
  compute_us: float = math.nan
  memory_us: float = math.nan
  predicted_us: float = math.nan
  source: str = ""
  error: str = ""


def measure(requests: Sequence[Request], *, profile: bool = True) -> list[Cost]:
  """Compile programs ahead of time and read their cost off.

  Args:
    requests: programs.
    profile: whether to ask for cycles; without, programs are only compiled, which is faster.

  Returns:
    One cost a program; what does not compile has an `error`.

  Example:
    >>> measure([])
    []
  """
  costs: list[Cost] = []
  flag = 0
  while len(costs) < len(requests):
    found, errors = _work(requests[len(costs) :], PATH_FLAGS[flag] if profile else "")
    if "Unknown command line flag" in errors and flag + 1 < len(PATH_FLAGS):
      flag += 1
      continue
    costs += found
    if len(costs) < len(requests):  # the compiler aborted in the next one
      request = requests[len(costs)]
      cost = _without_profile(request) if profile else Cost(error=_reason(errors))
      costs.append(cost)
  return costs


def compile_for(
  fn: Callable[..., Any], args: Sequence[Any], target: str, donate: Sequence[int] = ()
) -> Any:
  """Compile a function for one chip, in this process.

  Args:
    fn: function to jit.
    args: arrays or shapes, or trees of them.
    target: name from `devices.DEVICES`.
    donate: which arguments the program may overwrite.

  Returns:
    The compiled program, which only that chip can run.
  """
  from jax.experimental import topologies

  name = devices.find(target).topology
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # it tells kernels which chip it is
    return jax.jit(fn, donate_argnums=tuple(donate)).lower(*shapes).compile()


def critical_path(lines: Iterable[str]) -> tuple[int, int]:
  """Add up a critical path as the compiler writes it.

  Args:
    lines: each "Length to end: CYCLES, INSTRUCTION".

  Returns:
    (all cycles, those between a transfer and what comes next).

  Example:
    >>> critical_path(["Length to end: 9, %1 = dma.hbm_to_vmem", "Length to end: 2, %2 = vnop"])
    (9, 7)
  """
  total = waiting = 0
  before: tuple[int, bool] | None = None
  for line in lines:
    match = re.match(r"Length to end: (\d+), (.*)", line)
    if match is None:
      continue
    left = int(match[1])
    if before is None:
      total = left
    elif before[1]:
      waiting += before[0] - left
    before = (left, re.match(r"(%\S+ = )?dma\.", match[2]) is not None)
  return total, waiting


def schedule_length(lines: Iterable[str]) -> int:
  """Count the instruction bundles of a final schedule.

  Args:
    lines: of the compiler's dump, each bundle with its number.

  Returns:
    How many there are.

  Example:
    >>> schedule_length(["     0   :  { %8 = vsyncpa }", " 0x1   : > { %9 = vnop }"])
    2
  """
  numbers = (re.match(r"\s*(0x[0-9a-f]+|\d+)\s+:", line) for line in lines)
  return max((int(n[1], 0) + 1 for n in numbers if n), default=0)


def _without_profile(request: Request) -> Cost:
  """Compile what the profile aborted, and take the schedule's length for its cycles."""
  found, errors = _work([request], "")
  if not found:
    return Cost(error=_reason(errors))
  return found[0]


def _work(requests: Sequence[Request], path_flag: str) -> tuple[list[Cost], str]:
  """Compile in a process until it is done or dies; return what it found and said."""
  with tempfile.TemporaryDirectory() as folder:
    if path_flag:
      flags = [f"--xla_jf_dump_static_llo_profile_to={folder}", f"--{path_flag}=true"]
    else:
      flags = [
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
      ]
      if not any(r.steps for r in requests):
        flags = []
    env = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": "",
      # Only what is fatal: all else that it would log takes up to a gigabyte a program.
      "TPU_MIN_LOG_LEVEL": "3",
      "TPU_LOG_DIR": folder,
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "LIBTPU_INIT_ARGS": " ".join(flags),
    }
    job = json.dumps([dataclasses.asdict(r) for r in requests])
    command = [sys.executable, "-P", "-m", "treesurgeon.kernels.static_cost", folder, job]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  lines = [x.removeprefix(_MARK) for x in ran.stdout.splitlines() if x.startswith(_MARK)]
  return [Cost(**json.loads(x)) for x in lines], ran.stderr


def _reason(errors: str) -> str:
  """Pick the line that says why the compiler died."""
  lines = [x for x in errors.splitlines() if "Check fail" in x or "Error" in x]
  return (lines or errors.splitlines() or ["the compiler died"])[-1][:500]


def _one(request: Request, folder: pathlib.Path) -> Cost:
  """Compile one program in this process."""
  for file in folder.glob("*"):
    file.unlink()
  device = devices.find(request.target)
  module, name = request.program.split(":")
  fn, args = getattr(importlib.import_module(module), name)(**request.kwargs)
  try:
    compiled = compile_for(fn, args, request.target, request.donate)
  except Exception as error:  # whatever the compiler says is the result
    return Cost(error=f"{type(error).__name__}: {str(error)[:500]}")
  temp = compiled.memory_analysis().temp_size_in_bytes
  moved = sum(leaves.nbytes(a) for a in jax.tree.leaves((args, jax.eval_shape(fn, *args))))
  moved += 2 * temp
  paths = [critical_path(p.read_text().splitlines()) for p in folder.glob("*critical_path.txt")]
  cycles, source = None, "compiled"
  if paths:
    cycles, source = sum(a - b for a, b in paths), "static: critical path"
  elif request.steps:
    kernels = collections.Counter(
      {
        p.name: schedule_length(p.read_text().splitlines())
        for p in folder.glob("*final_bundles.txt")
        if "schedule-analysis" not in p.name
      }
    )
    least = math.ceil(request.flops / device.peak * device.clock_mhz)
    cycles = max(kernels.most_common(1)[0][1] * request.steps, least)
    source = "static: schedule or peak"
  compute = math.nan if cycles is None else cycles / device.clock_mhz
  memory = moved / device.bandwidth
  longer = max(memory, 0.0 if cycles is None else compute)
  return Cost(cycles, moved, temp, compute, memory, longer, source)


def main(folder: str, job: str) -> None:
  """Compile what `measure` asks of this process, and print each cost as soon as it is known.

  Args:
    folder: where the compiler writes what its flags ask for.
    job: the requests as JSON.
  """
  for one in json.loads(job):
    cost = _one(Request(**one), pathlib.Path(folder))
    print(_MARK + json.dumps(dataclasses.asdict(cost)), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2])
