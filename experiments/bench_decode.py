# SPDX-License-Identifier: Apache-2.0
"""Decoding with low-bit weights and caches: measured here, and planned for large models on TPUs.

python -P -m treesurgeon.experiments.bench_decode --measure --json=FILE
python -P -m treesurgeon.experiments.bench_decode --plan --target=tpu-v5e,tpu-v6e --json=FILE
python -P -m treesurgeon.experiments.bench_decode --report=FILE

`--measure` draws a decoder at random, for the time does not depend on the weights, and decodes
greedily on the device that is there: tokens a second of one sequence, from the difference of two
lengths, the least of three times each, and the bytes of weights and cache. Weights are arranged by
`kernels.prepare` first.

`--plan` measures nothing. One chip's share of a Llama of 7 or 70 billion parameters on eight chips
is the model with an eighth of its heads, feed-forward width and vocabulary. The TPU's compiler
compiles the decode step of that share, layers stacked and the cache donated, which says whether
weights, cache and temporaries fit the memory; and it counts the cycles of each product
(`kernels/static_cost.py`). Two rates follow: the roofline, all bytes of weights and cache over the
bandwidth, and the sum of the products' predicted times and the cache's transfer. The sums over
chips after attention and feed-forward, norms and sampling are in neither.
"""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich import console, table

from treesurgeon import kernels, models, registry
from treesurgeon.core import leaves, model
from treesurgeon.experiments import bench_kernels
from treesurgeon.kernels import devices, static_cost
from treesurgeon.models import generation

CHIPS = 8
# A width of weights, and of the cache; None is bfloat16.
FORMATS: dict[str, tuple[int | None, int | None]] = {
  "bf16": (None, None),
  "int8": (8, None),
  "int4": (4, None),
  "int2": (2, None),
  "int4, 2-bit cache": (4, 2),
}


class Llama(NamedTuple):
  """The sizes of a Llama with a vocabulary of 32,000."""

  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  d_ff: int

  def spec(self, chips: int) -> models.Spec:
    """Return the architecture of one chip's share."""
    return models.Spec(
      vocab_size=32000 // chips, d_model=self.d_model, num_layers=self.num_layers,
      num_heads=self.num_heads // chips, num_kv_heads=self.num_kv_heads // chips,
      head_dim=self.d_model // self.num_heads, d_ff=self.d_ff // chips,
    )  # fmt: skip

  def layer_shapes(self, chips: int) -> list[tuple[int, int]]:
    """List the shapes of a layer's kernels on one chip: q, k, v, o, gate, up, down."""
    d, wide, one = self.d_model, self.d_ff // chips, self.d_model // self.num_heads
    heads, kv = self.num_heads // chips * one, self.num_kv_heads // chips * one
    return [(d, heads), (d, kv), (d, kv), (heads, d), (d, wide), (d, wide), (wide, d)]


LLAMAS = {
  "llama-7b": Llama(4096, 32, 32, 32, 11008),
  "llama-70b": Llama(8192, 80, 64, 8, 28672),
}
SMALL = models.Spec(
  vocab_size=8192, d_model=1024, num_layers=12, num_heads=8, num_kv_heads=4, d_ff=2816
)


def weights(spec: models.Spec, bits: int | None, key: jax.Array, target: str | None = None) -> Any:
  """Draw a model's parameters, quantized in groups of 128 and arranged for a device.

  Args:
    spec: the architecture.
    bits: of the kernels inside the layers; None is bfloat16.
    key: random key.
    target: name from `devices.DEVICES`, or None for the device of this process.

  Returns:
    Parameters.
  """
  params = models.init(spec, key, dtype=jnp.bfloat16)
  if bits is None:
    return params
  # Applied without a driver, which looks at values: here there may be none.
  (quantize,) = registry.parse(f"compress.quantize.rtn(bits={bits}, group_size=128)")
  small = quantize.apply(model.Model(spec, params), {}, key)
  return kernels.prepare(small.params, target=target)


def measure(spec: models.Spec, format: str, context: int, new: int) -> dict[str, Any]:
  """Time greedy decoding of one sequence.

  Args:
    spec: the architecture.
    format: name from `FORMATS`.
    context: tokens of the prompt.
    new: tokens whose time is taken.

  Returns:
    A JSON row.
  """
  bits, cache_bits = FORMATS[format]
  params = weights(spec, bits, jax.random.key(0))
  prompt = np.ones((1, context), np.int32)

  def seconds(n: int) -> float:
    run = lambda: models.generate(
      spec, params, prompt, max_new_tokens=n, cache_bits=cache_bits
    ).block_until_ready()
    run()
    took = []
    for _ in range(3):
      start = time.perf_counter()
      run()
      took.append(time.perf_counter() - start)
    return min(took)

  one = (seconds(new + 8) - seconds(8)) / new
  cache = jax.eval_shape(
    lambda p: generation.init_cache(spec, p, 1, context + new + 8, bits=cache_bits), params
  )
  return {
    "format": format, "device": jax.devices()[0].device_kind, "context": context,
    "tokens_per_s": 1 / one, "weight_bytes": held(params), "cache_bytes": held(cache),
    "source": "measured",
  }  # fmt: skip


def held(tree: Any) -> int:
  """Count the bytes of a tree, packed integers as they are packed."""
  return sum(leaves.nbytes(a) for a in jax.tree.leaves(tree))


def shapes(
  name: str, format: str, batch: int, context: int, target: str
) -> tuple[models.Spec, Any, Any]:
  """Return the share's architecture, and its parameters and cache as shapes: nothing is drawn."""
  spec, (bits, cache_bits) = LLAMAS[name].spec(CHIPS), FORMATS[format]
  params = jax.eval_shape(lambda key: weights(spec, bits, key, target), jax.random.key(0))
  cache = jax.eval_shape(
    lambda p: generation.init_cache(spec, p, batch, context, bits=cache_bits), params
  )
  return spec, params, cache


def decode_step(
  name: str, format: str, batch: int, context: int, target: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe the decode step of one chip's share, for `static_cost`.

  Args:
    name: from `LLAMAS`.
    format: name from `FORMATS`.
    batch: sequences.
    context: tokens that the cache holds.
    target: name from `devices.DEVICES`.

  Returns:
    (function, arguments); the first argument is the cache.
  """
  spec, params, cache = shapes(name, format, batch, context, target)

  def step(cache: Any, params: Any, tokens: jax.Array, start: jax.Array) -> Any:
    logits, cache = generation.extend(spec, params, tokens, cache, start)
    return cache, logits[:, 0].argmax(axis=-1).astype(jnp.int32)

  tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  return step, (cache, params, tokens, jax.ShapeDtypeStruct((), jnp.int32))


def plan(target: str, names: list[str], batch: int, context: int) -> list[dict[str, Any]]:
  """Compile decode steps for a device, and their products one by one.

  Args:
    target: name from `devices.DEVICES`.
    names: models.
    batch: sequences.
    context: tokens that the cache holds.

  Returns:
    JSON rows, one a model and format.
  """
  device = devices.find(target)
  cases = [(name, format) for name in names for format in FORMATS]
  options = {"batch": batch, "context": context, "target": target}
  programs = [
    static_cost.Request(
      "treesurgeon.experiments.bench_decode:decode_step",
      {"name": name, "format": format, **options}, target, donate=(0,),
    )
    for name, format in cases
  ]  # fmt: skip
  found = static_cost.measure(programs, profile=False)
  times = product_times(target, names, batch)
  rows = []
  for (name, format), whole in zip(cases, found, strict=True):
    spec, params, cache = shapes(name, format, **options)
    read, cached = held(params), held(cache)
    # A token's embedding is looked up, not read whole.
    read -= held(params["embed"]["tokens"]) * (not spec.tied)
    least = (read + cached) / device.bandwidth
    kind = f"int{FORMATS[format][0]}" if FORMATS[format][0] else "bf16"
    shape_times = [times[kind, *shape] for shape in LLAMAS[name].layer_shapes(CHIPS)]
    products = LLAMAS[name].num_layers * math.fsum(shape_times)
    products += times["bf16", spec.d_model, spec.vocab_size]
    row = {
      "target": target, "model": name, "chips": CHIPS, "format": format, "batch": batch,
      "context": context, "weight_bytes": held(params), "cache_bytes": cached,
      "temp_bytes": whole.temp_bytes, "memory": device.memory,
      "fits": not whole.error and held(params) + cached + whole.temp_bytes <= device.memory,
      "roofline_tokens_per_s": batch / least * 1e6,
      "predicted_tokens_per_s": batch / (products + cached / device.bandwidth) * 1e6,
      "error": whole.error, "source": "static",
    }  # fmt: skip
    rows.append(row)
  return rows


def product_times(target: str, names: list[str], batch: int) -> dict[tuple[str, int, int], float]:
  """Predict the microseconds of every product of some models' shares.

  Args:
    target: name from `devices.DEVICES`.
    names: models.
    batch: tokens of a product.

  Returns:
    (format of the kernel, rows, columns) to microseconds.
  """
  formats = [f"int{bits}" for bits in (8, 4, 2)]
  wanted: dict[tuple[int, int, int], list[str]] = {}
  for name in names:
    wanted |= {(batch, *shape): formats for shape in LLAMAS[name].layer_shapes(CHIPS)}
    wanted.setdefault((batch, LLAMAS[name].d_model, 32000 // CHIPS), [])
  rows = bench_kernels.measure(target, wanted)
  return {(r["format"], r["k"], r["n"]): r["predicted_us"] for r in rows}


def show(rows: list[dict[str, Any]]) -> table.Table:
  """Lay rows out for a terminal."""
  grid = table.Table(title="Decoding")
  names = [n for n in rows[0] if n not in ("error", "source", "memory", "chips")]
  for name in names:
    grid.add_column(name.replace("_", " "), justify="right")
  for row in rows:
    grid.add_row(*(_text(name, row[name]) for name in names))
  return grid


def report(rows: list[dict[str, Any]]) -> str:
  """Write rows as a Markdown table.

  Args:
    rows: of one kind, as `measure` or `plan` returned them.

  Returns:
    The table.
  """
  names = [n for n in rows[0] if n not in ("error", "source", "memory", "chips")]
  lines = [[n.replace("_", " ") for n in names], ["-"] * len(names)]
  lines += [[_text(n, row[n]) for n in names] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(name: str, value: Any) -> str:
  if name.endswith("bytes"):
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
  if isinstance(value, bool):
    return "yes" if value else "no"
  return f"{value:,.{0 if value > 100 else 1}f}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> None:
  """Measure, or plan, as the flags say.

  Args:
    argv: no positional arguments.
  """
  values = flags.FLAGS
  if len(argv) > 1 or bool(values.measure) + bool(values.plan) + bool(values.report) != 1:
    raise app.UsageError("give one of --measure, --plan and --report, and no positional argument")
  if values.report:
    print(report(json.loads(pathlib.Path(values.report).read_text())))
    return
  rows: list[dict[str, Any]] = []
  if values.measure:
    rows += [measure(SMALL, f, values.context, values.new) for f in FORMATS]
  for target in values.target if values.plan else ():
    rows += plan(target, values.model, values.batch, values.context)
  console.Console(width=200).print(show(rows))
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  flags.DEFINE_bool("measure", False, "Decode on the device that is there.")
  flags.DEFINE_bool("plan", False, "Compile large models' decode steps for TPUs.")
  flags.DEFINE_string("report", None, "File of rows to print as Markdown.")
  flags.DEFINE_list("target", ["tpu-v5e", "tpu-v5p", "tpu-v6e"], "Devices to plan for.")
  flags.DEFINE_multi_enum("model", list(LLAMAS), list(LLAMAS), "Models to plan for.")
  flags.DEFINE_integer("batch", 8, "Sequences to plan for.", 1)
  flags.DEFINE_integer("context", 1024, "Tokens that the cache holds.", 1)
  flags.DEFINE_integer("new", 64, "Tokens to time.", 1)
  flags.DEFINE_string("json", None, "File to write the rows to.")
  app.run(main)
