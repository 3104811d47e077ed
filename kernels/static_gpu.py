# SPDX-License-Identifier: Apache-2.0
"""Whether a program compiles for a GPU, and into how many registers: no GPU is needed.

With the plugin of jax for CUDA installed, but none of CUDA's libraries, XLA compiles for a GPU that
it knows by description, down to the machine code that `ptxas` makes of Mosaic's kernels. What
`ptxas` says of a kernel is printed by the process that compiles, so that is one of its own.

It says nothing of speed. It shows that the layouts of registers and shared memory fit together,
which the interpreter does not look at, and that nothing is spilled.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# An H200, by NVIDIA's data sheet and the limits that CUDA documents for compute capability 9.0.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.755
  device_memory_size: 150000000000
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
device_description_str: "H200"
"""
_MARK = "@@built "


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What `ptxas` says of the one kernel of a program.

  Attributes:
    registers: of a thread, when it starts.
    spilled: bytes stored outside registers for lack of them.
    temp_bytes: of the program's temporaries in the memory.
    error: why it did not compile, or "".
  """

  registers: int = 0
  spilled: int = 0
  temp_bytes: int = 0
  error: str = ""


def build(program: str, arguments: Sequence[dict[str, Any]]) -> list[Kernel]:
  """Compile programs for an H200.

  Args:
    program: "module:function"; called with one of `arguments` by name it returns (fn, args), the
      arguments arrays or shapes or trees of them.
    arguments: JSON, one a program.

  Returns:
    One kernel a program; what does not compile has an `error`.

  Example:
    >>> build("treesurgeon.kernels.matmul.arg_specs:product", [])
    []
  """
  if not arguments:
    return []
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": "",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # it would run the candidates
    "MOSAIC_GPU_DUMP_PTXAS": "1",
  }
  command = [sys.executable, "-P", "-m", "treesurgeon.kernels.static_gpu", program]
  ran = subprocess.run(
    [*command, json.dumps(list(arguments))],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  built = read(ran.stdout)
  lacking = len(arguments) - len(built)
  return built + [Kernel(error=ran.stdout[-500:] or "the compiler died")] * lacking


def read(text: str) -> list[Kernel]:
  """Read what a process that compiles has printed.

  Args:
    text: `ptxas`'s lines and ours.

  Returns:
    The kernels.

  Example:
    >>> read("")
    []
  """
  kernels = []
  said = ""
  for line in text.splitlines():
    if not line.startswith(_MARK):
      said += line + "\n"
      continue
    known = json.loads(line.removeprefix(_MARK))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    kernels.append(Kernel(max(registers, default=0), max(spilled, default=0), **known))
    said = ""
  return kernels


def compile_for(fn: Callable[..., Any], args: Sequence[Any]) -> Any:
  """Compile a function for an H200, in this process.

  Args:
    fn: function to jit.
    args: arrays or shapes, or trees of them.

  Returns:
    The compiled program, which only a Hopper GPU can run.
  """
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="cuda", topology_name="h200", target_config=_H200, topology="1x1x1"
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  return jax.jit(fn).lower(*shapes).compile()


def main(program: str, job: str) -> None:
  """Compile what `build` asks of this process, and print as soon as something is known.

  Args:
    program: "module:function".
    job: arguments as JSON.
  """
  module, name = program.split(":")
  make = getattr(importlib.import_module(module), name)
  for arguments in json.loads(job):
    try:
      compiled = compile_for(*make(**arguments))
      known = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
    except Exception as error:  # whatever the compiler says is the result
      known = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    print(f"\n{_MARK}{json.dumps(known)}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2])
