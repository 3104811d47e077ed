# SPDX-License-Identifier: Apache-2.0
"""Build a mixture of experts as a mergekit-moe configuration says.

  treesurgeon moe CONFIG.yml --out=DIR

Mixtral from Llama or Mistral models, Qwen2-MoE with one shared expert, Qwen3-MoE from Qwen3.
Tensors are streamed; with gate_mode hidden the base runs over the prompts, a layer at a time.
"""

import sys

from absl import flags

from treesurgeon.cli import apply, main
from treesurgeon.io import staging
from treesurgeon.merge import moe, moe_config


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  apply.define_output(values)
  flags.DEFINE_bool(
    "allow_same_experts", False, "Take experts that are all one model, to train them afterwards.",
    flag_values=values,
  )  # fmt: skip


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Read the configuration and build.

  Args:
    values: parsed flags.
    args: the configuration file.
  """
  if len(args) != 1:
    raise ValueError(f"moe takes one mergekit-moe configuration file, not {len(args)} arguments")
  main.required(values, "out")
  staging.check_output(values.out, values.overwrite)
  moe.build(
    moe_config.read(args[0], allow_same=values.allow_same_experts),
    values.out,
    seed=values.seed,
    overwrite=values.overwrite,
    max_shard_bytes=values.max_shard_bytes,
    tell=lambda note: print(f"treesurgeon: note: {note}", file=sys.stderr),
  )
  print(f"wrote {values.out}")
