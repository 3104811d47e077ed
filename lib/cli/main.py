# SPDX-License-Identifier: Apache-2.0
"""Entry point of the `treesurgeon` command.

Mistakes of the user's end with one line on standard error and exit status 2; a defect of ours ends
with a traceback and status 1. `--debug` shows the traceback of the former too.
"""

import difflib
import functools
import gc
import importlib
import os
import pathlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

COMMANDS = ("apply", "merge", "moe", "extract-lora", "evolve", "eval", "inspect", "export", "list")


def main(argv: Sequence[str] | None = None) -> None:
  """Run a subcommand and exit.

  Args:
    argv: arguments after the program's name; None takes the process's.

  Raises:
    SystemExit: always; 0 on success, 2 for a mistake of the user's.
  """
  sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
  """Run a subcommand.

  Args:
    argv: the subcommand and its arguments.

  Returns:
    The exit status.

  Example:
    >>> run(["nonsense"])
    2
  """
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_usage())
    return 0
  command, rest = argv[0], argv[1:]
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
    return _fail(f"unknown command {command!r}; {hint}")
  module = _module(command)
  values = flags.FlagValues()
  flags.DEFINE_bool("debug", False, "Show the traceback of a mistake.", flag_values=values)
  module.define(values, rest)
  if any(a in ("-h", "--help", "-help", "--helpfull") for a in rest):
    print(f"{(module.__doc__ or '').strip()}\n\nFlags:\n{values.main_module_help() or values}")
    return 0
  debug = any(a in ("--debug", "-debug", "--debug=true") for a in rest)
  try:
    positional = _parse(values, command, rest)
    if "jax" in sys.modules:
      importlib.import_module("treesurgeon.io.cache").keep_programs()
      importlib.import_module("treesurgeon.core.allocator").keep_pages()
    with warnings.catch_warnings():
      warnings.showwarning = functools.partial(_warn, warnings.showwarning)
      module.run(values, positional)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    print(f"treesurgeon: {command} was interrupted", file=sys.stderr)
    return 130
  except (flags.Error, ValueError, OSError) as error:
    if debug:
      raise
    return _fail(str(error))
  return 0


def read_text(flag: str, path: str) -> str:
  """Read a UTF-8 file that a flag names.

  Args:
    flag: the flag, for messages.
    path: its value.

  Returns:
    The text.

  Raises:
    ValueError: if it is no file, or not UTF-8.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise ValueError(f"{flag}={path} is not a file")
  try:
    return file.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{flag}={path} is not UTF-8 text: {error}") from error


def required(values: flags.FlagValues, *names: str) -> None:
  """Refuse a missing flag.

  Args:
    values: parsed flags.
    *names: flags that must be given.

  Raises:
    ValueError: naming the first that is missing.
  """
  for name in names:
    if not values[name].value:
      raise ValueError(f"--{name} is required")


def _parse(values: flags.FlagValues, command: str, rest: list[str]) -> list[str]:
  """Parse flags; what a config refuses (an unknown key, a wrong type) is the user's mistake."""
  try:
    return values([f"treesurgeon {command}", *rest])[1:]
  except (KeyError, AttributeError, TypeError) as error:
    raise ValueError(f"--config: {error.args[0] if error.args else error}") from error


def _module(command: str) -> types.ModuleType:
  """Import a command; what that makes lasts, so looking for garbage in it only costs time."""
  name = "list_" if command == "list" else command.replace("-", "_")
  name = f"treesurgeon.cli.{name}"
  if name in sys.modules or not gc.isenabled():
    return importlib.import_module(name)
  gc.disable()
  try:
    return importlib.import_module(name)
  finally:
    gc.freeze()
    gc.enable()


def _warn(
  others: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any
) -> None:
  """Show a warning to the user of a command in one line; those to programmers as they come."""
  if category is UserWarning:
    print(f"treesurgeon: warning: {' '.join(str(message).split())}", file=sys.stderr)
  else:
    others(message, category, *rest)


def _fail(message: str) -> int:
  print(f"treesurgeon: {' '.join(message.split())}", file=sys.stderr)
  return 2


def _usage() -> str:
  lines = ["usage: treesurgeon COMMAND [FLAGS]", ""]
  for command in COMMANDS:
    lines.append(f"  {command:12} {(_module(command).__doc__ or '').strip().splitlines()[0]}")
  lines += ["", "treesurgeon COMMAND --help shows a command's flags."]
  return "\n".join(lines)
