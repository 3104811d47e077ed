# SPDX-License-Identifier: Apache-2.0
"""The order of the parts: each imports only itself and what stands above it in `ORDER`."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDER = (
  "core",
  "kernels",
  "stats",
  "models",
  "io",
  "grow",
  "compress",
  "merge",
  "edit",
  "adapt",
  "decode",
  "train",
  "evaluate",
  "run",
  "registry",
  "cli",
  "experiments",
  "configs",
)
FOLDERS = ("lib", "kernels", "experiments", "configs")
PEERS = ("mergekit", "peft", "tensorflow", "torch", "transformers")


def sources() -> list[pathlib.Path]:
  return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def part_of(path: pathlib.Path) -> str:
  """Returns the row of `ORDER` that a source file belongs to; "" for the package itself."""
  relative = path.relative_to(ROOT)
  if relative.parts[0] != "lib":
    return relative.parts[0]
  first = relative.parts[1].removesuffix(".py")
  return "" if first == "__init__" else first


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
  """Returns (line, absolute dotted name) of every import, nested ones too.

  `from a import b` yields `a.b`, since b may be a module. A relative import yields its dots.
  """
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
  return found


def complaint(part: str, name: str) -> str | None:
  """Says what is wrong with an import of `name` in a file of `part`, or None."""
  if name.startswith("."):
    return f"relative import {name}; write the full name"
  words = name.split(".")
  if words[0] in PEERS:
    return f"imports {words[0]}, which is an oracle for tests/peers and not a dependency"
  if words[0] in FOLDERS:
    return f"imports {name}; the name is treesurgeon.{name.removeprefix('lib.')}"
  if words[0] != "treesurgeon" or len(words) == 1 or words[1].startswith("__"):
    return None
  if words[1] not in ORDER:
    return f"imports {name}; the parts are {', '.join(ORDER)}"
  if part and ORDER.index(words[1]) > ORDER.index(part):
    return f"{part} imports {name}, which stands below it in the order"
  return None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path):
  part = part_of(path)
  assert part in ("", *ORDER), f"{path.name} is in no known part: add {part!r} to ORDER or move it"
  tree = ast.parse(path.read_text(encoding="utf-8"))
  wrong = [
    f"line {line}: {text}" for line, name in imports_of(tree) if (text := complaint(part, name))
  ]
  assert not wrong, "\n".join([str(path.relative_to(ROOT)), *wrong])


@pytest.mark.parametrize(
  ("part", "line", "message"),
  [
    ("core", "from treesurgeon.models import spec", "stands below"),
    ("kernels", "import treesurgeon.stats", "stands below"),
    ("merge", "def f():\n  from treesurgeon import run", "stands below"),
    ("core", "from . import paths", "relative import"),
    ("core", "from ..core import paths", "relative import"),
    ("models", "import torch.nn", "oracle"),
    ("models", "import lib.core", "the name is treesurgeon.core"),
    ("models", "import treesurgeon.utils", "the parts are core"),
    ("models", "from treesurgeon.core import paths", None),
    ("models", "from treesurgeon.models import spec", None),
    ("core", "from treesurgeon import __version__", None),
  ],
)
def test_the_check_sees_what_it_should(part, line, message):
  ((_, name),) = imports_of(ast.parse(line))
  found = complaint(part, name)
  assert (found is None) if message is None else (message in found)


def flags_defined_on_import(tree: ast.Module) -> list[int]:
  """Returns the lines outside functions and `if __name__ == "__main__":` that define a flag."""
  lines = []
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) or ast.unparse(node).startswith("if __name__ =="):
      continue
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    lines += [c.lineno for c in calls if ".DEFINE_" in f".{ast.unparse(c.func)}"]
  return lines


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_defines_no_flag(path):
  found = flags_defined_on_import(ast.parse(path.read_text(encoding="utf-8")))
  assert not found, f"{path.name} defines flags on import, lines {found}; do it under __main__"


def test_the_check_sees_flags():
  source = 'X = flags.DEFINE_bool("x", 0, "")\nif __name__ == "__main__":\n  flags.DEFINE_bool("y")'
  assert flags_defined_on_import(ast.parse(source)) == [1]


def test_importing_the_package_loads_nothing_else():
  code = "import sys, treesurgeon; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
