# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md is what the registry says today, and each of its links leads somewhere."""

import pathlib
import re

import pytest

from treesurgeon import registry
from treesurgeon.experiments import ledger

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "methods.md"


def test_the_ledger_is_current():
  assert FILE.read_text(encoding="utf-8") == ledger.render(), "out of date; run: make docs"


def test_the_readme_is_current():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert readme == ledger.with_families(readme), "out of date; run: make docs"


def test_a_readme_without_marks_is_refused():
  with pytest.raises(ValueError, match="README.md lacks the marks"):
    ledger.with_families("# nothing")


def test_procedures_are_where_they_are_said_to_be():
  for p in registry.PROCEDURES.values():
    assert (ROOT / p.file).is_file(), p.file
    assert (ROOT / p.oracle).is_file(), p.oracle


def test_its_links_lead_to_files():
  links = [x for x in re.findall(r"\]\(([^)]+)\)", ledger.render()) if "://" not in x]
  assert links
  assert not [x for x in links if not (FILE.parent / x).exists()]
