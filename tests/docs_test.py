# SPDX-License-Identifier: Apache-2.0
"""Every module imports under its public name, says what it is for, and its examples run.

`pytest --doctest-modules lib` would import each module a second time as `lib.core...`, with
classes of its own, so the modules are walked on disk and imported by the name that users write.
"""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {
  "treesurgeon": "lib",
  "treesurgeon.kernels": "kernels",
  "treesurgeon.experiments": "experiments",
  "treesurgeon.configs": "configs",
}
# Modules that cannot be imported without an extra, and the import that tells whether it is there.
NEEDS_EXTRA: dict[str, str] = {}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> dict[str, pathlib.Path]:
  """Returns the file of every module, by public name."""
  found = {}
  for package, folder in FOLDERS.items():
    for path in sorted((ROOT / folder).rglob("*.py")):
      words = path.relative_to(ROOT / folder).with_suffix("").parts
      found[".".join([package, *(word for word in words if word != "__init__")])] = path
  return found


class Finder(doctest.DocTestFinder):
  """Finds examples of wrapped functions too.

  The stock finder tells a module's own functions by their globals, and those of a function
  under jit or a run-time type check are the wrapper's, so that its examples would go unrun.
  """

  def _from_module(self, module, object):
    if isinstance(object, types.ModuleType):
      return False
    return getattr(object, "__module__", None) == module.__name__

  def _find_lineno(self, obj, source_lines):
    return super()._find_lineno(inspect.unwrap(obj) if callable(obj) else obj, source_lines)


def examples_in(source: str) -> int:
  """Counts the examples that the docstrings of a source file hold."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  docs = (
    ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
  )
  return sum(len(doctest.DocTestParser().get_examples(doc)) for doc in docs if doc)


def undocumented(source: str) -> list[str]:
  """Lists the public functions and classes, methods included, that lack a docstring."""
  missing = []

  def visit(body, prefix):
    for node in body:
      if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
        continue
      overload = any(ast.unparse(mark).endswith("overload") for mark in node.decorator_list)
      if not overload and not ast.get_docstring(node):
        missing.append(f"{prefix}{node.name} (line {node.lineno})")
      if isinstance(node, ast.ClassDef):
        visit(node.body, f"{prefix}{node.name}.")

  tree = ast.parse(source)
  if not ast.get_docstring(tree):
    missing.append("the module itself")
  visit(tree.body, "")
  return missing


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
  extra = NEEDS_EXTRA.get(name)
  if extra is not None and importlib.util.find_spec(extra) is None:
    with pytest.raises(ImportError, match=extra):
      importlib.import_module(name)
    return
  module = importlib.import_module(name)
  tests = Finder().find(module, name)
  expected = examples_in(modules()[name].read_text(encoding="utf-8"))
  assert sum(len(test.examples) for test in tests) == expected, (
    "an example stands where doctest does not find it, in a nested function for instance"
  )
  runner = doctest.DocTestRunner(optionflags=FLAGS)
  report: list[str] = []
  for test in tests:
    runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", modules())
def test_public_names_are_documented(name):
  missing = undocumented(modules()[name].read_text(encoding="utf-8"))
  assert not missing, f"{name}: no docstring on " + ", ".join(missing)


def test_extras_name_modules_that_exist():
  assert set(NEEDS_EXTRA) <= set(modules())


def test_finder_sees_wrapped_functions():
  module = importlib.import_module("treesurgeon.core.paths")
  names = [test.name for test in Finder().find(module) if test.examples]
  assert len(names) > 1


def test_counting_and_listing():
  source = (
    'class A:\n  def f(self):\n    """Do.\n\n    >>> 1\n    1\n    """\n  def g(self): pass\n'
  )
  assert examples_in(source) == 1
  assert undocumented(source) == ["the module itself", "A (line 1)", "A.g (line 8)"]
