# SPDX-License-Identifier: Apache-2.0
"""Render what an experiment did as one self-contained HTML page.

The page answers, for each operation: what it did, what it gained, what it cost, and against which
control. It is built from the stages' `result.json` files alone, so it can be rendered again.
"""

import base64
import html
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich import table as table_lib

from treesurgeon.evaluate import bootstrap

plt.switch_backend("agg")

Result = Mapping[str, Any]
COLORS = ("#2563a8", "#d9722b", "#3d8f5f", "#8f4f9f", "#7a7a7a", "#b03a48")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto;
  padding: 0 1em;
  color: #1d2329; background: #fff; }
h1 { font-size: 1.7em; margin-bottom: .1em; } h2 { margin-top: 2em; font-size: 1.25em;
  border-bottom: 1px solid #d8dde3; padding-bottom: .2em; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .28em .8em; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e8ebef; }
th { font-weight: 600; color: #4a545f; } th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; } .lead { font-size: 1.08em; color: #39424c; }
.finding { background: #f4f7fa; border-left: 4px solid #2563a8; padding: .6em 1em; margin: .8em 0; }
.cost { border-color: #d9722b; }
.even { border-color: #9aa3ad; } img { max-width: 100%; }
pre { background: #f6f7f9; padding: .8em; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
.wide { overflow-x: auto; font-size: 13px; }
.trees { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; } .muted { color: #67717c; }
@media (max-width: 760px) { .wide { overflow-x: auto; font-size: 13px; }
.trees { grid-template-columns: 1fr; } }
"""


def write(
  workdir: str | pathlib.Path, results: Sequence[Result], page: Mapping[str, Any]
) -> pathlib.Path:
  """Write `report.html`.

  Args:
    workdir: where to write it.
    results: the stages' results in order.
    page: "title", "lead", and "sections": a list of mappings with "heading", "text" and
      "kind" ("curves", "table", "histograms", "trees", "edit") with that kind's settings.

  Returns:
    The path of the page.
  """
  by_name = {r["name"]: r for r in results}
  body = [f"<h1>{_t(page['title'])}</h1><p class=lead>{_t(page['lead'])}</p>"]
  for section in page["sections"]:
    body.append(f"<h2>{_t(section['heading'])}</h2>")
    if section.get("text"):
      body.append(f"<p>{_t(section['text'])}</p>")
    body.append(_KINDS[section["kind"]](by_name, section))
  body += [
    "<h2>Every stage</h2>",
    f"<div class=wide>{stage_table(results)}</div>",
    "<h2>Lineage</h2>",
    _lineage(results),
  ]
  path = pathlib.Path(workdir) / "report.html"
  path.write_text(document(page["title"], body))
  return path


def document(title: str, body: Sequence[str]) -> str:
  """Wrap HTML into a self-contained page.

  Args:
    title: of the page.
    body: pieces of HTML.

  Returns:
    The page.

  Example:
    >>> document("a", ["<p>b</p>"]).startswith("<!doctype html>")
    True
  """
  return (
    "<!doctype html><html lang=en><meta charset=utf-8>"
    "<meta name=viewport content='width=device-width, initial-scale=1'>"
    f"<title>{_t(title)}</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"
  )


def stage_table(results: Sequence[Result]) -> str:
  """Render one row a stage: quality on every text, size, time and training cost.

  Args:
    results: the stages' results.

  Returns:
    An HTML table.
  """
  texts = sorted({t for r in results for t in r.get("evaluation", {})})
  head = ["stage", *[f"{t} ppl" for t in texts], *[f"{t} bits/byte" for t in texts],
          "parameters", "size", "bits/weight", "training FLOPs", "seconds"]  # fmt: skip
  rows = []
  for r in results:
    e = r.get("evaluation", {})
    rows.append(
      [
        r["name"],
        *[f"{e[t]['perplexity']:.2f}" if t in e else "" for t in texts],
        *[f"{e[t]['bits_per_byte']:.3f}" if t in e else "" for t in texts],
        f"{r['parameters']:,}" if r.get("parameters") else "",
        size(r["nbytes"]) if r.get("nbytes") else "",
        f"{r['bits_per_weight']:.2f}" if r.get("bits_per_weight") else "",
        f"{r['flops']:.2e}" if r.get("flops") else "",
        f"{r['seconds']:.1f}",
      ]
    )
  return table(head, rows)


def plain(results: Sequence[Result]) -> table_lib.Table:
  """Render the stages as a table for a terminal.

  Args:
    results: the stages' results.

  Returns:
    A rich table: stage, bits per byte on each text, size, seconds.
  """
  texts = sorted({t for r in results for t in r.get("evaluation", {})})
  out = table_lib.Table(box=None)
  for name in ("stage", *[f"{t} bits/byte" for t in texts], "size", "seconds"):
    out.add_column(name, justify="left" if name == "stage" else "right")
  for r in results:
    e = r.get("evaluation", {})
    cells = [f"{e[t]['bits_per_byte']:.3f}" if t in e else "" for t in texts]
    out.add_row(
      r["name"], *cells, size(r["nbytes"]) if "nbytes" in r else "", f"{r['seconds']:.0f}"
    )
  return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int] = ()) -> str:
  """Render a table; in the columns `best` the smallest number is set bold.

  Args:
    head: column names.
    rows: cells.
    best: column indices.

  Returns:
    HTML.

  Example:
    >>> table(["a", "b"], [["x", "2"], ["y", "1"]], best=[1]).count("class=best")
    1
  """
  low = {c: min(float(r[c].split()[0]) for r in rows) for c in best} if rows else {}
  out = ["<table><tr>" + "".join(f"<th>{_t(h)}</th>" for h in head) + "</tr>"]
  for row in rows:
    cells = []
    for c, cell in enumerate(row):
      mark = " class=best" if c in low and float(cell.split()[0]) == low[c] else ""
      cells.append(f"<td{mark}>{_t(cell)}</td>")
    out.append("<tr>" + "".join(cells) + "</tr>")
  return "".join(out) + "</table>"


def size(nbytes: float) -> str:
  """Write a number of bytes for people.

  Args:
    nbytes: bytes.

  Returns:
    Like "1.4 MB".

  Example:
    >>> size(1_400_000)
    '1.4 MB'
  """
  for unit in ("B", "kB", "MB", "GB"):
    if nbytes < 1000:
      return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1000
  return f"{nbytes:.1f} TB"


def _curves(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Plot held-out loss against training compute, every arm from its own beginning."""
  fig, ax = plt.subplots(figsize=(8.6, 3.6))
  ends = []
  for color, (label, stages) in zip(COLORS, section["arms"].items(), strict=False):
    spent, xs, ys = 0.0, [], []
    for name in stages:
      points = np.asarray(results[name].get("curve", []), float).reshape(-1, 2)
      xs += list(spent + points[:, 0])
      ys += list(_smooth(points[:, 1]))
      spent += results[name].get("flops", 0.0)
    ax.plot(xs, ys, color=color, label=label, linewidth=1.6)
    if ys:
      ends.append((ys[-1], label, color, xs[-1]))
  low = min((e[0] for e in ends), default=0.0)
  ax.set_ylim(low * 0.97, low * section.get("zoom", 1.6))
  ax.set_xlabel("training FLOPs, cost of the small model included")
  ax.set_ylabel("training loss, smoothed (nats per token)")
  ax.legend(frameon=False)
  _bare(ax)
  return figure(fig, section["heading"]) + _findings(results, section)


def _table(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Compare stages on every text, with confidence intervals over documents."""
  texts = section["texts"]
  rows = []
  for label, name in section["rows"].items():
    r = results[name]
    row = [label]
    for t in texts:
      e = r["evaluation"][t]
      row.append(f"{e['bits_per_byte']:.3f}  [{e['ci'][0]:.3f}, {e['ci'][1]:.3f}]")
    rows.append([*row, size(r["nbytes"]), f"{r['bits_per_weight']:.2f}"])
  head = ["", *[f"{t}: bits/byte [95 %]" for t in texts], "size", "bits/weight"]
  return table(head, rows, best=range(1, 1 + len(texts))) + _findings(results, section)


def _histograms(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Plot how one kernel's weights are distributed at several stages."""
  names = [n for n in section["stages"] if results[n].get("histogram")]
  fig, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 2.4), sharey=True)
  for ax, name, color in zip(np.atleast_1d(axes), names, COLORS * 3, strict=False):
    h = results[name]["histogram"]
    edges = np.asarray(h["edges"])
    ax.bar(edges[:-1], h["counts"], np.diff(edges), align="edge", color=color)
    ax.set_title(name, fontsize=10)
    ax.set_yscale("log")
    _bare(ax)
  fig.supxlabel(f"weights of {results[names[0]]['histogram']['address']}", fontsize=10)
  return figure(fig, section["heading"])


def _trees(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Show the tree of addresses before and after, side by side."""
  panes = []
  for name in section["stages"]:
    lines = [
      f"{r['address']:<28}{' x '.join(map(str, r['shape'])):>12}  {r['kind']}"
      for r in results[name]["tree"]
    ]
    total = size(results[name]["nbytes"])
    panes.append(f"<div><b>{_t(name)}</b> <span class=muted>{total}</span>"
                 f"<pre>{_t(chr(10).join(lines))}</pre></div>")  # fmt: skip
  return f"<div class=trees>{''.join(panes)}</div>"


def _edit(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Tabulate what an edit did to the fact, its paraphrases, its neighbours and the rest."""
  r = results[section["stage"]]
  rows = [
    [label, *[f"{r['edit'][key][m]:.3f}" for m in section["metrics"]]]
    for label, key in section["rows"].items()
  ]
  e = r["example"]
  pairs = zip(e["before"], e["after"], strict=True)
  shown = [[kind, prompt, old, new] for (kind, prompt, old), (_, _, new) in pairs]
  seen, unseen = r["recall"]
  effect = max(r["tracing"]["subject"])
  return (
    f"<p>The network answers {seen:.1%} of its facts in the wording it was taught and {unseen:.1%} "
    f"in wordings it never saw. Restoring the state at the subject's last token recovers "
    f"{effect:.2f} of the probability a corrupted subject costs: the precondition for an edit.</p>"
    f"<p>One edit, {_t(e['true'])} becomes {_t(e['target'])}:</p>"
    + table(["", "prompt", "before", "after"], shown)
    + f"<p>{_t(section['below'])}</p>"
    + table(["", *section["metrics"].values()], rows)
  )


_KINDS: dict[str, Callable[[Mapping[str, Result], Mapping[str, Any]], str]] = {
  "curves": _curves,
  "table": _table,
  "histograms": _histograms,
  "trees": _trees,
  "edit": _edit,
}


def _findings(results: Mapping[str, Result], section: Mapping[str, Any]) -> str:
  """Turn paired comparisons of two stages on one text into sentences; the numbers choose them."""
  out = []
  for f in section.get("findings", ()):
    a, b = (results[f[k]]["evaluation"][f["text"]] for k in ("a", "b"))
    scale = a["bits_per_nat"]
    gap = bootstrap.paired_difference(a["documents"], b["documents"])
    low, mid, high = gap.low * scale, gap.value * scale, gap.high * scale
    sign = "better" if high < 0 else "worse" if low > 0 else "even"
    numbers = f"{mid:+.3f} bits/byte, 95 % interval [{low:+.3f}, {high:+.3f}], paired by document"
    mark = "" if sign == "better" else " cost" if sign == "worse" else " even"
    out.append(f"<p class='finding{mark}'>{_t(f[sign])} <span class=muted>({numbers})</span></p>")
  return "".join(out)


def _lineage(results: Sequence[Result]) -> str:
  parts = []
  for r in results:
    lines = [f"{x['expression']}    seed {x['seed']}, {x['driver']}" for x in r.get("lineage", ())]
    if lines:
      parts.append(
        f"<details><summary>{_t(r['name'])}</summary><pre>{_t(chr(10).join(lines))}</pre></details>"
      )
  return "".join(parts)


def _smooth(y: np.ndarray, share: float = 0.03) -> np.ndarray:
  """Average over a window of neighbours, narrower at the ends; single steps are noisy."""
  half = max(1, int(len(y) * share))
  return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _bare(ax: Any) -> None:
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(axis="y", color="#e8ebef", linewidth=0.8)
  ax.set_axisbelow(True)


def figure(fig: Any, alt: str) -> str:
  """Embed a figure and close it.

  Args:
    fig: matplotlib figure.
    alt: what it shows, for who cannot see it.

  Returns:
    HTML.
  """
  fig.tight_layout()
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=130)
  plt.close(fig)
  data = base64.b64encode(buffer.getvalue()).decode()
  return f"<p><img alt={json.dumps(html.escape(alt))} src='data:image/png;base64,{data}'></p>"


def _t(text: str) -> str:
  return html.escape(str(text))
