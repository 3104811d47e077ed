# SPDX-License-Identifier: Apache-2.0
"""Show a model's tree: address, shape, type, bits and bytes, and its lineage.

treesurgeon inspect --model=DIR
treesurgeon inspect --model=DIR --diff=OTHER
"""

from absl import flags
from rich import console, table

from treesurgeon.cli import main
from treesurgeon.core import paths
from treesurgeon.io import checkpoint
from treesurgeon.run import describe


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  flags.DEFINE_string("model", None, "Model directory.", flag_values=values)
  flags.DEFINE_string("diff", None, "Another model directory to compare with.", flag_values=values)


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Print the tree or the differences.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"inspect takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "model")
  if values.diff:
    _diff(checkpoint.Checkpoint(values.model), checkpoint.Checkpoint(values.diff))
    return
  source = checkpoint.Checkpoint(values.model)
  # Headers tell it all: no weight is read.
  screen = show(paths.unflatten({a: source.struct(a) for a in source.addresses()}))
  for record in source.lineage:
    screen.print(f"lineage: {record.expression}  (driver {record.driver}, seed {record.seed})")


def show(params: paths.Params) -> console.Console:
  """Print a tree: address, shape, type, bits and bytes.

  Args:
    params: nested parameters, or their shapes.

  Returns:
    The console it was printed on.
  """
  out = table.Table(box=None, pad_edge=False)
  for name, justify in (
    ("address", "left"), ("shape", "right"), ("type", "left"), ("bits", "right"), ("bytes", "right")
  ):  # fmt: skip
    out.add_column(name, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
  found = describe.rows(params)
  for row in found:
    shape = " x ".join(map(str, row.shape))
    out.add_row(row.address, shape, row.kind, f"{row.bits:.2f}", f"{row.nbytes:,}")
  size, nbytes = describe.total(found)
  out.add_row("total", f"{size:,}", "", f"{nbytes * 8 / max(1, size):.2f}", f"{nbytes:,}")
  screen = _console()
  screen.print(out)
  return screen


def _diff(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> None:
  out = table.Table(box=None, pad_edge=False)
  for name in ("address", "relative change", "note"):
    out.add_column(name, overflow="fold")
  equal = 0
  for d in describe.differences(a, b):
    if d.note == "equal":
      equal += 1
    else:
      out.add_row(d.address, "" if d.relative is None else f"{d.relative:.3g}", d.note)
  screen = _console()
  if out.row_count:
    screen.print(out)
  screen.print(f"{equal} leaves equal, {out.row_count} different")


def _console() -> console.Console:
  """Return a console that does not cut tables when the output is a pipe."""
  screen = console.Console()
  return screen if screen.is_terminal else console.Console(width=160)
