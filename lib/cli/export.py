# SPDX-License-Identifier: Apache-2.0
"""Write a model in another tool's format.

  treesurgeon export --model=DIR --format=hf --out=DIR

hf: every leaf dense, a directory that transformers loads. orbax: a checkpoint for JAX trainers.
peft: the low-rank adapters alone.
"""

import functools

from absl import flags

from treesurgeon.adapt import adapters, peft
from treesurgeon.cli import apply, main
from treesurgeon.core import model as model_lib
from treesurgeon.io import export, loading, orbax, staging

FORMATS = ("hf", "orbax", "peft")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  apply.define_output(values)
  flags.DEFINE_string("model", None, "Model directory to read.", flag_values=values)
  flags.DEFINE_enum("format", "hf", FORMATS, "What to write.", flag_values=values)


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
  model = loading.load(values.model)
  write = {
    "hf": functools.partial(
      export.to_hf, max_shard_bytes=values.max_shard_bytes, tokenizer_from=values.model
    ),
    "orbax": orbax.save,
    "peft": functools.partial(_peft, source=values.model),
  }[values.format]
  write(model, values.out, overwrite=values.overwrite)
  print(f"wrote {values.out}")


def _peft(model: model_lib.Model, out: str, *, overwrite: bool, source: str) -> None:
  found = adapters.extract(model)
  if not found:
    raise ValueError(f"--model={source} has no adapters; apply adapt.lora() and train first")
  peft.save(out, found, model.spec, base_model=source, overwrite=overwrite)
