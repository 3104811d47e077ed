# SPDX-License-Identifier: Apache-2.0
"""Write a model in another tool's format.

  treesurgeon export --model=DIR --format=compressed-tensors --out=DIR

hf: every leaf dense, a directory that transformers loads. compressed-tensors, gptq, gptq_v2, awq:
the quantized layers as vLLM and transformers read them, codes bit for bit, one leaf at a time;
what a format cannot hold is refused, with what would fit. mlx: the same for mlx-lm. gguf: one file
for ggml, vocabulary included, symmetric 4- and 8-bit layers code for code. orbax: a checkpoint for
JAX trainers. peft: the low-rank adapters alone.

Quantize first, `treesurgeon apply --transform='compress.quantize.gptq(bits=4)'`, symmetric (the
default) where transformers is to load the result: its version 5.23 reads asymmetric
compressed-tensors only with CompressedTensorsConfig(dequantize=True).
"""

from absl import flags

from treesurgeon.adapt import adapters, peft
from treesurgeon.cli import apply, main
from treesurgeon.core import model as model_lib
from treesurgeon.io import checkpoint, export, gguf, layouts, loading, orbax, staging

FORMATS = ("hf", *layouts.NAMES, "gguf", "orbax", "peft")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  apply.define_output(values)
  flags.DEFINE_string("model", None, "Model directory to read.", flag_values=values)
  flags.DEFINE_enum(
    "format", "hf", FORMATS,
    "What to write: dense (hf), quantized for vLLM and transformers (compressed-tensors, gptq, "
    "gptq_v2, awq), MLX (mlx) or ggml (gguf), for JAX trainers (orbax), or the adapters alone "
    "(peft).",
    flag_values=values,
  )  # fmt: skip


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Read and write.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"export takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "model", "out")
  staging.check_output(values.out, values.overwrite)
  if values.format in (*layouts.NAMES, "gguf"):
    _quantized(values)
    return
  model = loading.load(values.model)
  if values.format == "hf":
    export.to_hf(
      model, values.out, max_shard_bytes=values.max_shard_bytes, tokenizer_from=values.model,
      overwrite=values.overwrite,
    )  # fmt: skip
  elif values.format == "orbax":
    orbax.save(model, values.out, overwrite=values.overwrite)
  else:
    _peft(model, values.out, overwrite=values.overwrite, source=values.model)
  print(f"wrote {values.out}")


def _quantized(values: flags.FlagValues) -> None:
  source = checkpoint.Checkpoint(values.model)
  shared = {
    "overwrite": values.overwrite, "tokenizer_from": values.model, "records": source.lineage,
  }  # fmt: skip
  if values.format == "gguf":
    report = gguf.save(source, values.out, **shared)
  else:
    report = export.to_layout(
      source, values.out, layout=values.format, max_shard_bytes=values.max_shard_bytes, **shared
    )
  print(report)


def _peft(model: model_lib.Model, out: str, *, overwrite: bool, source: str) -> None:
  found = adapters.extract(model)
  if not found:
    raise ValueError(f"--model={source} has no adapters; apply adapt.lora() and train first")
  peft.save(out, found, model.spec, base_model=source, overwrite=overwrite)
