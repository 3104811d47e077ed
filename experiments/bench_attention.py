# SPDX-License-Identifier: Apache-2.0
"""What decode attention over a quantized cache would cost on a TPU, by its compiler.

python -P -m treesurgeon.experiments.bench_attention --static --json=FILE
python -P -m treesurgeon.experiments.bench_attention --report=FILE

One token attends to all tokens of a cache, 4 heads of keys and values with 8 queries and 128
channels each. Beside it stands the cache in bfloat16: the bytes of its keys and values over the
bandwidth, which no kernel for it can beat. Nothing is measured; `kernels/static_cost.py` says what
static numbers leave out.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from importlib import metadata

import jax
from absl import app, flags
from rich import console, table

from treesurgeon.core import leaves
from treesurgeon.kernels import devices, static_cost
from treesurgeon.kernels.attention_lowbit import arg_specs, tpu

DECODE = "treesurgeon.kernels.attention_lowbit.arg_specs:decode"
CASES = tuple((bits, n, g) for n in (4096, 32768) for bits in (2, 4, 8) for g in (32, 128))
_HEADS = ("target", "bits", "tokens", "group", "compute us", "memory us", "predicted us",
          "bf16 us", "x bf16", "temp bytes", "source")  # fmt: skip


def measure(target: str, cases: Sequence[tuple[int, int, int]] = CASES) -> list[dict]:
  """Compile every case for a device.

  Args:
    target: name of the device.
    cases: (bits, tokens, group size).

  Returns:
    JSON rows.
  """
  requests = [request(target, *case) for case in cases]
  rows = []
  for (bits, n, g), cost in zip(cases, static_cost.measure(requests), strict=True):
    moved = sum(map(leaves.nbytes, jax.tree.leaves(arg_specs.decode(16, n)[1])))
    dense = moved / devices.find(target).bandwidth
    rows.append(
      {
        "target": target, "bits": bits, "tokens": n, "group_size": g, **dataclasses.asdict(cost),
        "libtpu": metadata.version("libtpu"), "bf16_us": dense,
        "speed": dense / cost.predicted_us,
      }
    )  # fmt: skip
  return rows


def request(target: str, bits: int, tokens: int, group_size: int) -> static_cost.Request:
  """Describe a case for `static_cost`.

  Args:
    target: name of the device.
    bits, tokens, group_size: of the cache.

  Returns:
    The request. Where the compiler cannot simulate the kernel's branches (tpu7x), the length of its
    schedule is taken, for each step of its grid.
  """
  kwargs = {"bits": bits, "length": tokens, "group_size": group_size, "traced": False}
  _, (_, _, _, cache) = arg_specs.decode(**kwargs)
  heads = cache.k_codes.shape[1]
  cores = 2 if target == "tpu-v5p" else 1  # which share the heads
  steps = -(-heads // cores) * (cache.capacity // tpu.block_tokens(cache))
  return static_cost.Request(DECODE, kwargs, target, steps)


def report(rows: Sequence[dict]) -> str:
  """Write rows as a Markdown table.

  Args:
    rows: what `measure` returned.

  Returns:
    The text.
  """
  lines = [list(_HEADS), ["---"] * len(_HEADS), *map(_cells, rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def remember(rows: Sequence[dict], file: pathlib.Path) -> None:
  """Enter cycles in a file that tests compare with, by libtpu's version.

  Args:
    rows: what `measure` returned.
    file: JSON, made if it is not there.
  """
  known = json.loads(file.read_text()) if file.is_file() else {}
  for row in rows:
    if row["cycles"] is not None:
      name = f"{row['target']} {row['bits']} {row['tokens']} {row['group_size']}"
      known.setdefault(row["libtpu"], {})[name] = row["cycles"]
  file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _cells(row: dict) -> list[str]:
  return [
    row["target"], str(row["bits"]), str(row["tokens"]), str(row["group_size"]),
    f"{row['compute_us']:.2f}", f"{row['memory_us']:.2f}", f"{row['predicted_us']:.2f}",
    f"{row['bf16_us']:.2f}", f"{row['speed']:.2f}", str(row["temp_bytes"]),
    row["error"] or row["source"].removeprefix("static: "),
  ]  # fmt: skip


def main(argv: list[str]) -> None:
  """Compile and show, or write the report of what was compiled before.

  Args:
    argv: no positional arguments.
  """
  del argv
  options = flags.FLAGS
  if options.report:
    print(report(json.loads(pathlib.Path(options.report).read_text())))
    return
  if not options.static:
    raise app.UsageError("--static is needed: there are no measurements on accelerators yet")
  cases = [c for c in CASES if not options.tokens or c[1] == options.tokens]
  rows = [row for target in options.target for row in measure(target, cases)]
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
  if options.cycles:
    remember(rows, pathlib.Path(options.cycles))
  shown = table.Table(title="Static: cycles by the TPU's compiler, bytes over the bandwidth")
  for head in _HEADS:
    shown.add_column(head, justify="left" if head in ("target", "source") else "right")
  for row in rows:
    shown.add_row(*_cells(row))
  console.Console(width=160).print(shown)


if __name__ == "__main__":
  flags.DEFINE_list("target", list(devices.DEVICES), "Devices to compile for.")
  flags.DEFINE_bool("static", False, "Ask the compiler; nothing runs on an accelerator.")
  flags.DEFINE_string("json", None, "Where to write the rows.")
  flags.DEFINE_integer("tokens", 0, "Only caches of so many tokens; 0 is all.")
  flags.DEFINE_string("cycles", None, "File of cycles to enter what was found in.")
  flags.DEFINE_string("report", None, "File of rows to print as Markdown, instead of compiling.")
  app.run(main)
