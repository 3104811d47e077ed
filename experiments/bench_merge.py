# SPDX-License-Identifier: Apache-2.0
"""Measure whole merge commands against mergekit's on checkpoints of half a billion parameters.

python -P -m treesurgeon.experiments.bench_merge --scratch=DIR [--mergekit=PATH/mergekit-yaml]

A base and three experts, Llama-shaped (width 1024, 24 layers, vocabulary 32,000) in bfloat16, are
made once. Every command is a process of its own; user plus system time is the kernel's account,
and anonymous and file-backed memory are sampled apart, for pages of mapped inputs can be taken back
at any time. `cp` copies one checkpoint with a warm cache. "first" is a merge of files never seen,
which are hashed for the lineage; their hashes are remembered. `--donors=2,4,8` merges so many.
`--sparse=30` merges linearly three checkpoints of so many billion parameters that are mostly holes,
and digs holes into the output.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import yaml
from absl import app, flags
from rich import console, table
from safetensors import numpy as st

LAYERS, WIDTH, HIDDEN, VOCABULARY = 24, 1024, 4096, 32000
NAMES = ("base", "a", "b", "c")
# What the issue of a fast merge is: mergekit's time divided by ours must reach these.
TARGETS = {"linear": 2.5, "ties": 6.0}


def shapes(layers: int, width: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
  """List a Llama's tensors.

  Args:
    layers: number of layers.
    width: of the residual stream.
    hidden: of the feed-forward block.
    vocabulary: number of tokens.

  Returns:
    Name to shape.

  Example:
    >>> sum(int(np.prod(s)) for s in shapes(24, 1024, 4096, 32000).values())
    468239360
  """
  out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
  for i in range(layers):
    at = f"model.layers.{i}."
    for n in "qkvo":
      out[f"{at}self_attn.{n}_proj.weight"] = (width, width)
    out[at + "mlp.gate_proj.weight"] = out[at + "mlp.up_proj.weight"] = (hidden, width)
    out[at + "mlp.down_proj.weight"] = (width, hidden)
    out[at + "input_layernorm.weight"] = out[at + "post_attention_layernorm.weight"] = (width,)
  return {**out, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(folder: pathlib.Path) -> None:
  """Write the base and the experts, unless they are there.

  Args:
    folder: where to.
  """
  for i, name in enumerate(NAMES):
    if (folder / name / "model.safetensors").is_file():
      continue
    _describe(folder / name, LAYERS, WIDTH, HIDDEN)
    tensors = {}
    for j, (tensor, shape) in enumerate(shapes(LAYERS, WIDTH, HIDDEN, VOCABULARY).items()):
      w = np.random.default_rng([0, j]).standard_normal(shape, np.float32) * np.float32(0.02)
      if i:
        w += np.random.default_rng([i, j]).standard_normal(shape, np.float32) * np.float32(0.002)
      tensors[tensor] = w.astype(ml_dtypes.bfloat16)
    _save(folder / name / "model.safetensors", tensors)


def make_sparse(folder: pathlib.Path, billions: float) -> None:
  """Write checkpoints of many shards that are holes but for the first rows of each tensor.

  Args:
    folder: where to.
    billions: parameters.
  """
  width, hidden = 6656, 17920
  layers = max(1, round(billions * 1e9 / (4 * width * width + 3 * width * hidden)))
  named = shapes(layers, width, hidden, VOCABULARY)
  shards = [list(named)[i::layers] for i in range(layers)]
  for i, name in enumerate(NAMES[1:]):
    if (folder / name / "model.safetensors.index.json").is_file():
      continue
    _describe(folder / name, layers, width, hidden)
    table_of, total = {}, 0
    for k, tensors in enumerate(shards):
      file = f"model-{k + 1:05}-of-{layers:05}.safetensors"
      table_of |= dict.fromkeys(tensors, file)
      header, at = {}, 0
      for t in tensors:
        size = 2 * int(np.prod(named[t]))
        header[t] = {"dtype": "BF16", "shape": named[t], "data_offsets": [at, at + size]}
        at += size
      text = json.dumps(header).encode()
      text += b" " * (-len(text) % 8)
      with open(folder / name / file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
          out.seek(8 + len(text) + header[t]["data_offsets"][0])
          out.write(np.full(512, i + 1, ml_dtypes.bfloat16).tobytes())
        out.truncate(8 + len(text) + at)
      total += at
    index = {"metadata": {"total_size": total}, "weight_map": table_of}
    (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(
  command: Sequence[str], *, env: Mapping[str, str] | None = None, during: Any = None
) -> dict[str, float]:
  """Run a command and account for it.

  Args:
    command: program and arguments.
    env: further environment variables.
    during: called about ten times a second meanwhile.

  Returns:
    "wall", "cpu" (user and system) in seconds; "anonymous", "file", "peak" in megabytes.

  Raises:
    RuntimeError: if it fails.
  """
  start = time.perf_counter()
  with tempfile.TemporaryFile() as log:
    child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})})
    peaks = {"anonymous": 0.0, "file": 0.0, "peak": 0.0}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(child.pid, peaks, done))
    watcher.start()
    while True:
      pid, status, usage = os.wait4(child.pid, os.WNOHANG)
      if pid:
        break
      if during is not None:
        during()
      time.sleep(0.02 if during is None else 0.1)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    if child.returncode:
      log.seek(0)
      raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
  return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, **peaks}


def main(argv: list[str]) -> None:
  """Measure, print a table, and write the figures.

  Args:
    argv: no positional arguments.
  """
  del argv
  values = flags.FLAGS
  folder = pathlib.Path(values.scratch or tempfile.mkdtemp(prefix="bench_merge"))
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  if values.sparse:
    rows.append({"what": f"linear, {values.sparse:g}B", **_sparse(folder, values.sparse)})
  else:
    make(folder)
    rows += _dense(folder, values.mergekit, values.methods, values.repeats)
    rows += _scaling(folder, values.donors, values.repeats)
  out = table.Table(box=None)
  columns = ("what", "wall", "cpu", "anonymous", "file", "peak")
  units = ("", " s", " s", " MB", " MB", " MB")
  for name in columns:
    out.add_column(name, justify="left" if name == "what" else "right")
  for r in rows:
    cells = [f"{r[c]:.1f}{u}" for c, u in zip(columns[1:], units[1:], strict=True)]
    out.add_row(r["what"], *cells)
  console.Console(width=110).print(out)
  _ratios({r["what"]: r for r in rows})
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(rows, indent=1) + "\n")


def _dense(
  folder: pathlib.Path, mergekit: str | None, methods: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
  rows = []
  _warm(folder)
  rows.append(_best("cp", ["cp", "-r", str(folder / "a"), str(folder / "out")], folder, repeats))
  for method in methods:
    config = _config(folder, method)
    ours = [_program(), "merge", str(config)]
    ours.append(f"--out={folder / 'out'}")
    with tempfile.TemporaryDirectory() as cache:
      env = {"XDG_CACHE_HOME": cache}
      rows.append(_best(f"{method}, treesurgeon, first", ours, folder, 1, env))
      rows.append(_best(f"{method}, treesurgeon", ours, folder, repeats, env))
    if mergekit:
      theirs = [mergekit, str(config), str(folder / "out"), "--out-shard-size", "200M"]
      rows.append(_best(f"{method}, mergekit", theirs, folder, 1))
  return rows


def _scaling(folder: pathlib.Path, counts: Sequence[str], repeats: int) -> list[dict[str, Any]]:
  """Average 2, 4, 8 models: the experts under as many names as it takes."""
  rows = []
  for count in map(int, counts):
    models = []
    for i in range(count):
      link = folder / f"donor{i}"
      if not link.exists():
        link.symlink_to(folder / NAMES[1 + i % 3], target_is_directory=True)
      models.append({"model": str(link), "parameters": {"weight": 1.0}})
    path = folder / f"linear_{count}.yml"
    path.write_text(
      yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
    )
    command = [_program(), "merge", str(path), f"--out={folder / 'out'}"]
    rows.append(_best(f"linear, {count} donors", command, folder, repeats))
  return rows


def _best(
  what: str,
  command: Sequence[str],
  folder: pathlib.Path,
  repeats: int,
  env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Take the run with the least processor time; the output is removed each time."""
  found = []
  for _ in range(repeats):
    shutil.rmtree(folder / "out", ignore_errors=True)
    found.append(measure(command, env=env))
    shutil.rmtree(folder / "out", ignore_errors=True)
  best = min(found, key=lambda r: r["cpu"])
  print(f"{what}: {best}", flush=True)
  return {"what": what, **best}


def _sparse(folder: pathlib.Path, billions: float) -> dict[str, float]:
  make_sparse(folder / "sparse", billions)
  out = folder / "sparse" / "out"
  shutil.rmtree(out, ignore_errors=True)
  config = _config(folder / "sparse", "linear")
  command = [_program(), "merge", str(config)]
  command += [f"--out={out}", "--max_shard_bytes=1000000000"]
  dug: set[pathlib.Path] = set()

  def dig() -> None:
    # The disk need not hold what is all zeros. The file at work is left alone.
    for path in (folder / "sparse").glob("*out*/*shard-*.safetensors"):
      if path not in dug:
        dug.add(path)
        subprocess.run(["fallocate", "--dig-holes", str(path)], check=False, capture_output=True)

  found = measure(command, during=dig)
  shutil.rmtree(out)
  return found


def _program() -> str:
  """Return the console script of this very environment."""
  return str(pathlib.Path(sys.executable).with_name("treesurgeon"))


def _config(folder: pathlib.Path, method: str) -> pathlib.Path:
  models = [
    {"model": str(folder / n), "parameters": {"weight": w, "density": 0.2}}
    for n, w in zip(NAMES[1:], (0.5, 0.3, 0.2), strict=True)
  ]
  config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
  if method == "linear":
    for m in models:
      del m["parameters"]["density"]
  else:
    config["base_model"] = str(folder / "base")
  path = folder / f"{method}.yml"
  path.write_text(yaml.safe_dump(config))
  return path


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> None:
  for method, target in TARGETS.items():
    ours = rows.get(f"{method}, treesurgeon")
    theirs = rows.get(f"{method}, mergekit")
    if ours and theirs:
      first = rows[f"{method}, treesurgeon, first"]
      times = [theirs[k] / r[k] for k in ("cpu", "wall") for r in (ours, first)]
      print(
        f"{method}: {times[0]:.1f}x less CPU time than mergekit (target {target}), {times[1]:.1f}x "
        f"the first time; {times[2]:.1f}x and {times[3]:.1f}x less wall time; anonymous memory "
        f"{ours['anonymous']:.0f} MB (target 500)"
      )
    if ours and "cp" in rows:
      print(f"{method}: {ours['wall'] / rows['cp']['wall']:.1f}x the time of cp")


def _warm(folder: pathlib.Path) -> None:
  for name in NAMES:
    with open(folder / name / "model.safetensors", "rb") as file:
      while file.read(1 << 24):
        pass


def _describe(folder: pathlib.Path, layers: int, width: int, hidden: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
    "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": width // 64,
    "num_key_value_heads": width // 64, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 2048,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config, indent=1))


def _save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  st.save_file(dict(tensors), path)


def _watch(pid: int, peaks: dict[str, float], done: threading.Event) -> None:
  """Sample a process' resident memory, anonymous and file-backed apart."""
  while not done.wait(0.02):
    try:
      lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
      return
    found = {k: float(v.split()[0]) / 1e3 for k, v in (x.split(":", 1) for x in lines if "kB" in x)}
    for key, field in (("anonymous", "RssAnon"), ("file", "RssFile"), ("peak", "VmHWM")):
      peaks[key] = max(peaks[key], found.get(field, 0.0))


if __name__ == "__main__":
  flags.DEFINE_string("scratch", None, "Where to keep the checkpoints; default: a new folder.")
  flags.DEFINE_string("mergekit", None, "Path of mergekit-yaml, in an environment of its own.")
  flags.DEFINE_list("methods", ["linear", "ties"], "Which merges.")
  flags.DEFINE_list("donors", [], "Numbers of models to average.")
  flags.DEFINE_integer("repeats", 3, "Runs of each command but mergekit's.", 1)
  flags.DEFINE_float("sparse", 0, "Billions of parameters of a sparse merge instead.")
  flags.DEFINE_string("json", None, "Where to write the figures.")
  app.run(main)
