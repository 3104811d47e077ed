# SPDX-License-Identifier: Apache-2.0
"""List every transform: its name, what it does, its paper.

treesurgeon list
"""

from absl import flags
from rich import console, table

from treesurgeon import registry


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  flags.DEFINE_bool("names", False, "Print bare names, one a line.", flag_values=values)


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Print the table.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"list takes no argument, not {args[0]!r}")
  if values.names:
    print("\n".join(sorted(registry.TABLE)))
    return
  out = table.Table(box=None, pad_edge=False)
  for column in ("transform", "what it does", "paper"):
    out.add_column(column, overflow="fold")
  for name in sorted(registry.TABLE):
    out.add_row(name, registry.summary(name), registry.TABLE[name].paper)
  for name, recipe in registry.RECIPES.items():
    out.add_row(name, f"{recipe.summary} Stands for {recipe.expression}", recipe.paper)
  console.Console().print(out)
