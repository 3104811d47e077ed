# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md is what the registry says today, and each of its links leads somewhere."""

import pathlib
import re

from treesurgeon.experiments import ledger

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "methods.md"


def test_the_ledger_is_current():
  assert FILE.read_text(encoding="utf-8") == ledger.render(), "out of date; run: make docs"


def test_its_links_lead_to_files():
  links = [x for x in re.findall(r"\]\(([^)]+)\)", ledger.render()) if "://" not in x]
  assert links
  assert not [x for x in links if not (FILE.parent / x).exists()]
