# SPDX-License-Identifier: Apache-2.0
"""Split Python source into what runs and what is read."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Sequence
from typing import Any

MIN_PROSE = 40  # characters; shorter docstrings and comments are labels, not sentences
Note = tuple[int, int, str]  # row from 1, column in bytes, text of a comment
Doc = tuple[Any, bool]  # expression statement of a docstring; whether its body holds nothing else


def separate(source: str) -> tuple[str, str]:
  r"""Split Python source into what runs and what is read.

  Args:
    source: a module that parses.

  Returns:
    (code, prose). The code lacks comments and docstrings, and a body of a docstring alone became
    `...`. The prose is docstrings and comment blocks, in file order, with blank lines
    between, or "" if there are none of any length.

  Raises:
    SyntaxError: if the source is no Python.

  Example:
    >>> separate('def f():\n  "Say in a whole sentence what a caller gets."\n  return 1  # !\n')
    ('def f():\n  return 1\n', 'Say in a whole sentence what a caller gets.\n')
  """
  # Form feeds are legal and mean nothing; they would upset the count of columns.
  source = source.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "")
  lines = [line + b"\n" for line in source.encode().split(b"\n")]  # ast counts in bytes
  notes, docs = _comments(source, lines), _docstrings(ast.parse(source))
  return _code(lines, notes, docs), _prose(lines, notes, docs)


def _code(lines: list[bytes], notes: list[Note], docs: list[Doc]) -> str:
  lines = list(lines)
  cuts = [(row, column, row, column + len(text.encode()), b"") for row, column, text in notes]
  for node, alone in docs:
    assert node.end_lineno is not None and node.end_col_offset is not None
    end = (node.end_lineno, node.end_col_offset)
    cuts.append((node.lineno, node.col_offset, *end, b"..." if alone else b""))
  for r0, c0, r1, c1, filler in sorted(cuts, reverse=True):
    before, after = lines[r0 - 1][:c0], lines[r1 - 1][c1:]
    if not filler and not after.strip():
      before, after = before.rstrip(), b"\n"
    whole = before + filler + after
    lines[r0 - 1 : r1] = [whole if whole.strip() else b""] + [b""] * (r1 - r0)
  text = b"".join(lines).decode()
  return re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text).strip("\n") + "\n"


def _prose(lines: list[bytes], notes: list[Note], docs: list[Doc]) -> str:
  found = [(node.lineno, inspect.cleandoc(node.value.value)) for node, _ in docs]
  run: list[str] = []
  last = 0
  for row, column, text in notes:
    if lines[row - 1][:column].strip():
      continue  # beside code, a comment is rarely a sentence
    if row != last + 1:
      found.append((last, "\n".join(run)))
      run = []
    run.append(re.sub(r"^#+[!:]? ?", "", text).rstrip())
    last = row
  found.append((last, "\n".join(run)))
  texts = [text.strip("\n") for _, text in sorted(found) if _english(text)]
  return "\n\n".join(texts) + "\n" if texts else ""


def _docstrings(tree: ast.Module) -> list[Doc]:
  """List docstring nodes in file order, each with whether its body holds nothing else."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      first = node.body[0] if node.body else None
      if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        if isinstance(first.value.value, str):
          found.append((first, len(node.body) == 1 and not isinstance(node, ast.Module)))
  return sorted(found, key=lambda f: f[0].lineno)


def _comments(source: str, lines: Sequence[bytes]) -> list[Note]:
  """List comments as (row from 1, column in bytes, text)."""
  out = []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      row, column = token.start
      out.append((row, len(lines[row - 1].decode()[:column].encode()), token.string))
  return out


def _english(text: str) -> bool:
  """Tell sentences from rules, tables and commented-out code."""
  letters = sum(c.isalpha() or c.isspace() for c in text)
  return len(text) >= MIN_PROSE and letters >= 0.8 * len(text)
