# SPDX-License-Identifier: Apache-2.0
"""What low-bit matrix products would cost on a TPU, by its compiler, beside the dense product's.

python -P -m treesurgeon.experiments.bench_kernels --static --target=tpu-v5e,tpu-v6e --json=FILE
python -P -m treesurgeon.experiments.bench_kernels --report=FILE --figure=FILE.png

Nothing is measured: every number is static, cycles from the TPU's compiler and bytes over the
published bandwidth (`kernels/static_cost.py` says what that leaves out). The targets, as times the
speed of the dense bfloat16 product compiled for the same chip, at groups of 128:

* 4096 x 4096, up to 16 tokens: int4 3.6 (tpu7x 1.9), int8 1.9 (tpu7x 1.6), 2 bits and ternary 5.5
  on v5e, 2 bits with 8-bit inputs 5 on v6e; none of these with temporaries in memory;
* 256 tokens: 1.0, and int4 on v6e 1.8; from 1,024 tokens on 1 / 1.1;
* 4096 x 14336, 16 tokens: int4 3.5 on v5e and v6e.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import app, flags
from rich import console, table

from treesurgeon import kernels, models, registry
from treesurgeon.core import model
from treesurgeon.kernels import devices, static_cost
from treesurgeon.kernels.matmul import arg_specs, tpu
from treesurgeon.kernels.sparse_matmul import tpu as sparse_tpu
from treesurgeon.run import drivers

plt.switch_backend("agg")
PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"
FORMATS = ("int8", "int4", "int3", "int2", "ternary", "sign")
SPARSE = ("2:4", "2:4-int8", "4:8", "gqsa", "vectors")
OTHERS = ("nf4", "nf3", "mxfp4", "nvfp4", "e4m3fn", "e5m2", "e4m3fn-a8")
SHAPES = {
  (1, 4096, 4096): (*FORMATS, "nf4"),
  (16, 4096, 4096): (*FORMATS, "e2m1", "int8-a8", "int4-a8", "int2-a8", *OTHERS, *SPARSE),
  (256, 4096, 4096): ("int8", "int4", "int3", "int2", "int8-a8", "nf4", "e4m3fn"),
  (1024, 4096, 4096): ("int8", "int4"),
  (16, 4096, 14336): ("int8", "int4", "int4-xla", "int2", "nf4"),
  (16, 14336, 4096): ("int4", "int2"),
}  # tokens, rows, cols
GROUP = 128
COLORS = {
  "bf16": "#555555", "int8": "#1f77b4", "int4": "#d95f02", "int3": "#7570b3", "int2": "#1b9e77",
  "ternary": "#66a61e", "sign": "#e7298a", "int2-a8": "#a6761d",
}  # fmt: skip


def target_of(target: str, format: str, tokens: int, rows: int, cols: int) -> float | None:
  """Say how many times as fast as dense a product shall be.

  Args:
    target: name of the device.
    format: of the weights.
    tokens, rows, cols: of the product.

  Returns:
    The factor, or None where none was set.

  Example:
    >>> target_of("tpu-v6e", "int4", 256, 4096, 4096)
    1.8
  """
  if "-" in format or format in SPARSE:
    wanted = ("tpu-v6e", "int2-a8", 4096, 4096)
    return 5.0 if (target, format, rows, cols) == wanted and tokens <= 16 else None
  if (rows, cols) == (4096, 14336):
    return 3.5 if format == "int4" and target in ("tpu-v5e", "tpu-v6e") else None
  if (rows, cols) != (4096, 4096):
    return None
  if tokens >= 1024:
    return 1 / 1.1
  if tokens > 16:
    return 1.8 if (target, format) == ("tpu-v6e", "int4") and tokens == 256 else 1.0
  if format in ("int2", "ternary"):
    return 5.5 if target == "tpu-v5e" else None
  last = target == "tpu7x"
  return {"int4": 1.9 if last else 3.6, "int8": 1.6 if last else 1.9}.get(format)


def forward(
  target: str, transform: str, width: int = 256, layers: int = 3
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe a small decoder's forward pass of one token, its kernels quantized and prepared.

  Args:
    target: name of the device.
    transform: expression that quantizes, such as "compress.quantize.rtn(bits=4)".
    width: of the model, a multiple of 128; its feed-forward layers are twice as wide.
    layers: of the model.

  Returns:
    (function, arguments), for `static_cost`.
  """
  spec = models.Spec(
    vocab_size=64, d_model=width, num_layers=layers, num_heads=width // 128, d_ff=2 * width,
    max_positions=16,
  )  # fmt: skip
  params = models.init(spec, jax.random.key(0), dtype=jnp.bfloat16)
  small = drivers.run(registry.parse(transform), model.Model(spec, params))
  ready = kernels.prepare(small.params, target=target)
  return lambda p, tokens: models.forward(spec, p, tokens).logits, (ready, jnp.ones((1, 1), int))


def measure(target: str, shapes: Mapping[tuple[int, int, int], Sequence[str]]) -> list[dict]:
  """Compile every product for a device, and the dense one beside it.

  Args:
    target: name of the device.
    shapes: formats to compile, by (tokens, rows, cols).

  Returns:
    JSON rows, a dense one and one a format for each shape.
  """
  cases = [(shape, f) for shape, formats in shapes.items() for f in ("bf16", *formats)]
  costs = static_cost.measure([_request(target, f, shape) for shape, f in cases])
  lost = [i for i, c in enumerate(costs) if not c.error and c.cycles is None]
  lost = [i for i in lost if cases[i][1] not in ("bf16", "int4-xla", "4:8")]
  pieces = static_cost.measure([_piece(target, cases[i][1], cases[i][0]) for i in lost])
  for i, piece in zip(lost, pieces, strict=True):
    costs[i] = _from_piece(costs[i], piece, target, *cases[i])
  dense = {s: c.predicted_us for (s, f), c in zip(cases, costs, strict=True) if f == "bf16"}
  rows = []
  for (shape, f), cost in zip(cases, costs, strict=True):
    aim = None if f == "bf16" else target_of(target, f, *shape)
    speed = dense[shape] / cost.predicted_us
    met = None if aim is None else bool(speed >= aim and cost.temp_bytes == 0)
    rows.append(
      {
        "target": target, "format": f, **dict(zip("mkn", shape, strict=True)),
        "group_size": _group(f), **dataclasses.asdict(cost),
        "libtpu": metadata.version("libtpu"), "dense_us": dense[shape], "speed": speed,
        "aim": aim, "met": met,
      }
    )  # fmt: skip
  return rows


def _request(target: str, format: str, shape: tuple[int, int, int]) -> static_cost.Request:
  tokens, rows, cols = shape
  kwargs = {"format": format, "tokens": tokens, "rows": rows, "cols": cols}
  return static_cost.Request(PRODUCT, {**kwargs, "group_size": GROUP, "target": target}, target)


def _group(format: str) -> int | None:
  return {"bf16": None, "mxfp4": 32, "nvfp4": 16}.get(format, GROUP)


def _piece(target: str, format: str, shape: tuple[int, int, int]) -> static_cost.Request:
  """One block of tokens and columns, which the compiler may simulate where it cannot the whole."""
  tokens, rows, cols = shape
  block = _block(target, format, shape)
  whole = _request(target, format, (block[0], rows, block[1]))
  return dataclasses.replace(
    whole, kwargs={**whole.kwargs, "block": block}, steps=1, flops=2 * rows * math.prod(block)
  )


def _block(target: str, format: str, shape: tuple[int, int, int]) -> tuple[int, int]:
  _, (_, leaf) = arg_specs.product(format, *shape, GROUP, target)
  kernel = sparse_tpu if ":" in format else tpu
  return kernel.blocks(shape[0], getattr(leaf, "matrix", getattr(leaf, "weight", leaf)))


def _from_piece(
  whole: static_cost.Cost,
  piece: static_cost.Cost,
  target: str,
  shape: tuple[int, int, int],
  format: str,
) -> static_cost.Cost:
  if piece.cycles is None:
    return whole
  tokens, _, cols = shape
  block = _block(target, format, shape)
  cycles = math.ceil(piece.cycles * (tokens / block[0]) * (cols / block[1]))
  compute = cycles / devices.find(target).clock_mhz
  return dataclasses.replace(
    whole, cycles=cycles, compute_us=compute, predicted_us=max(compute, whole.memory_us),
    source=f"{piece.source}, of one block",
  )  # fmt: skip


def show(rows: Sequence[dict]) -> table.Table:
  """Lay rows out for a terminal.

  Args:
    rows: what `measure` returned.

  Returns:
    The table.
  """
  out = table.Table(title="Static: cycles by the TPU's compiler, bytes over the bandwidth")
  for head in _HEADS:
    out.add_column(head, justify="left" if head in ("target", "format", "source") else "right")
  for row in rows:
    out.add_row(*_cells(row))
  return out


def report(rows: Sequence[dict]) -> str:
  """Write rows as Markdown, one table a device.

  Args:
    rows: what `measure` returned, of all devices.

  Returns:
    The text.
  """
  parts = []
  for target in dict.fromkeys(r["target"] for r in rows):
    lines = [[h for h in _HEADS if h != "target"], ["---"] * (len(_HEADS) - 1)]
    lines += [_cells(r)[1:] for r in rows if r["target"] == target]
    parts.append(f"### {target}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
  return "\n\n".join(parts) + "\n"


_HEADS = ("target", "format", "m x k x n", "compute us", "memory us", "predicted us", "temp bytes",
          "x dense", "aim", "met", "source")  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
  met = {None: "", True: "yes", False: "NO"}[row["met"]]
  aim = "" if row["aim"] is None else f"{row['aim']:.2f}"
  source = row["error"] or row["source"].removeprefix("static: ")
  return [
    row["target"], row["format"], f"{row['m']} x {row['k']} x {row['n']}",
    f"{row['compute_us']:.2f}", f"{row['memory_us']:.2f}", f"{row['predicted_us']:.2f}",
    str(row["temp_bytes"]), f"{row['speed']:.2f}", aim, met, source,
  ]  # fmt: skip


def figure(rows: Sequence[dict]) -> Any:
  """Draw each device's roofline and where the products of 4096 x 4096 lie under it.

  Args:
    rows: what `measure` returned.

  Returns:
    The figure.
  """
  targets = list(dict.fromkeys(r["target"] for r in rows))
  fig, axes = plt.subplots(1, len(targets), figsize=(4.2 * len(targets), 4), squeeze=False)
  for ax, target in zip(axes[0], targets, strict=True):
    device = devices.find(target)
    knee = device.peak / device.bandwidth
    xs = [0.5, knee, 8192]
    ax.plot(xs, [min(device.peak, x * device.bandwidth) / 1e6 for x in xs], color="black", lw=1)
    for name, color in COLORS.items():
      points = [
        (
          2 * r["m"] * r["k"] * r["n"] / r["bytes"],
          2 * r["m"] * r["k"] * r["n"] / r["predicted_us"],
        )
        for r in rows
        if (r["target"], r["format"], r["k"], r["n"]) == (target, name, 4096, 4096)
      ]
      if points:
        ax.plot(*zip(*((x, y / 1e6) for x, y in points), strict=True), "o-", ms=4, lw=0.7,
                color=color, label=name)  # fmt: skip
    ax.set(xscale="log", yscale="log", title=target, xlabel="operations a byte moved")
    ax.spines[["top", "right"]].set_visible(False)
  axes[0][0].set_ylabel("operations a second, 10^12 (static)")
  axes[0][-1].legend(frameon=False, fontsize=8)
  return fig


def remember(rows: Sequence[dict], file: pathlib.Path) -> None:
  """Enter the cycles of whole programs in a file that tests compare with, by libtpu's version.

  Args:
    rows: what `measure` returned.
    file: JSON, made if it is not there.
  """
  known = json.loads(file.read_text()) if file.is_file() else {}
  for row in rows:
    if row["source"] == "static: critical path" and row["m"] <= 16 and "xla" not in row["format"]:
      name = f"{row['target']} {row['format']} {row['m']} {row['k']} {row['n']}"
      known.setdefault(row["libtpu"], {})[name] = row["cycles"]
  file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def main(argv: list[str]) -> None:
  """Compile and show, or write the report of what was compiled before.

  Args:
    argv: no positional arguments.
  """
  del argv
  options = flags.FLAGS
  if options.report:
    rows = [r for file in options.report for r in json.loads(pathlib.Path(file).read_text())]
    print(report(rows))
    if options.figure:
      figure(rows).savefig(options.figure, dpi=110, bbox_inches="tight")
    return
  if not options.static:
    raise app.UsageError("--static is needed: there are no measurements on accelerators yet")
  rows = []
  for target in options.target:
    devices.find(target)
    shapes = {s: f for s, f in SHAPES.items() if s[0] <= options.tokens}
    rows += measure(target, shapes)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
  if options.cycles:
    remember(rows, pathlib.Path(options.cycles))
  console.Console(width=160).print(show(rows))


if __name__ == "__main__":
  flags.DEFINE_list("target", list(devices.DEVICES), "Devices to compile for.")
  flags.DEFINE_bool("static", False, "Ask the compiler; nothing runs on an accelerator.")
  flags.DEFINE_string("json", None, "Where to write the rows.")
  flags.DEFINE_integer("tokens", 1024, "Leave out shapes of more tokens.", 1)
  flags.DEFINE_string("cycles", None, "File of cycles to enter what was found in.")
  flags.DEFINE_list("report", [], "Files of rows to print as Markdown, instead of compiling.")
  flags.DEFINE_string("figure", None, "With --report: where to write the roofline plot.")
  app.run(main)
