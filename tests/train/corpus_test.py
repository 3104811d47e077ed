# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import json
import pathlib
import zlib

import pytest

from treesurgeon.io import cache
from treesurgeon.train import corpus, source

MODULE = '''# A header comment that is long enough to count as English prose,
# on two lines.
"""Say what the module is for, in more than forty characters."""
import os  # trailing


class Empty:
    """Hold nothing at all, which is enough to be worth saying here."""


def f(x):
    """Return x.\n\n    The second paragraph says it again, with é in it."""  # and why
    s = "# no comment"
    return x


x = """not a docstring"""
'''


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_library(root: pathlib.Path, names) -> None:
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODULE + f"name = {name!r}\n" + "value = 1\n" * 30, "utf-8")


def test_code_keeps_what_runs():
  code, prose = source.separate(MODULE)
  want, got = ast.parse(MODULE), ast.parse(code)
  for node in ast.walk(want):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
      node.body = node.body[1:] or [ast.Expr(ast.Constant(...))]
  assert ast.dump(got) == ast.dump(want)
  assert "docstring" in code and "# no comment" in code and "trailing" not in code
  assert "header" not in code and "Hold nothing" not in code
  assert prose == (
    "A header comment that is long enough to count as English prose,\non two lines.\n\n"
    "Say what the module is for, in more than forty characters.\n\n"
    "Hold nothing at all, which is enough to be worth saying here.\n\n"
    "Return x.\n\nThe second paragraph says it again, with é in it.\n"
  )


@pytest.mark.parametrize("module", [ast, inspect, json.decoder, pathlib])
def test_code_of_real_modules_parses(module):
  code, prose = source.separate(pathlib.Path(module.__file__).read_text("utf-8"))
  ast.parse(code)
  assert prose


def test_old_line_endings_and_form_feeds():
  assert source.separate("x = 1\r\n\f\r\n# c\r\ny = 2\r\n")[0] == "x = 1\n\ny = 2\n"


def test_domains_share_a_files_split_and_splits_are_disjoint(tmp_path):
  write_library(tmp_path / "lib", [f"m{i}.py" for i in range(40)])
  documents = corpus.load(root=tmp_path / "lib", validation=0.3)
  by_path = {}
  for d in documents:
    by_path.setdefault(d.path, set()).add(d.split)
    assert d.split == corpus.split_of(d.path, validation=0.3)
  assert len(by_path) == 40
  assert all(len(splits) == 1 for splits in by_path.values())
  held = corpus.load(root=tmp_path / "lib", validation=0.3, split="validation")
  train = corpus.load(root=tmp_path / "lib", validation=0.3, split="train")
  assert len(held) + len(train) == len(documents) == 80
  assert {d.path for d in held}.isdisjoint(d.path for d in train)
  assert 8 <= len(held) <= 40


def test_split_is_of_the_path_alone(tmp_path):
  names = [f"m{i}.py" for i in range(20)]
  write_library(tmp_path / "a", names)
  write_library(tmp_path / "b", [*names[::2], "z/new.py"])
  a = {d.path: d.split for d in corpus.load(root=tmp_path / "a")}
  b = {d.path: d.split for d in corpus.load(root=tmp_path / "b")}
  assert all(a[p] == b[p] for p in set(a) & set(b))
  want = "validation" if zlib.crc32(b"m3.py") < 0.1 * 2**32 else "train"
  assert a["m3.py"] == want


def test_order_and_digest_are_deterministic(tmp_path):
  root = tmp_path / "lib"
  write_library(root, ["b.py", "a.py", "c/d.py"])
  first = corpus.load(root=root)
  assert [d.path for d in first if d.domain == "code"] == ["a.py", "b.py", "c/d.py"]
  corpus._read.cache_clear()
  assert corpus.load(root=root) == first  # through the cache on disk
  before = corpus.digest(first)
  (root / "a.py").write_text("y = 5  # five\n" * 60)
  corpus._read.cache_clear()
  assert corpus.digest(corpus.load(root=root)) != before


def test_leaves_out_packages_tests_and_what_does_not_parse(tmp_path):
  root = tmp_path / "lib"
  write_library(root, [
    "a.py", "site-packages/b.py", "test/c.py", "x/tests/d.py", "encodings/e.py",
    "_sysconfigdata__linux.py", "sitecustomize.py",
  ])  # fmt: skip
  (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1") * 30)
  (root / "python2.py").write_text("print 'x'\n" * 60)
  assert {d.path for d in corpus.load(root=root)} == {"a.py"}


def test_topics_become_prose(tmp_path):
  root = tmp_path / "lib"
  (root / "pydoc_data").mkdir(parents=True)
  (root / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': {'Words. ' * 60!r}}}\n")
  assert [d.path for d in corpus.load(root=root)] == ["pydoc_data/topics/if"]


def test_bad_input_is_named(tmp_path):
  with pytest.raises(ValueError, match="no domain 'poems'; it has code, prose"):
    corpus.load(domains=["poems"])
  with pytest.raises(ValueError, match="no split 'test'"):
    corpus.load(split="test")
  with pytest.raises(ValueError, match="holds no train or validation text"):
    corpus.load(root=tmp_path)


def test_cache_survives_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  assert cache.remember("a.txt", lambda: "made", where=tmp_path / "file") == "made"
  assert cache.folder() == tmp_path / "cache" / "treesurgeon"


def test_write_leaves_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / "a.txt"
  cache.write(path, "old")
  with pytest.raises(UnicodeEncodeError):
    cache.write(path, "\ud800")
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.txt"]
