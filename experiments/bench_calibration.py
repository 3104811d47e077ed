# SPDX-License-Identifier: Apache-2.0
"""Measure what memory calibrated quantization takes, by the depth of the model.

python -P -m treesurgeon.experiments.bench_calibration --layers=12,48

Llama-shaped checkpoints of width 512 that differ in depth only are made once, random, in bfloat16.
`treesurgeon apply` quantizes each by GPTQ in a process of its own: "blocks" reads, calibrates,
changes and writes one block at a time; "spilled" keeps the hidden states in a file as well;
"whole" is `--driver=run`, which holds the model and the second moments of all its layers.
Anonymous and file-backed memory are sampled apart, for pages of mapped inputs can be taken back at
any time.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich import console, table

from treesurgeon import io, models
from treesurgeon.core import model as model_lib
from treesurgeon.experiments import bench_merge

WIDTH, HIDDEN, VOCABULARY = 512, 2048, 1024
MODES = {
  "blocks": ["--driver=blockwise"],
  "spilled": ["--driver=blockwise", "--activation_budget=1MB"],
  "whole": ["--driver=run"],
}


def make(folder: pathlib.Path, layers: int) -> None:
  """Write a checkpoint, unless it is there.

  Args:
    folder: where to.
    layers: its depth.
  """
  if (folder / "model.safetensors").is_file():
    return
  spec = models.Spec(
    family="llama", vocab_size=VOCABULARY, d_model=WIDTH, num_layers=layers, num_heads=8,
    d_ff=HIDDEN, max_positions=512,
  )  # fmt: skip
  params = models.init(spec, jax.random.key(0), jnp.bfloat16)
  io.save(model_lib.Model(spec, params), folder)


def main(argv: list[str]) -> None:
  """Measure, print a table, and write the figures.

  Args:
    argv: no positional arguments.
  """
  del argv
  values = flags.FLAGS
  folder = pathlib.Path(values.scratch or tempfile.mkdtemp(prefix="bench_calibration"))
  folder.mkdir(parents=True, exist_ok=True)
  rows, length = values.rows, values.length
  tokens = folder / f"tokens_{rows}x{length}.npy"
  np.save(tokens, np.random.default_rng(0).integers(0, VOCABULARY, (rows, length), np.int32))
  program = str(pathlib.Path(sys.executable).with_name("treesurgeon"))
  found: list[dict[str, Any]] = []
  for mode in values.modes:
    for layers in map(int, values.layers):
      source, out = folder / f"{layers}_layers", folder / "out"
      make(source, layers)
      shutil.rmtree(out, ignore_errors=True)
      command = [program, "apply", f"--model={source}", f"--out={out}"]
      command += ["--transform=compress.quantize.gptq()", f"--calibration={tokens}", *MODES[mode]]
      command += [f"--samples={rows}", f"--length={length}"]
      measured = bench_merge.measure(command)
      size = (source / "model.safetensors").stat().st_size / 1e6
      found.append({"mode": mode, "layers": layers, "model": size, **measured})
      print(found[-1], flush=True)
  out = table.Table(box=None)
  for name in ("mode", "layers", "model", "anonymous", "file", "peak", "cpu", "wall"):
    out.add_column(name, justify="left" if name == "mode" else "right")
  for r in found:
    cells = [f"{r[c]:.0f} MB" for c in ("model", "anonymous", "file", "peak")]
    out.add_row(r["mode"], str(r["layers"]), *cells, f"{r['cpu']:.0f} s", f"{r['wall']:.0f} s")
  console.Console(width=100).print(out)
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(found, indent=1) + "\n")
  if not values.scratch:
    shutil.rmtree(folder)


if __name__ == "__main__":
  flags.DEFINE_string("scratch", None, "Where to put models; default: a temporary folder.")
  flags.DEFINE_list("layers", ["12", "48"], "Depths.")
  flags.DEFINE_list("modes", list(MODES), "Which ways to calibrate.")
  flags.DEFINE_integer("rows", 16, "Calibration sequences.", 1)
  flags.DEFINE_integer("length", 256, "Tokens a calibration sequence.", 1)
  flags.DEFINE_string("json", None, "Where to write the figures.")
  app.run(main)
