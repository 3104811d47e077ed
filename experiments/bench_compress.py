# SPDX-License-Identifier: Apache-2.0
"""Measure whole compression commands against llm-compressor's and GPTQModel's.

python -P -m treesurgeon.experiments.bench_compress \
  --llmcompressor=.venv-llmcompressor-3.11/bin/python --gptqmodel=.venv-peers-3.11/bin/python

A Llama of 97 million weights (width 768, 12 layers, vocabulary 8,192), random and with gains of its
norms as uneven as trained ones, is made once, and calibrated with text of the Python library. GPTQ
is as each tool has it by default, which is an order by activity for all of them, and once with rows
in turn ("inturn"). Every
command is a process of its own that loads, calibrates, compresses and saves; its time is user plus
system time. Our command runs twice, first where nothing is compiled ("first"), then as it does from
then on, its programs in the user's cache. One evaluator judges both results, on the calibration
data and the original model's activations: "kernels" is the sum over kernels of ||X(W - Q)||² / ||X
W||², "blocks" the sum over layers of the change in what a block adds to its input, which also
compares methods that move scales between layers. "rtn, streamed" is read and written leaf by leaf,
against a copy of the file, from the disk and from memory.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import app, flags
from rich import console, table

from treesurgeon import io, models, registry
from treesurgeon.core import allocator, leaves
from treesurgeon.core import model as model_lib
from treesurgeon.experiments import bench_core, bench_merge
from treesurgeon.io import cache, export
from treesurgeon.run import collect, drivers, statistics
from treesurgeon.train import corpus

# Case -> our transform, which error counts, and the most it and the time may be of the peer's.
CASES = {
  "gptq4": ("compress.quantize.gptq(bits=4, group_size=128)", "kernels", 1.0),
  "gptq3": ("compress.quantize.gptq(bits=3, group_size=128)", "kernels", 1.0),
  "gptq4inturn": (
    "compress.quantize.gptq(bits=4, group_size=128, act_order=False)",
    "kernels",
    1.0,
  ),
  "awq": ("compress.quantize.awq(bits=4, group_size=128, symmetric=True)", "blocks", 1.02),
  "sparsegpt": ("compress.prune.sparsegpt(sparsity=0.5)", "kernels", 1.02),
}
TIME = 0.5
SCRIPTS = pathlib.Path(__file__).parents[1] / "tests" / "peers"


def make(folder: pathlib.Path, rows: int, length: int) -> None:
  """Write the model, a tokenizer, and the calibration tokens, unless they are there.

  Args:
    folder: where to.
    rows: calibration sequences.
    length: tokens a sequence.
  """
  spec = dataclasses.replace(bench_core.spec_of(100), family="llama")
  if not (folder / "model" / "model.safetensors").is_file():
    params = models.init(spec, jax.random.key(0))
    rng = np.random.default_rng(0)

    def uneven(path: Any, x: jax.Array) -> jax.Array:
      if path[-1].key != "scale":
        return x
      gains = np.exp(0.5 * rng.standard_normal(x.shape)) * np.where(
        rng.random(x.shape) < 0.01, 8, 1
      )
      return jnp.asarray(gains, x.dtype)

    params = jax.tree_util.tree_map_with_path(uneven, params)
    export.to_hf(model_lib.Model(spec, params), folder / "model", overwrite=True)
  tokens = folder / f"tokens_{rows}x{length}.npy"
  if not tokens.is_file():
    text = "\n".join(d.text for d in corpus.load(domains=["prose"]))
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=spec.vocab_size, show_progress=False)
    coder.train_from_iterator([text], trainer)

    ids = np.asarray(coder.encode(text).ids, np.int32)
    cut = ids[: len(ids) // length * length].reshape(-1, length)
    np.save(tokens, cut[np.linspace(0, len(cut) - 1, rows).astype(int)])


def ours(expression: str, model: str, tokens: str, out: str) -> None:
  """Load, compress, save: the command that is measured.

  Args:
    expression: the transform.
    model: directory of the model.
    tokens: file of calibration tokens.
    out: directory to write; beside it, "work.json" tells the seconds of compilation.
  """
  spent = {"compile": 0.0, "programs": 0}

  def listen(event: str, duration_secs: float, **rest: Any) -> None:
    del rest
    if event.startswith("/jax/core/compile/") and event.endswith("duration"):
      spent["compile"] += duration_secs
      spent["programs"] += "backend_compile" in event

  cache.keep_programs()
  allocator.keep_pages()
  jax.monitoring.register_event_duration_secs_listener(listen)
  rows = np.load(tokens)
  batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
  transform = registry.parse(expression)
  materials = collect.Materials(batches=batches)
  made = drivers.run_blockwise(transform, io.load(model), materials)
  io.save(made, out, overwrite=True)
  pathlib.Path(out).with_name("work.json").write_text(json.dumps(spent))


def errors(
  original: model_lib.Model, made: model_lib.Model, tokens: np.ndarray, moments: dict[str, Any]
) -> dict[str, float]:
  """Compare a compressed model with the original, layer by layer on the original's activations.

  Args:
    original: the model.
    made: what was made of it.
    tokens: calibration sequences.
    moments: second moments of the original's inputs, by address; filled when empty.

  Returns:
    "kernels" and "blocks", see above.
  """
  kernels = [a for a in original.addresses() if a.startswith("layers/") and a.endswith("kernel")]
  if not moments:
    want = {("second_moment", a): ["h"] for a in kernels}
    batches = [tokens[i : i + 8] for i in range(0, len(tokens), 8)]
    found = statistics.tap_statistics(original, want, batches)
    moments.update({a: np.asarray(s.moment, np.float64) for (_, a), s in found.items()})
  total = 0.0
  for a in kernels:
    w = np.asarray(original.leaf(a), np.float64)
    wrong = np.asarray(leaves.dense(made.leaf(a)), np.float64) - w
    total += float(((moments[a] @ wrong) * wrong).sum() / ((moments[a] @ w) * w).sum())
  return {"kernels": total, "blocks": _blocks(original, made, tokens[:: max(1, len(tokens) // 8)])}


def _blocks(original: model_lib.Model, made: model_lib.Model, tokens: np.ndarray) -> float:
  spec = original.spec

  @jax.jit
  def through(one: Any, other: Any, h: jax.Array, layer: jax.Array) -> tuple:
    out, _ = models.block(spec, one, h, layer=layer)
    changed, _ = models.block(spec, other, h, layer=layer)
    return out, ((changed - out) ** 2).sum() / ((out - h) ** 2).sum()

  def layer(m: model_lib.Model, i: int) -> Any:
    names = [a for a in m.addresses() if a.startswith(f"layers/{i}/")]
    return _nest({a.split("/", 2)[2]: leaves.dense(m.leaf(a)) for a in names})

  h, total = models.embed(spec, original.params, tokens), 0.0
  for i in range(spec.num_layers):
    h, share = through(layer(original, i), layer(made, i), h, jnp.int32(i))
    total += float(share)
  return total


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, x in flat.items():
    *path, last = name.split("/")
    tree = out
    for part in path:
      tree = tree.setdefault(part, {})
    tree[last] = x
  return out


def race(
  folder: pathlib.Path, case: str, peers: dict[str, str], tokens: pathlib.Path, repeats: int
) -> list[dict[str, Any]]:
  """Measure one case for everyone.

  Args:
    folder: holds the model; results are put there and removed.
    case: a name of `CASES`.
    peers: name to interpreter.
    tokens: file of calibration tokens.
    repeats: later runs of our command; the one of least processor time counts.

  Returns:
    One row for each.
  """
  expression = CASES[case][0]
  original, rows = io.load(folder / "model"), np.load(tokens)
  out, plain = folder / "out", folder / "plain"
  found = []
  moments: dict[str, Any] = {}
  command = [sys.executable, "-P", "-m", "treesurgeon.experiments.bench_compress"]
  command += [f"--work={expression}", f"--scratch={folder}", f"--tokens={tokens}"]
  kept = folder / "cache"
  shutil.rmtree(kept, ignore_errors=True)
  runs = []
  for _ in range(1 + repeats):
    used = bench_merge.measure(command, env={"XDG_CACHE_HOME": str(kept)})
    runs.append({**used, **json.loads((folder / "work.json").read_text())})
  wrong = errors(original, io.load(out), rows, moments)
  found.append({"case": case, "who": "treesurgeon, first", **runs[0], **wrong})
  _show(found[-1])
  best = min(runs[1:], key=lambda r: r["cpu"])
  found.append({"case": case, "who": "treesurgeon", **best, **wrong})
  _show(found[-1])
  for who, python in peers.items():
    if who == "GPTQModel" and not case.startswith("gptq"):
      continue
    shutil.rmtree(out, ignore_errors=True)
    script = [python, str(SCRIPTS / f"{who.lower().replace('-', '')}_oneshot.py")]
    files = [str(folder / "model"), str(tokens), str(out)]
    used = bench_merge.measure([*script, case, *files])
    made = out
    if who == "llm-compressor":
      bench_merge.measure([*script, "dense", str(out), str(plain)])
      made = plain
    found.append(
      {"case": case, "who": who, **used, **errors(original, io.load(made), rows, moments)}
    )
    _show(found[-1])
    shutil.rmtree(plain, ignore_errors=True)
  shutil.rmtree(out, ignore_errors=True)
  return found


def stream(folder: pathlib.Path, repeats: int) -> None:
  """Print how fast rounding to nearest streams a checkpoint of 3.4 GB, against copying it.

  Args:
    folder: where to put the checkpoint and the results, which are removed.
    repeats: runs of each.
  """
  source = folder / "large"
  if not (source / "model.safetensors").is_file():
    spec = dataclasses.replace(
      bench_core.spec_of(100), family="llama", vocab_size=32000, d_model=1024, num_layers=96,
      num_heads=16, num_kv_heads=16, head_dim=64, rope_dim=64, d_ff=4096,
    )  # fmt: skip
    params = models.init(spec, jax.random.key(0), jnp.bfloat16)
    export.to_hf(model_lib.Model(spec, params), source, overwrite=True)
  program = str(pathlib.Path(sys.executable).with_name("treesurgeon"))
  commands = {
    "cp": ["sh", "-c", f"cp -r {source} {folder / 'out'} && sync {folder}/out/*"],
    "rtn, streamed": [
      program, "apply", f"--model={source}", f"--out={folder / 'out'}",
      "--transform=compress.quantize.rtn(bits=4, group_size=128)",
    ],
  }  # fmt: skip
  for where in ("disk", "memory"):
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(repeats):
      for name, command in commands.items():  # in turn, for the disk is not always as fast
        shutil.rmtree(folder / "out", ignore_errors=True)
        if where == "disk":
          _forget(source / "model.safetensors")
        runs[name].append(bench_merge.measure(command))
    shutil.rmtree(folder / "out", ignore_errors=True)
    middle = {n: sorted(found, key=lambda r: r["wall"])[repeats // 2] for n, found in runs.items()}
    for name, found in middle.items():
      _show({"case": name, **found, "walls": [round(r["wall"], 2) for r in runs[name]]})
    share = middle["cp"]["wall"] / middle["rtn, streamed"]["wall"]
    print(f"rtn, from {where}: {share:.2f}x the speed of copying, by medians (target 0.5)")


def _forget(file: pathlib.Path) -> None:
  """Drop a file's pages from memory, as those of a checkpoint larger than memory are."""
  with file.open("rb") as f:
    os.fsync(f.fileno())
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _show(row: dict[str, Any]) -> None:
  print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def main(argv: list[str]) -> None:
  """Measure everything, print a table, and write the figures.

  Args:
    argv: no positional arguments.
  """
  del argv
  values = flags.FLAGS
  folder = pathlib.Path(values.scratch or tempfile.mkdtemp(prefix="bench_compress"))
  folder.mkdir(parents=True, exist_ok=True)
  if values.work:
    ours(values.work, str(folder / "model"), values.tokens, str(folder / "out"))
    return
  make(folder, values.rows, values.length)
  tokens = folder / f"tokens_{values.rows}x{values.length}.npy"
  peers = {"llm-compressor": values.llmcompressor, "GPTQModel": values.gptqmodel}
  peers = {who: python for who, python in peers.items() if python}
  found: list[dict[str, Any]] = []
  for case in values.cases:
    found += race(folder, case, peers, tokens, values.repeats)
  if values.stream:
    stream(folder, values.repeats)
  out = table.Table(box=None)
  columns = ("case", "who", "cpu", "wall", "compile", "peak", "kernels", "blocks")
  for name in columns:
    out.add_column(name, justify="left" if name in ("case", "who") else "right")
  for r in found:
    units = {"cpu": " s", "wall": " s", "compile": " s", "peak": " MB"}
    text = [f"{r[c]:.1f}{units[c]}" if c in r else "" for c in columns[2:6]]
    out.add_row(r["case"], r["who"], *text, f"{r['kernels']:.5f}", f"{r['blocks']:.5f}")
  console.Console(width=110).print(out)
  for case, (_, kind, most) in CASES.items():
    mine = next((r for r in found if (r["case"], r["who"]) == (case, "treesurgeon")), None)
    for r in found:
      if mine and r["case"] == case and not r["who"].startswith("treesurgeon"):
        print(
          f"{case}: {mine['cpu'] / r['cpu']:.2f}x the time of {r['who']} (target {TIME}), "
          f"{mine[kind] / r[kind]:.4f}x its error in {kind} (target {most})"
        )
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(found, indent=1) + "\n")
  if not values.scratch:
    shutil.rmtree(folder)


if __name__ == "__main__":
  flags.DEFINE_string("scratch", None, "Where to put models; default: a temporary folder.")
  flags.DEFINE_string("llmcompressor", None, "Python of an environment with llm-compressor.")
  flags.DEFINE_string("gptqmodel", None, "Python of an environment with GPTQModel.")
  flags.DEFINE_list("cases", list(CASES), "Which cases.")
  flags.DEFINE_integer("rows", 128, "Calibration sequences.", 1)
  flags.DEFINE_integer("length", 256, "Tokens a calibration sequence.", 1)
  flags.DEFINE_integer("repeats", 1, "Later runs of each of our commands.", 1)
  flags.DEFINE_bool("stream", True, "Measure rounding of a streamed checkpoint too.")
  flags.DEFINE_string("json", None, "Where to write the figures.")
  flags.DEFINE_string("work", None, "Internal: the transform this process applies.")
  flags.DEFINE_string("tokens", None, "Internal: the calibration tokens of this process.")
  app.run(main)
