# SPDX-License-Identifier: Apache-2.0
"""Measure the core: streaming merges, quantization, import and decoding, as ratios in one run.

python -P -m treesurgeon.experiments.bench_core [--params=100] [--scratch=DIR]

Every measurement runs in a process of its own; the figures are the best of `--repeats`. Compile
time is subtracted and shown apart. Baselines: a plain numpy loop over the same files, the disk's
copy speed, reading the bytes, and the memory bandwidth that a sum over a large array attains.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags
from rich import console, table
from safetensors import numpy as st

from treesurgeon import io, models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.run import collect, drivers

EXPRESSIONS = {
  "linear": "merge.linear(weights=(0.4, 0.3, 0.3))",
  "ties": "merge.ties(density=0.2)",
}


def spec_of(millions: int) -> models.Spec:
  """Choose a Llama of about the given size, 12 layers.

  Args:
    millions: parameters in millions.

  Returns:
    Its spec.

  Example:
    >>> spec_of(100).d_model
    768
  """
  width = max(64, round((millions * 1e6 / (12 * 12)) ** 0.5 / 64 * 0.92) * 64)
  return models.Spec(
    vocab_size=8192, d_model=width, num_layers=12, num_heads=width // 64, d_ff=width * 8 // 3
  )


def merge(folder: pathlib.Path, expression: str) -> float:
  """Stream a merge of three checkpoints into a fourth; return what it took, in seconds."""
  donors = [io.Checkpoint(folder / n) for n in ("b", "c")]
  base = io.Checkpoint(folder / "a")
  start = time.perf_counter()
  with io.Sink(folder / "out", base.spec, overwrite=True, companions=folder / "a") as sink:
    materials = collect.Materials(donors=donors)
    records = drivers.stream(registry.parse(expression), base, sink, materials)
    written = time.perf_counter() - start
    sink.close(records)  # hashes the output for the lineage, which no baseline does
  return written


def numpy_linear(folder: pathlib.Path) -> float:
  """Average three checkpoints tensor by tensor, as a person would in numpy."""
  return _numpy(folder, lambda ws: 0.4 * ws[0] + 0.3 * ws[1] + 0.3 * ws[2])


def numpy_ties(folder: pathlib.Path) -> float:
  """Merge by TIES tensor by tensor, the threshold by a full sort as mergekit finds it."""

  def ties(ws: list[np.ndarray]) -> np.ndarray:
    base, kept = ws[0], []
    for w in ws[1:]:
      delta = w - base
      k = max(1, int(0.2 * delta.size))
      mask = np.zeros(delta.size, bool)
      mask[np.argsort(-np.abs(delta).ravel())[:k]] = True
      kept.append(np.where(mask.reshape(delta.shape), delta, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [(np.sign(d) == sign) for d in kept]
    count = np.maximum(sum(a.astype(np.float32) for a in agree), 1)
    return base + sum(np.where(a, d, 0) for a, d in zip(agree, kept, strict=True)) / count

  return _numpy(folder, ties)


def _numpy(folder: pathlib.Path, fn: Callable[[list[np.ndarray]], np.ndarray]) -> float:
  start = time.perf_counter()
  files = [st.load_file(folder / n / "model.safetensors") for n in ("a", "b", "c")]
  out = {}
  for name in files[0]:
    out[name] = fn([f[name].astype(np.float32) for f in files]).astype(ml_dtypes.bfloat16)
  (folder / "numpy").mkdir(exist_ok=True)
  st.save_file(out, folder / "numpy" / "model.safetensors")
  return time.perf_counter() - start


def copy(folder: pathlib.Path) -> float:
  """Copy one checkpoint's file and force it to disk."""
  start = time.perf_counter()
  with open(folder / "a" / "model.safetensors", "rb") as a, open(folder / "copied", "wb") as b:
    shutil.copyfileobj(a, b, 16 << 20)
    b.flush()
    os.fsync(b.fileno())
  return time.perf_counter() - start


def read(folder: pathlib.Path) -> float:
  """Read one checkpoint's bytes."""
  start = time.perf_counter()
  with open(folder / "a" / "model.safetensors", "rb") as file:
    while file.read(16 << 20):
      pass
  return time.perf_counter() - start


def load(folder: pathlib.Path) -> float:
  """Import one checkpoint into stacked device arrays."""
  start = time.perf_counter()
  jax.block_until_ready(io.load(folder / "a").params)
  return time.perf_counter() - start


def quantize(folder: pathlib.Path, expression: str) -> float:
  """Quantize one loaded checkpoint; calibration is 8 sequences of 128 tokens."""
  model = io.load(folder / "a")
  rows = np.random.default_rng(0).integers(0, model.spec.vocab_size, (8, 128))
  go = drivers.run_blockwise if "gptq" in expression else drivers.run
  start = time.perf_counter()
  out = go(registry.parse(expression), model, collect.Materials(batches=[rows]))
  jax.block_until_ready(out.params)
  return time.perf_counter() - start


def decode(folder: pathlib.Path, expression: str = "") -> float:
  """Time one token of greedy decoding, the second of two equal calls."""
  model = io.load(folder / "a", dtype=jnp.float32)
  if expression:
    model = drivers.run(registry.parse(expression), model)
  prompt = np.ones((1, 8), np.int32)

  def tokens(n: int) -> float:
    best = float("inf")
    for _ in range(3):
      start = time.perf_counter()
      models.generate(model.spec, model.params, prompt, max_new_tokens=n).block_until_ready()
      best = min(best, time.perf_counter() - start)
    return best

  return (tokens(48) - tokens(16)) / 32


def bandwidth(folder: pathlib.Path) -> float:
  """Measure the time to read one byte from memory in a compiled sum over 400 MB."""
  del folder
  x = jnp.ones(100_000_000, jnp.float32)
  total = jax.jit(jnp.sum)
  total(x).block_until_ready()
  best = float("inf")
  for _ in range(5):
    start = time.perf_counter()
    total(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return best / x.nbytes


JOBS: dict[str, Callable[[pathlib.Path], float]] = {
  "copy": copy,
  "read": read,
  "load": load,
  "numpy linear": numpy_linear,
  "numpy ties": numpy_ties,
  "stream linear": lambda f: merge(f, EXPRESSIONS["linear"]),
  "stream ties": lambda f: merge(f, EXPRESSIONS["ties"]),
  "rtn": lambda f: quantize(f, "compress.quantize.rtn(bits=4, group_size=128)"),
  "gptq": lambda f: quantize(f, "compress.quantize.gptq(bits=4, group_size=128)"),
  "decode": decode,
  "decode rtn": lambda f: decode(f, "compress.quantize.rtn(bits=4, group_size=128)"),
  "bandwidth": bandwidth,
}


def make(folder: pathlib.Path, millions: int) -> dict[str, float]:
  """Write three random bf16 checkpoints near each other.

  Args:
    folder: where.
    millions: parameters of each, in millions.

  Returns:
    "parameters", "bytes" and "largest" (bytes of the largest leaf).
  """
  spec = spec_of(millions)
  params = models.init(spec, jax.random.key(0), jnp.bfloat16)
  for i, name in enumerate("abc"):
    if not (folder / name / "model.safetensors").exists():
      leaf = lambda x, i=i: (
        x
        + jnp.asarray(
          0.002 * i * np.random.default_rng(i).standard_normal(x.shape, np.float32), x.dtype
        )
      )
      io.save(model_lib.Model(spec, jax.tree.map(leaf, params)), folder / name, overwrite=True)
  source = io.Checkpoint(folder / "a")
  sizes = [source.struct(a) for a in source.addresses()]
  return {
    "parameters": sum(s.size for s in sizes),
    "kernels": sum(s.size for s, a in zip(sizes, source.addresses(), strict=True)
                   if a.startswith("layers") and a.endswith("kernel")),
    "bytes": (folder / "a" / "model.safetensors").stat().st_size,
    "largest": max(s.size * s.dtype.itemsize for s in sizes),
  }  # fmt: skip


def work(job: str, folder: pathlib.Path) -> None:
  """Make one measurement and print it as JSON.

  Args:
    job: a name of `JOBS`.
    folder: the checkpoints.
  """
  compiled: list[float] = []

  def listen(event: str, duration_secs: float, **rest: Any) -> None:
    del rest
    if "compile" in event or "trace" in event or "lower" in event:
      compiled.append(duration_secs if event.endswith("duration") else 0.0)

  programs: list[str] = []

  def count(event: str, duration_secs: float, **rest: Any) -> None:
    del duration_secs, rest
    if "backend_compile" in event:
      programs.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.monitoring.register_event_duration_secs_listener(count)
  seconds = JOBS[job](folder)
  status = pathlib.Path("/proc/self/status").read_text()  # unlike ru_maxrss, starts at exec
  peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
  out = {"seconds": seconds, "compile": sum(compiled), "programs": len(programs), "peak": peak}
  print(json.dumps(out))


def measure(job: str, folder: pathlib.Path) -> dict[str, float]:
  """Run one measurement in processes of its own and keep the fastest.

  Args:
    job: a name of `JOBS`.
    folder: the checkpoints.

  Returns:
    seconds without compilation, compile seconds, number of compiled programs, peak bytes.
  """
  best: dict[str, float] = {}
  for _ in range(flags.FLAGS.repeats):
    command = [sys.executable, "-P", "-m", "treesurgeon.experiments.bench_core",
               f"--work={job}", f"--scratch={folder}"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if job not in ("decode", "decode rtn", "bandwidth"):
      found["seconds"] -= found["compile"]
    if not best or found["seconds"] < best["seconds"]:
      best = found
  return best


def show(size: dict[str, float], got: dict[str, dict[str, float]]) -> table.Table:
  """Lay the ratios out.

  Args:
    size: from `make`.
    got: job to measurement.

  Returns:
    A table.
  """
  out = table.Table(
    title=f"{size['parameters'] / 1e6:.0f}M parameters, bf16, {size['bytes'] / 1e6:.0f} MB"
  )
  for name in ("what", "seconds", "ratio", "compile s", "programs", "peak RSS"):
    out.add_column(name, justify="left" if name in ("what", "ratio") else "right")

  def row(job: str, ratio: str) -> None:
    g = got[job]
    out.add_row(job, f"{g['seconds']:.3f}", ratio, f"{g['compile']:.1f}", f"{g['programs']}",
                f"{g['peak'] / 1e6:.0f} MB")  # fmt: skip

  s = {k: g["seconds"] for k, g in got.items()}
  limit = 3 * 3 * size["largest"] + 600e6
  for job in ("copy", "read"):
    row(job, f"{size['bytes'] / s[job] / 1e9:.2f} GB/s")
  row("load", f"{s['load'] / s['read']:.1f} x reading the bytes")
  for kind in ("linear", "ties"):
    row(f"numpy {kind}", "baseline")
    job = f"stream {kind}"
    share = got[job]["peak"] / limit
    row(job, f"{s[f'numpy {kind}'] / s[job]:.1f} x as fast as numpy, {s[job] / s['copy']:.1f} x "
             f"the time of copying one; {share:.2f} of the memory target")  # fmt: skip
  for job in ("rtn", "gptq"):
    row(job, f"{size['kernels'] / s[job] / 1e6:.2f} M weights/s")
  lowest = got["bandwidth"]["seconds"] * size["parameters"] * 4
  row(
    "decode", f"{1 / s['decode']:.1f} tokens/s, {lowest / s['decode']:.2f} of the bandwidth limit"
  )
  row("decode rtn", f"{s['decode'] / s['decode rtn']:.2f} x the speed of float32")
  return out


def main(argv: list[str]) -> None:
  """Measure everything, or one thing in a child process.

  Args:
    argv: no positional arguments.
  """
  del argv
  folder = pathlib.Path(flags.FLAGS.scratch or tempfile.mkdtemp(prefix="bench_core_"))
  folder.mkdir(parents=True, exist_ok=True)
  if flags.FLAGS.work:
    work(flags.FLAGS.work, folder)
    return
  size = make(folder, flags.FLAGS.params)
  got = {}
  for job in JOBS:
    print(job, file=sys.stderr)
    got[job] = measure(job, folder)
  console.Console(width=140).print(show(size, got))
  if not flags.FLAGS.scratch:
    shutil.rmtree(folder)


if __name__ == "__main__":
  flags.DEFINE_integer("params", 100, "Size of the model, millions of parameters.", 1)
  flags.DEFINE_string("scratch", None, "Where to put the checkpoints; default: temporary.")
  flags.DEFINE_integer("repeats", 2, "Processes a measurement; the fastest counts.", 1)
  flags.DEFINE_string("work", None, "Internal: the measurement this process makes.")
  app.run(main)
