# SPDX-License-Identifier: Apache-2.0
"""Tables, the Pareto figure and the verdicts of the quantization study."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from treesurgeon.evaluate import bootstrap

Cell = Mapping[str, Any]
Cells = Mapping[str, Cell]
plt.switch_backend("agg")
FLOOR = 1e-3
HEAD: tuple[str, ...] = (
  "", "bits a weight", "kernels, kB", "perplexity [95 %]", "over the original, nats [95 %]",
  "KL, nats", "kernel error", "seconds", "peak MB",
)  # fmt: skip


def write(
  workdir: pathlib.Path, results: Sequence[Cell], config: Mapping[str, Any]
) -> pathlib.Path:
  """Write `report.md` and `pareto.png`.

  Args:
    workdir: where to.
    results: the cells.
    config: the study's config.

  Returns:
    The report.
  """
  text = ["# Quantization study\n"]
  by_model = {
    m: {c["label"]: c for c in results if c["model"] == m} for m in {c["model"]: 0 for c in results}
  }
  for model, cells in by_model.items():
    text.append(f"## {model}\n\n{edit_table(cells) if model == 'facts' else table(cells)}")
  rows = [["direction", "network", "difference [95 %]", "verdict"]]
  for name, model, terms, metric in config["claims"]:
    found = claim(by_model.get(model, {}), terms, metric)
    rows.append([name, model, found[0], found[1]])
  text.append(f"## Directions\n\n{markdown(rows)}")
  figure = pareto({m: c for m, c in by_model.items() if m in config["figure"]})
  figure.savefig(workdir / "pareto.png", dpi=130, bbox_inches="tight")
  plt.close(figure)
  path = workdir / "report.md"
  path.write_text("\n\n".join(text) + "\n")
  return path


def table(cells: Cells) -> str:
  """Tabulate a network's cells, "original" first.

  Args:
    cells: label to cell.

  Returns:
    Markdown.
  """
  original = cells["original"]
  rows: list[list[str]] = [list(HEAD)]
  for label, c in sorted(cells.items(), key=lambda x: x[1] is not original):
    if "failed" in c:
      rows.append([label, "failed: " + c["failed"].splitlines()[0][:80], *[""] * (len(HEAD) - 2)])
      continue
    value, low, high = c["perplexity"]
    errors = list(c.get("errors", {}).values())
    gap = ""
    if c is not original:
      found = bootstrap.paired_difference(c["documents"], original["documents"])
      gap = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    rows.append(
      [label, f"{c['bits']:.2f}", f"{c['kernels'] / 1e3:.0f}",
       f"{value:.2f} [{low:.2f}, {high:.2f}]", gap, f"{c['kl']:.4f}",
       f"{np.mean(errors):.5f}" if errors else "", f"{c['seconds']:.1f}",
       f"{c['megabytes']:.0f}"]
    )  # fmt: skip
  return markdown(rows)


def edit_table(cells: Cells) -> str:
  """Tabulate what became of the edits.

  Args:
    cells: label to cell.

  Returns:
    Markdown.
  """
  names = {"ES": "edited", "PS": "paraphrases", "NS": "neighbours", "world": "all other facts"}
  rows = [["", *names.values()]]
  for label, c in cells.items():
    failed = c.get("failed")
    rows.append([label, *(f"{c['scores'][n]:.2f}" if not failed else failed for n in names)])
  return markdown(rows)


def claim(cells: Cells, terms: Sequence[Sequence[Any]], metric: str) -> tuple[str, str]:
  """Test what a paper says.

  Args:
    cells: label to cell.
    terms: (coefficient, label), whose sum is below zero where it holds; "error" takes two.
    metric: "nll", bootstrapped over documents, or "error", the mean over kernels of the logarithm
      of the first error over the second, bootstrapped over kernels.

  Returns:
    (difference, verdict): "reproduced" or "not reproduced" where the interval leaves zero out,
    "undecided" where it does not, "not run" where a cell is missing.

  Example:
    >>> a, b = {"documents": [(1.0, 1)] * 9}, {"documents": [(2.0, 1)] * 9}
    >>> claim({"a": a, "b": b}, [(1, "a"), (-1, "b")], "nll")
    ('-1.0000 [-1.0000, -1.0000]', 'reproduced')
  """
  found = [cells.get(label, {}) for _, label in terms]
  key = "documents" if metric == "nll" else "errors"
  if not all(c.get(key) for c in found):
    return "", "not run"
  if metric == "nll":
    pairs = [
      (sum(k * c["documents"][i][0] for (k, _), c in zip(terms, found, strict=True)), n)
      for i, (_, n) in enumerate(found[0]["documents"])
    ]
  else:
    first, second = (c["errors"] for c in found)
    pairs = [(math.log(max(first[a], 1e-30) / max(second[a], 1e-30)), 1) for a in first]
  x = bootstrap.interval(pairs)
  verdict = "reproduced" if x.high < 0 else "not reproduced" if x.low > 0 else "undecided"
  return f"{x.value:+.4f} [{x.low:+.4f}, {x.high:+.4f}]", verdict


def pareto(by_model: Mapping[str, Cells]) -> Any:
  """Plot what is lost against bytes; what nothing of its size or smaller beats is named.

  Args:
    by_model: network to its cells; merged ones are of another network and left out.

  Returns:
    A figure.
  """
  figure, axes = plt.subplots(
    1, max(1, len(by_model)), figsize=(9 * max(1, len(by_model)), 8), squeeze=False
  )
  colors = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
  methods = list(dict.fromkeys(c["method"] for cells in by_model.values() for c in cells.values()))
  for ax, (model, cells) in zip(axes[0], by_model.items(), strict=False):
    base = math.log(cells["original"]["perplexity"][0])
    found = [
      (c["kernels"] / 1e3, max(FLOOR, math.log(c["perplexity"][0]) - base), c["label"], c["method"])
      for c in cells.values()
      if "perplexity" in c and c["method"] not in ("original", "merged")
    ]
    for i, name in enumerate(methods):
      points = [(k, x) for k, x, _, m in found if m == name]
      if points:
        ax.plot(*zip(*points, strict=True), marker="os^vD"[i // 10 % 5], ls="none", ms=6,
                label=name, color=colors[2 * i % 20 + i // 10 % 2])  # fmt: skip
    best = front([(k, x, label) for k, x, label, _ in found])
    ax.plot([k for k, _, _ in best], [x for _, x, _ in best], color="#888", lw=0.8, zorder=0)
    for k, x, label in best:
      ax.annotate(label, (k, x), fontsize=7, rotation=28, xytext=(4, 4), textcoords="offset points")
    ax.set(xscale="log", yscale="log", title=model)
    ax.set_xlabel("kernels inside the layers, kB: scales, masks and tables included")
    ax.set_ylabel(f"loss over the original, nats; at {FLOOR} also what is less")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1))
  return figure


def front(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
  """Pick the points than which none is both smaller and better.

  Args:
    points: (bytes, loss, label).

  Returns:
    They, smallest first.

  Example:
    >>> front([(1, 9, "a"), (2, 5, "b"), (3, 6, "c")])
    [(1, 9, 'a'), (2, 5, 'b')]
  """
  out: list[tuple[float, float, str]] = []
  for point in sorted(points):
    if not out or point[1] < out[-1][1]:
      out.append(point)
  return out


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Lay rows out, the first as the head.

  Args:
    rows: cells.

  Returns:
    A table.

  Example:
    >>> print(markdown([["a", "b"], ["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
  """
  head, *body = rows
  lines = [head, ["---"] * len(head), *body]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
