# SPDX-License-Identifier: Apache-2.0
"""Measure low-bit matrix products on a CPU beside dense float32 and bfloat16 ones, in one run.

python -P -m treesurgeon.experiments.bench_cpu_matmul --json=FILE [--cores]

By default one pinned core and the least processor time of a call, which other programs on the
machine disturb least; with `--cores` all cores and the least wall time. Calls of all kinds take
turns, so that a slow minute slows all. Activations are float32, bfloat16 where it says so. Targets
for int4 and int8 with groups of 128, as times the speed of the dense float32 product: 1.3 at 1
token and 1.9 at 8.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich import console, table

from treesurgeon import kernels
from treesurgeon.core import allocator, leaves
from treesurgeon.kernels.matmul import arg_specs
from treesurgeon.kernels.sparse_matmul import arg_specs as sparse_specs

SHAPES = ((4096, 4096), (4096, 14336))
TOKENS = (1, 4, 8, 64)
FORMATS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "nf": 4}
LOOKED_UP = ("int4", "int2")  # by T-MAC's tables, too
VECTORS = {"vectors of 4": 4, "vectors of 8": 8}  # of 256
TARGETS = {1: 1.3, 8: 1.9}  # tokens to times the speed of dense float32
JUDGED = ("int8", "int4")


def least(
  calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
  """Time calls in turns until each had its time, at least three times each.

  Args:
    calls: functions to time, by name.
    seconds: time for each.
    clock: returns seconds.

  Returns:
    The least time of a call of each, in milliseconds.

  Example:
    >>> sorted(least({"a": lambda: 1, "b": lambda: 2}, 0.0, time.perf_counter))
    ['a', 'b']
  """
  best, spent = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, 0.0)
  rounds = 0
  while rounds < 3 or any(s < seconds for s in spent.values()):
    for name, call in calls.items():
      if rounds >= 3 and spent[name] >= seconds:
        continue
      for turn in range(3):  # the first finds another call's matrix in the cache
        start = clock()
        jax.block_until_ready(call())
        took = clock() - start
        spent[name] += took
        if turn:
          best[name] = min(best[name], took)
    rounds += 1
  return {name: 1e3 * t for name, t in best.items()}


def measure(
  rows: int, cols: int, seconds: float, wall: bool, counts: Sequence[int] = TOKENS
) -> list[dict[str, Any]]:
  """Time every format at every number of tokens on one shape.

  Args:
    rows, cols: of the matrix.
    seconds: for each product.
    wall: wall time instead of processor time.
    counts: of tokens.

  Returns:
    One row a product: format (with " bf16" behind it the activations are that, with " lut" sums of
    activations are looked up bit plane by bit plane), m, k, n, group_size, ms, source.
  """
  clock = time.perf_counter if wall else time.process_time
  key = jax.random.key(0)
  weights: dict[str, Any] = {}
  for name, bits in FORMATS.items():
    leaf = arg_specs.operands(arg_specs.ArgSpec(1, rows, cols, bits=bits), key)[1]
    weights[name] = leaf if name.startswith("int") else dataclasses.replace(leaf, format=name)
  weights |= {f"{name} bf16": weights[name] for name in JUDGED}
  weights |= {f"{name} lut": weights[name] for name in LOOKED_UP}
  for name, length in VECTORS.items():
    codes = jax.random.randint(key, (rows // length, cols), 0, 256).astype(jnp.uint8)
    book = jax.random.normal(key, (256, length))
    weights[name] = leaves.Codebook(codes, book, rows, cols, 8, length)
  weights["2:4"] = sparse_specs.sparse(rows, cols, 2, 4, key=key)
  weights["2:4 int8"] = sparse_specs.sparse(rows, cols, 2, 4, key=key, bits=8)
  weights["gqsa"] = sparse_specs.group_sparse(rows, cols, key=key)
  weights["f32"] = jax.random.normal(key, (rows, cols)) / rows**0.5
  weights["bf16"] = weights["f32"].astype(jnp.bfloat16)
  product = jax.jit(kernels.matmul)
  by_tables = jax.jit(functools.partial(kernels.matmul, implementation="lut"))
  out = []
  for tokens in counts:
    calls = {}
    for name, weight in weights.items():
      x = jax.random.normal(key, (tokens, rows))
      x = x.astype(jnp.bfloat16) if name.endswith("bf16") else x
      multiply = by_tables if name.endswith("lut") else product
      calls[name] = functools.partial(multiply, x, weight)
      jax.block_until_ready(calls[name]())
    for name, took in least(calls, seconds, clock).items():
      size = 128 if name.startswith(tuple(FORMATS)) else None
      out.append(
        {"target": "cpu", "format": name, "m": tokens, "k": rows, "n": cols, "group_size": size,
         "ms": took, "source": "measured, " + ("wall" if wall else "one core")}
      )  # fmt: skip
  return out


def show(rows: list[dict[str, Any]]) -> table.Table:
  """Lay the results out, the targets judged.

  Args:
    rows: what `measure` returned.

  Returns:
    The table.

  Example:
    >>> row = {"format": "f32", "m": 1, "k": 2, "n": 2, "ms": 1.0}
    >>> show([row, {**row, "format": "bf16"}]).row_count
    2
  """
  out = table.Table("shape", "tokens", "format", "ms", "x f32", "x bf16", "aim")
  took = {(r["k"], r["n"], r["m"], r["format"]): r["ms"] for r in rows}
  for (k, n, m, name), ms in took.items():
    ratios = [took[k, n, m, dense] / ms for dense in ("f32", "bf16")]
    aim = TARGETS.get(m) if name in JUDGED else None
    said = "" if aim is None else f"{aim} {'met' if ratios[0] >= aim else 'MISSED'}"
    out.add_row(f"{k} x {n}", str(m), name, f"{ms:.2f}", *(f"{r:.2f}" for r in ratios), said)
  return out


def main(argv: list[str]) -> None:
  """Measure, print the table, write the rows.

  Args:
    argv: no positional arguments.
  """
  del argv
  args = flags.FLAGS
  if not args.cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before jax starts its threads
  allocator.keep_pages()
  counts = [int(m) for m in args.tokens]
  rows = [r for k, n in SHAPES for r in measure(k, n, args.seconds, args.cores, counts)]
  console.Console(width=100).print(show(rows))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("json", None, "Where to write the rows.")
  flags.DEFINE_list("tokens", [str(m) for m in TOKENS], "Numbers of tokens to measure.")
  flags.DEFINE_bool("cores", False, "All cores and wall time instead of one and processor time.")
  flags.DEFINE_float("seconds", 0.5, "Time for each product.", 0.0)
  app.run(main)
