# SPDX-License-Identifier: Apache-2.0
"""The method that CONTRIBUTING.md adds in five steps works as printed, under every law."""

import doctest
import functools
import importlib
import importlib.util
import pathlib
import re
import sys
import textwrap

import pytest

from treesurgeon import registry
from treesurgeon.compress import prune
from treesurgeon.core import step
from treesurgeon.registry import prune as family

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "compress.prune.random"
METHOD = "lib/compress/prune/random.py"
ENTRY = "lib/registry/prune.py"
ORACLE = "tests/compress/prune/random_test.py"
CONTRACT = ROOT / "tests" / "contract_test.py"
# A file's name on a line of its own, and what belongs into it.
BLOCK = re.compile(r"^ *`([\w/.]+)`:\n\n *```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@functools.cache
def blocks():
  """Returns the printed code by the file it goes into."""
  text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  return {m[1]: textwrap.dedent(m[2]) for m in BLOCK.finditer(text)}


def load(path):
  """Imports a file by its path."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def method(tmp_path_factory):
  """Adds the printed method to its package and the registry, as steps 1 to 3 do."""
  folder = tmp_path_factory.mktemp("method")
  (folder / "random.py").write_text(blocks()[METHOD])
  ((name, entry),) = eval(f"{{{blocks()[ENTRY]}}}", vars(family)).items()
  assert name == NAME
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prune, "__path__", [*prune.__path__, str(folder)])
    patch.setitem(registry.TABLE, name, entry)
    importlib.invalidate_caches()
    yield importlib.import_module(f"treesurgeon.{NAME}")
    del sys.modules[f"treesurgeon.{NAME}"], prune.random


@pytest.fixture(scope="module")
def suite(method):
  """Adds the printed row to the contract suite, as step 4 does."""
  del method
  module = load(CONTRACT)
  (row,) = eval(f"[{blocks()['tests/contract_table.py']}]", vars(module.table))
  assert row.name == NAME
  module.ALL.append(row)
  return module


def test_the_files_are_where_the_steps_say():
  assert list(blocks()) == [METHOD, ENTRY, "tests/contract_table.py", ORACLE]
  assert not (ROOT / METHOD).exists(), "the example is in the library now; print another"


def test_the_registry_reads_it(method):
  (one,) = registry.parse(f"{NAME}(sparsity=0.25)")
  assert step.spell((one,)) == f"{NAME}(sparsity=0.25)"
  assert registry.load(NAME) is method.random
  assert registry.TABLE[NAME].oracle == ORACLE
  assert registry.summary(NAME).endswith(".")


def test_its_examples_run(method):
  runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
  for function in (method.prune, method.random):
    runner.run(parser.get_doctest(function.__doc__, vars(method), function.__name__, None, None))
  assert runner.summarize(verbose=False) == (0, 3)


def test_its_tests_pass(method, tmp_path):
  del method
  (tmp_path / "random_test.py").write_text(blocks()[ORACLE])
  module = load(tmp_path / "random_test.py")
  found = [test for name, test in vars(module).items() if name.startswith("test_")]
  assert len(found) == 2
  for test in found:
    test()


@pytest.mark.parametrize("law", re.findall(r"^@every_row\ndef (\w+)", CONTRACT.read_text(), re.M))
def test_it_obeys(suite, law):
  getattr(suite, law)(suite.ALL[-1])
