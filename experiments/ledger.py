# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md, the ledger of methods, and the README's table from the registry.

python -P -m treesurgeon.experiments.ledger            writes both
python -P -m treesurgeon.experiments.ledger --check    fails if it is out of date
"""

import difflib
import pathlib
import sys

from absl import app, flags

from treesurgeon import registry

MARKS = ("<!-- methods, written by make docs -->", "<!-- end of methods -->")

HEAD = """# Methods

Generated from `lib/registry` by `make docs`; do not edit.

*Verdict*: **reproduced** means that the paper's direction shows on a small real model, against the
baseline it claims to beat, by the command in the last column. **exact only** means that the
algorithm is checked against an oracle, and no experiment has been run. **not reproduced** is a
result too.

| method | what it does | paper | file | oracle | verdict | shown by |
|---|---|---|---|---|---|---|
"""

PROCEDURES = """
# Studies, measures and converters

These are no transforms, so `--transform` does not take them.

| what | paper | file | oracle | verdict | shown by |
|---|---|---|---|---|---|
"""

MODELS = """
# Architectures

One decoder and one encoder cover these by switches ([lib/models](../lib/models)). For each,
[tests/peers/logits_test.py](../tests/peers/logits_test.py) takes a checkpoint written by
transformers, finds the same logits to 1e-4, and writes the same tensors back, bit for bit, in a
directory that transformers loads: `make test-peers`.

| architecture | model_type | paper | note |
|---|---|---|---|
"""


def render() -> str:
  """Render the ledger.

  Returns:
    Markdown, one row a registered method.

  Example:
    >>> render().startswith("# Methods")
    True
  """
  rows = []
  for name in sorted(registry.TABLE):
    entry = registry.TABLE[name]
    file = entry.factory.split(":")[0].replace("treesurgeon.", "lib/").replace(".", "/") + ".py"
    shown = f"`{entry.command}`" if entry.command else ""
    verdict = f"{entry.verdict}. {entry.note}" if entry.note else entry.verdict
    cells = (
      f"`{name}`", registry.summary(name), entry.paper, f"[{file}](../{file})",
      f"[{entry.oracle}](../{entry.oracle})", verdict, shown,
    )  # fmt: skip
    rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  tables = (HEAD, rows), (PROCEDURES, _procedures()), (MODELS, _models())
  return "".join(head + "\n".join(lines) + "\n" for head, lines in tables)


def families() -> str:
  """Render the README's table: the methods of every family.

  Returns:
    Markdown, between the marks that the README holds.

  Example:
    >>> "`g_stack`" in families()
    True
  """
  found: dict[str, list[str]] = {}
  for name in sorted(registry.TABLE):
    family, _, method = name.partition(".")
    found.setdefault(family, []).append(f"`{method}`")
  rows = [f"| {family} | {', '.join(names)} |" for family, names in found.items()]
  models = ", ".join(registry.ARCHITECTURES)
  head = ["| family | methods |", "|---|---|"]
  return "\n".join([MARKS[0], *head, *rows, f"| models | {models} |", MARKS[1]])


def with_families(readme: str) -> str:
  """Put the current table between the README's marks.

  Args:
    readme: its text.

  Returns:
    The text with the table.

  Raises:
    ValueError: if the marks are not there.
  """
  before, found, rest = readme.partition(MARKS[0])
  _, end, after = rest.partition(MARKS[1])
  if not found or not end:
    raise ValueError(f"README.md lacks the marks {MARKS[0]} and {MARKS[1]}")
  return before + families() + after


def _procedures() -> list[str]:
  rows = []
  for name, p in sorted(registry.PROCEDURES.items()):
    verdict = f"{p.verdict}. {p.note}" if p.note else p.verdict
    shown = f"`{p.command}`" if p.command else ""
    file, oracle = (f"[{x}](../{x})" for x in (p.file, p.oracle))
    rows.append(f"| {name} | {p.paper} | {file} | {oracle} | {verdict} | {shown} |")
  return rows


def _models() -> list[str]:
  rows = []
  for name, a in registry.ARCHITECTURES.items():
    types = ", ".join(f"`{t}`" for t in a.model_types)
    rows.append(f"| {name} | {types} | {a.paper} | {a.note} |")
  return rows


def main(argv: list[str]) -> None:
  """Write or check the ledger.

  Args:
    argv: no positional arguments.
  """
  del argv
  path, readme = pathlib.Path(flags.FLAGS.file), pathlib.Path(flags.FLAGS.readme)
  wanted = {path: render(), readme: with_families(readme.read_text())}
  for file, new in wanted.items():
    old = file.read_text() if file.exists() else ""
    if not flags.FLAGS.check:
      file.parent.mkdir(exist_ok=True)
      file.write_text(new)
    elif old != new:
      lines = old.splitlines(), new.splitlines()
      diff = difflib.unified_diff(*lines, fromfile="committed", tofile="current", lineterm="")
      print("\n".join(diff), file=sys.stderr)
      sys.exit(f"{file} is out of date; run: make docs")


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "Fail if the file is not current; write nothing.")
  flags.DEFINE_string("file", "docs/methods.md", "The ledger.")
  flags.DEFINE_string("readme", "README.md", "Where the table of families stands.")
  app.run(main)
