# SPDX-License-Identifier: Apache-2.0
"""Merge models as a mergekit configuration says.

  treesurgeon merge MERGEKIT.yml --out=DIR

The models are streamed: memory is bounded by the largest tensor, not by the models.
"""

from absl import flags

from treesurgeon.cli import apply, main
from treesurgeon.io import checkpoint, staging
from treesurgeon.merge import mergekit
from treesurgeon.run import casting, collect


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  apply.define_output(values)


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Read the configuration and merge.

  Args:
    values: parsed flags.
    args: the configuration file.
  """
  if len(args) != 1:
    raise ValueError(f"merge takes one mergekit configuration file, not {len(args)} arguments")
  main.required(values, "out")
  staging.check_output(values.out, values.overwrite)
  plan = mergekit.read(args[0])
  donors = [n for one in plan.transform for n in one.info["arguments"]["models"]]
  sources = {name: checkpoint.Checkpoint(name) for name in (plan.base, *donors)}
  digests = {name: source.digest() for name, source in sources.items()}
  materials = collect.Materials(
    open_model=lambda name: casting.Cast(sources[name], plan.dtype),
    digests={
      "base": digests[plan.base],
      **{f"donor {i}": digests[n] for i, n in enumerate(donors)},
    },
  )
  apply.execute(
    values,
    plan.transform,
    sources[plan.base],
    materials,
    dtype=plan.dtype,
    out_dtype=plan.out_dtype,
  )
