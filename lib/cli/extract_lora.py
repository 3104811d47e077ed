# SPDX-License-Identifier: Apache-2.0
"""Extract a LoRA adapter from a fine-tuned model.

  treesurgeon extract-lora --base=DIR --model=DIR --out=DIR --max_rank=32

Writes a peft adapter directory: what the fine-tune changed in each linear weight, cut off after the
largest singular values, and in full what else it changed. One tensor is in memory at a time.
"""

from absl import flags

from treesurgeon.adapt import extract
from treesurgeon.cli import main
from treesurgeon.io import raw, staging

DTYPES = ("float32", "bfloat16", "float16")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  flags.DEFINE_string("base", None, "Directory of the model before training.", flag_values=values)
  flags.DEFINE_string("model", None, "Directory of the fine-tuned model.", flag_values=values)
  flags.DEFINE_string("out", None, "Directory to write; must not exist.", flag_values=values)
  flags.DEFINE_bool("overwrite", False, "Replace --out if it exists.", flag_values=values)
  flags.DEFINE_integer("max_rank", 32, "Largest rank of a module.", 1, flag_values=values)
  flags.DEFINE_float(
    "sv_epsilon", 0.0, "Singular values up to this are cut off too.", 0, flag_values=values
  )
  flags.DEFINE_multi_string(
    "include", [], "Regular expression; only modules that one is found in are extracted.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_multi_string(
    "exclude", [], "Modules that one of these is found in stay as in the base.", flag_values=values
  )
  flags.DEFINE_list(
    "save_modules", [], "Modules to save in full, by name or last part, comma-separated.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of the factors; default: the model's.", flag_values=values
  )


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Read both models and write the adapter.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"extract-lora takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "base", "model", "out")
  staging.check_output(values.out, values.overwrite)
  base, tuned = raw.Directory(values.base), raw.Directory(values.model)
  done = extract.extract(
    base,
    tuned,
    values.out,
    max_rank=values.max_rank,
    include=values.include,
    exclude=values.exclude,
    save_modules=values.save_modules,
    epsilon=values.sv_epsilon,
    dtype=values.dtype,
    base_model=values.base,
    model_type=str(base.config.get("model_type", "")),
    overwrite=values.overwrite,
  )
  print(f"wrote {values.out}: adapters of {len(done.ranks)} modules")
  worst = max(done.errors, key=lambda m: done.errors[m])
  print(f"largest relative error {done.errors[worst]:.3g}, of {worst}")
  for what, names in (
    ("saved in full", done.saved), ("biases saved", done.biases), ("left as in the base", done.left)
  ):  # fmt: skip
    if names:
      print(f"{what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
