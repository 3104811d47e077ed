# SPDX-License-Identifier: Apache-2.0
"""Measure low-bit matrix products on a Hopper GPU beside dense bfloat16 ones, in one run.

python -P -m treesurgeon.experiments.bench_gpu_matmul --json=FILE
python -P -m treesurgeon.experiments.bench_gpu_matmul --static --json=FILE

With `--static` nothing runs: every kernel is compiled for an H200, which needs the CUDA plugin and
no GPU, and what its assembler says stands beside the times that its bytes and operations take at
the published rates, the bounds of any kernel.

It measures on a GPU of compute capability 9 and nowhere else. The dense product is `jnp.dot`, for
which XLA calls cuBLAS. Every product is one of a series in one program, each by a matrix of its own
and as many as the second-level cache cannot hold; its time is that of its kernels by CUPTI, without
the gaps between them, the median over repetitions. Weights are in groups of 128, and each product
is compared with float64. Targets:

* up to 16 tokens: int4 3.2 times the speed of dense, at 80 % of the memory's bandwidth;
* 4,096 tokens: int8 and int4 0.8 times dense, int8 by 8-bit inputs 1.5 times.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich import console, table

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels import devices, static_gpu
from treesurgeon.kernels.matmul import arg_specs, gpu

SHAPES = ((4096, 4096), (8192, 28672))
TOKENS = (1, 2, 4, 8, 16, 64, 256, 4096)
FORMATS = ("bf16", "int8", "int4", "int8-a8", "int4-a8")
GROUP = 128
PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
CACHE = 256 << 20  # bytes that no second-level cache holds
CHECKED = 64  # columns compared with float64


def target_of(format: str, tokens: int) -> float | None:
  """Say how many times as fast as dense a product shall be.

  Args:
    format: of the weights, "-a8" behind it for inputs quantized to 8 bits.
    tokens: of the product.

  Returns:
    The factor, or None where none was set.

  Example:
    >>> target_of("int4", 8), target_of("int8-a8", 8)
    (3.2, None)
  """
  if tokens <= 16:
    return 3.2 if format == "int4" else None
  if tokens < 4096:
    return None
  return {"int4": 0.8, "int8": 0.8, "int8-a8": 1.5}.get(format)


def here() -> str:
  """Name the GPU that this process computes on.

  Returns:
    A name from `devices.GPUS`.

  Raises:
    ValueError: if it computes on anything else.
  """
  name = devices.here()
  if name not in devices.GPUS:
    kind = jax.devices()[0].device_kind
    raise ValueError(f"it measures on {', '.join(devices.GPUS)}; this process computes on {kind}")
  return name


def measure(rows: int, cols: int, tokens: int, target: str, repeats: int) -> list[dict[str, Any]]:
  """Time every format on one shape.

  Args:
    rows, cols: of the matrix.
    tokens: of the activations.
    target: name from `devices.GPUS`.
    repeats: how often each series is timed.

  Returns:
    JSON rows, the dense one first.
  """
  key = jax.random.key(0)
  x = jax.random.normal(key, (tokens, rows), jnp.bfloat16)
  out: list[dict[str, Any]] = []
  for format in FORMATS:
    weights = _weights(format, rows, cols, tokens, target)
    product = jax.jit(lambda x, ws: [kernels.matmul(x, w) for w in ws])
    kernel_us, wall_us = _time(product, (x, weights), len(weights), repeats)
    moved = leaves.nbytes(_stored(weights[0])) + 2 * tokens * (rows + cols)
    dense_us = out[0]["us"] if out else kernel_us
    share = moved / kernel_us / devices.GPUS[target].bandwidth
    aim = None if format == "bf16" else target_of(format, tokens)
    met = None if aim is None else dense_us / kernel_us >= aim
    if met and format == "int4" and tokens <= 16:
      met = share >= 0.8
    out.append(
      {
        "target": target, "device": jax.devices()[0].device_kind, "format": format, "m": tokens,
        "k": rows, "n": cols, "group_size": None if format == "bf16" else GROUP, "us": kernel_us,
        "wall_us": wall_us, "bytes": moved, "bandwidth_share": share, "dense_us": dense_us,
        "speed": dense_us / kernel_us, "error": _error(x, weights[0]), "aim": aim, "met": met,
        "jax": jax.__version__, "source": "measured",
      }
    )  # fmt: skip
  return out


def compile_all(target: str) -> list[dict[str, Any]]:
  """Compile every product that is not dense, and say what bounds it.

  Args:
    target: name from `devices.GPUS`.

  Returns:
    JSON rows.
  """
  cases = [
    {"format": f, "tokens": m, "rows": k, "cols": n, "group_size": GROUP, "target": target}
    for k, n in SHAPES
    for m in TOKENS
    for f in FORMATS[1:]
  ]
  out = []
  for case, kernel in zip(cases, static_gpu.build(PRODUCT, cases), strict=True):
    _, (x, leaf) = arg_specs.product(**case)
    leaf = getattr(leaf, "weight", leaf)
    tile = gpu.choose(x.shape[0], leaf, jnp.bfloat16)
    device, (m, k, n) = devices.GPUS[target], (case["tokens"], case["rows"], case["cols"])
    moved = leaves.nbytes(leaf) + 2 * m * (k + n)
    rate = device.peak * (2 if leaf.inputs == "int8" else 1)
    out.append(
      {
        "target": target, "format": case["format"], "m": m, "k": k, "n": n, "group_size": GROUP,
        "tile": tile._asdict(), **dataclasses.asdict(kernel), "bytes": moved,
        "memory_us": moved / device.bandwidth, "compute_us": 2 * m * k * n / rate,
        "dense_us": max(2 * (k * n + m * (k + n)) / device.bandwidth, 2 * m * k * n / device.peak),
        "jax": jax.__version__, "source": "static: ptxas; data sheet",
      }
    )  # fmt: skip
  return out


def _weights(format: str, rows: int, cols: int, tokens: int, target: str) -> list[Any]:
  """Make as many matrices as the cache cannot hold; with many tokens it does not matter."""
  name, _, inputs = format.partition("-")
  bits = 16 if name == "bf16" else int(name.removeprefix("int"))
  count = 1 if tokens > 64 else math.ceil(CACHE / (rows * cols * bits / 8))
  keys = jax.random.split(jax.random.key(1), count)
  if name == "bf16":
    return [jax.random.normal(k, (rows, cols), jnp.bfloat16) / rows**0.5 for k in keys]
  spec = arg_specs.ArgSpec(1, rows, cols, bits, GROUP)
  made = [arg_specs.operands(spec, k)[1] for k in keys]
  if inputs:
    made = [leaves.ActivationQuantized(w, None) for w in made]
  return [kernels.prepare(w, target=target) for w in made]


def _stored(weight: Any) -> Any:
  return getattr(weight, "weight", weight)


def _time(
  call: Callable[..., Any], args: Sequence[Any], count: int, repeats: int
) -> tuple[float, float]:
  """Return microseconds of one product: by its kernels, and by the clock."""
  from jax.experimental.mosaic.gpu import profiler

  jax.block_until_ready(call(*args))
  walls = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    walls.append(time.perf_counter() - start)
  _, took = profiler.measure(call, iterations=max(2, repeats))(*args)
  assert took, "no kernels ran"
  return 1e3 * statistics.median(took) / count, 1e6 * statistics.median(walls) / count


def _error(x: jax.Array, weight: Any) -> float:
  """Compare some columns with float64; return the largest error over the largest value."""
  got = np.asarray(kernels.matmul(x, weight)[:, :CHECKED], np.float64)
  inputs = np.asarray(x, np.float64)
  if isinstance(weight, leaves.ActivationQuantized):
    scales = weight.scales_of(x)
    inputs = np.asarray(weight.codes_of(x, scales), np.float64) * np.asarray(scales, np.float64)
  dense = np.asarray(leaves.dense(kernels.restore(_stored(weight)))[:, :CHECKED], np.float64)
  expected = inputs @ dense
  return float(np.abs(got - expected).max() / np.abs(expected).max())


def show(rows: Sequence[Mapping[str, Any]]) -> table.Table:
  """Lay the results out, the targets judged.

  Args:
    rows: what `measure` returned.

  Returns:
    The table.

  Example:
    >>> row = {"format": "bf16", "m": 1, "k": 2, "n": 2, "us": 1.0, "bandwidth_share": 0.5}
    >>> row |= {"source": "measured", "speed": 1.0, "error": 0.0, "aim": None, "met": None}
    >>> show([row]).row_count
    1
  """
  if rows[0]["source"] != "measured":
    return _show_static(rows)
  out = table.Table("shape", "tokens", "format", "us", "% bandwidth", "x dense", "error", "aim")
  for row in rows:
    said = "" if row["aim"] is None else f"{row['aim']} {'met' if row['met'] else 'MISSED'}"
    out.add_row(
      f"{row['k']} x {row['n']}", str(row["m"]), row["format"], f"{row['us']:.2f}",
      f"{100 * row['bandwidth_share']:.0f}", f"{row['speed']:.2f}", f"{row['error']:.1e}", said,
    )  # fmt: skip
  return out


def _show_static(rows: Sequence[Mapping[str, Any]]) -> table.Table:
  heads = (
    "shape",
    "tokens",
    "format",
    "registers",
    "spilled",
    "memory us",
    "compute us",
    "dense us",
  )
  out = table.Table(*heads, title="Static: nothing ran; bounds at published rates")
  for row in rows:
    out.add_row(
      f"{row['k']} x {row['n']}", str(row["m"]), row["format"], str(row["registers"]),
      row["error"] or str(row["spilled"]), f"{row['memory_us']:.2f}", f"{row['compute_us']:.2f}",
      f"{row['dense_us']:.2f}",
    )  # fmt: skip
  return out


def main(argv: list[str]) -> None:
  """Measure, print the table, write the rows after each shape.

  Args:
    argv: no positional arguments.
  """
  del argv
  args = flags.FLAGS
  if args.static:
    rows = compile_all(next(iter(devices.GPUS)))
    console.Console(width=110).print(show(rows))
    if args.json:
      pathlib.Path(args.json).write_text(json.dumps(rows, indent=0) + "\n")
    return
  try:
    target = here()
  except ValueError as error:
    raise SystemExit(f"bench_gpu_matmul: {error}") from None
  rows = []
  for k, n in SHAPES:
    for m in TOKENS:
      rows += measure(k, n, m, target, args.repeats)
      if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
  console.Console(width=110).print(show(rows))


if __name__ == "__main__":
  flags.DEFINE_bool("static", False, "Compile, without a GPU.")
  flags.DEFINE_string("json", None, "Where to write the rows.")
  flags.DEFINE_integer("repeats", 20, "How often each series is timed.", 1)
  app.run(main)
