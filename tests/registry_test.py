# SPDX-License-Identifier: Apache-2.0
"""The parser reads names and literals, nothing else, and every entry of the table is whole."""

import pathlib
import subprocess
import sys

import pytest

from treesurgeon import registry
from treesurgeon.core import step
from treesurgeon.models import hf
from treesurgeon.registry import adapt, distill, edit, grow, low_rank, merge, prune, quantize

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = (adapt, distill, low_rank, prune, quantize, edit, grow, merge)


@pytest.mark.parametrize(
  ("text", "spelling"),
  [
    ("merge.ties()", "merge.ties()"),
    (" merge.ties( density = 0.2 ) ", "merge.ties()"),
    ("merge.ties(weights=[1, 2.5])", "merge.ties(weights=(1, 2.5))"),
    ("merge.ties(models=['a b', \"c'd\"])", "merge.ties(models=('a b', \"c'd\"))"),
    ("merge.linear() + merge.ties(lam=-1.0)", "merge.linear() + merge.ties(lam=-1.0)"),
    ("chain(merge.linear(), chain(grow.g_stack()))", "merge.linear() + grow.g_stack()"),
    ("chain()", "chain()"),
    (
      "by_path([('layers/0/.*', merge.linear()), (r'.*\\d', chain())])",
      "by_path([('layers/0/.*', merge.linear()), ('.*\\\\d', chain())])",
    ),
  ],
)
def test_canonical_spelling(text, spelling):
  transform = registry.parse(text)
  assert step.spell(transform) == spelling
  assert step.spell(registry.parse(spelling)) == spelling


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("merge.tie()", "unknown transform 'merge.tie'; did you mean merge.ties"),
    ("merge.ties", r"'merge.ties' is not a call; write merge.ties\(\)"),
    ("merge.ties(0.5)", "arguments are given by name"),
    ("merge.ties(dens=1)", "merge.ties has no argument 'dens'; it takes models, weights"),
    ("merge.ties(density=1/2)", "density=1 / 2 is not a literal"),
    ("merge.ties(density=open('x'))", "is not a literal"),
    ("merge.ties(**{'density': 1})", r"'\*\*' is not allowed"),
    ("merge.ties(density=0.1", "cannot read the transform"),
    ("", "cannot read the transform"),
    ("merge.linear() * 2", "is not a transform"),
    ("__import__('os').system('ls')", "is not the name of a transform|arguments are given by name"),
    ("by_path([merge.linear()])", r"takes \(regex, transform\) pairs"),
    ("'merge.linear()'", "is not a transform"),
  ],
)
def test_mistakes_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    registry.parse(text)


@pytest.mark.parametrize("name", sorted(registry.TABLE))
def test_entries_are_whole(name):
  entry = registry.TABLE[name]
  assert registry.load(name).__module__ == entry.factory.split(":")[0]
  assert entry.factory.startswith(f"treesurgeon.{name.rsplit('.', 1)[0]}.")
  assert registry.summary(name).endswith(".")
  assert (ROOT / entry.oracle).is_file(), f"{name}: {entry.oracle} does not exist"
  assert entry.paper
  if entry.verdict != "exact only":
    assert entry.command, f"{name}: a verdict needs the command that shows it"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda m: m.__name__)
def test_a_family_holds_its_own_methods(family):
  word = family.__name__.rsplit(".", 1)[1]
  assert list(family.TABLE) == [n for n in registry.TABLE if f".{word}." in f".{n}"]


def test_the_table_is_sorted():
  assert list(registry.TABLE) == sorted(registry.TABLE)


def test_reading_the_table_imports_no_method():
  code = (
    "import sys; from treesurgeon import registry; "
    "sys.exit(any(e.factory.split(':')[0] in sys.modules for e in registry.TABLE.values()))"
  )
  assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_the_architectures_are_those_that_are_read():
  with pytest.raises(ValueError, match="not supported") as raised:
    hf.from_config({"model_type": "no-such"})
  read = set(str(raised.value).split("valid: ")[1].split(", ")) - {"treesurgeon"}
  assert {t for a in registry.ARCHITECTURES.values() for t in a.model_types} == read
