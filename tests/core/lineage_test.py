# SPDX-License-Identifier: Apache-2.0
"""Lineage survives JSON and refuses what it does not know."""

import hashlib
import json

import pytest

from treesurgeon.core import lineage


def test_json_round_trip():
  record = lineage.Record(
    "merge.linear(weights=(0.5, 0.5))",
    arguments={"weights": [0.5, 0.5]},
    seed=3,
    index=1,
    driver="stream",
    inputs={"base": "00ff"},
    versions=lineage.versions(),
    notes={"layers": [2, 4]},
  )
  text = json.dumps(lineage.to_json((record,)))
  assert lineage.from_json(json.loads(text)) == (record,)


def test_an_unknown_field_is_named():
  with pytest.raises(ValueError, match="unknown field 'colour'; known: .*'expression'"):
    lineage.from_json([{"expression": "x()", "colour": 1}])


def test_digest(tmp_path):
  file = tmp_path / "weights"
  file.write_bytes(b"abc")
  assert lineage.digest(file) == hashlib.sha256(b"abc").hexdigest()
