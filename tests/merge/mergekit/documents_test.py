# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from treesurgeon.merge.mergekit import config, documents


def named(name, *models):
  found = {"merge_method": "linear", "models": [{"model": m} for m in models]}
  return config.parse(found | ({"name": name} if name else {}))


def test_merges_are_ordered_by_what_they_refer_to():
  last, x, y = named(None, "x", "y+lora"), named("x", "y", "a"), named("y", "a")
  assert documents.order([last, x, y]) == (y, x, last)
  assert documents.order([y, x]) == (y, x)  # without an unnamed one the last is the output


@pytest.mark.parametrize(
  ("merges", "message"),
  [
    ([], "the file holds no merge"),
    ([named("x", "a"), named("x", "b")], "two merges named 'x'"),
    ([named(None, "a"), named(None, "b")], "two merges without a name"),
    ([named("x", "y"), named("y", "x")], "in a circle: y -> x -> y"),
    ([named("x", "a"), named(None, "b")], "the merge 'x' is not used"),
  ],
)
def test_merges_that_cannot_be_ordered(merges, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    documents.order(merges)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"- a\n", "the configuration must be a mapping, not ['a']"),
    (b"a: [", "is not YAML"),
    (b"\xff\xfe\xff", "is not YAML"),
    (b"merge_method: 1", "m.yml: merge_method=1 must be"),
    (b"!!python/object/apply:os.system [ls]", "is not YAML"),
    (b"", "holds no merge"),
  ],
)
def test_bad_files_are_named(tmp_path, content, message):
  path = tmp_path / "m.yml"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(message)):
    documents.read(path)
  with pytest.raises(ValueError, match="is not a file; expected a mergekit YAML configuration"):
    documents.read(tmp_path)
