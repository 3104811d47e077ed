# SPDX-License-Identifier: Apache-2.0
"""Merge models as a mergekit configuration says.

  treesurgeon merge MERGEKIT.yml --out=DIR [--compat=mergekit|paper]

Tensors are streamed under their own names: memory is bounded by the largest, whatever the
architecture. A file of several merges is carried out in order; those that others refer to by name
are kept next to the output until it is complete. An interrupted merge goes on where it was.
"""

import sys

from absl import flags

from treesurgeon import registry
from treesurgeon.cli import apply, main
from treesurgeon.io import staging
from treesurgeon.merge import mergekit
from treesurgeon.run import merging


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  apply.define_output(values)
  flags.DEFINE_enum(
    "compat", "mergekit", mergekit.COMPATS,
    "Whose trimming and rescaling is meant where mergekit and a method's paper differ.",
    flag_values=values,
  )  # fmt: skip


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
  merging.merge(
    mergekit.read(args[0]),
    values.out,
    lookup=registry.load,
    compat=values.compat,
    seed=values.seed,
    overwrite=values.overwrite,
    max_shard_bytes=values.max_shard_bytes,
    tell=lambda note: print(f"treesurgeon: note: {note}", file=sys.stderr),
  )
  print(f"wrote {values.out}")
