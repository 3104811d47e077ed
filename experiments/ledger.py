# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md, the ledger of methods, from the registry.

python -P -m treesurgeon.experiments.ledger            writes docs/methods.md
python -P -m treesurgeon.experiments.ledger --check    fails if it is out of date
"""

import difflib
import pathlib
import sys

from absl import app, flags

from treesurgeon import registry

HEAD = """# Methods

Generated from `lib/registry.py` by `make docs`; do not edit.

*Verdict*: **reproduced** means that the paper's direction shows on a small real model, against the
baseline it claims to beat, by the command in the last column. **exact only** means that the
algorithm is checked against an oracle, and no experiment has been run. **not reproduced** is a
result too.

| method | what it does | paper | file | oracle | verdict | shown by |
|---|---|---|---|---|---|---|
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
  return HEAD + "\n".join(rows) + "\n" + MODELS + "\n".join(_models()) + "\n"


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
  path, new = pathlib.Path(flags.FLAGS.file), render()
  old = path.read_text() if path.exists() else ""
  if not flags.FLAGS.check:
    path.parent.mkdir(exist_ok=True)
    path.write_text(new)
  elif old != new:
    lines = old.splitlines(), new.splitlines()
    diff = difflib.unified_diff(*lines, fromfile="committed", tofile="current", lineterm="")
    print("\n".join(diff), file=sys.stderr)
    sys.exit(f"{path} is out of date; run: make docs")


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "Fail if the file is not current; write nothing.")
  flags.DEFINE_string("file", "docs/methods.md", "The ledger.")
  app.run(main)
