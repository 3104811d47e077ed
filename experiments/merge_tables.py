# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and claims of the merge benchmark, as one page and as Markdown."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from treesurgeon.experiments import report

Result = Mapping[str, Any]
plt.switch_backend("agg")


def write(
  workdir: pathlib.Path, results: Sequence[Result], config: Mapping[str, Any]
) -> pathlib.Path:
  """Write `report.html`, `report.md` and the figures.

  Args:
    workdir: where to.
    results: one a cell and seed.
    config: the benchmark's config.

  Returns:
    The page.
  """
  first = config["order"][0]
  cells = {c: [r for r in results if r["cell"] == c] for c in config["order"]}
  figures = {
    "lambda": _lambdas(cells),
    "factors": _factors(cells),
    "interference": _heat(cells[first]),
    "cost": _cost(cells[first]),
  }
  text = [f"# Merge benchmark\n\n{_facts(cells[first])}\n"]
  body = ["<h1>Merge benchmark</h1>", f"<p class=lead>{_facts(cells[first])}</p>"]
  for name, group in cells.items():
    if group:
      head, rows = _rows(group)
      text.append(f"## {name}\n\n{_tasks(group)}\n\n{_markdown(head, rows)}")
      body.append(
        f"<h2>{name}</h2><p>{_tasks(group)}</p><div class=wide>{report.table(head, rows)}"
      )
      body.append("</div>")
  head, rows = ["claim", "by seed (above 0 holds)", "verdict"], []
  for claim, values in claims(cells).items():
    rows.append([claim, "  ".join(f"{v:+.3f}" for v in values), verdict(values)])
  text.append(f"## Claims\n\n{_markdown(head, rows)}")
  body.append(f"<h2>Claims</h2>{report.table(head, rows)}")
  for name, figure in figures.items():
    figure.savefig(workdir / f"{name}.png", dpi=130, bbox_inches="tight")
    body.append(f"<h2>{name}</h2>{report.figure(figure, name)}")
  (workdir / "report.md").write_text("\n".join(text) + "\n")
  page = workdir / "report.html"
  page.write_text(report.document("Merge benchmark", body))
  return page


def summary(results: Sequence[Result], config: Mapping[str, Any]) -> str:
  """Render the first cell's table for a terminal.

  Args:
    results: one a cell and seed.
    config: the benchmark's config.

  Returns:
    Markdown.
  """
  first = config["order"][0]
  return _markdown(*_rows([r for r in results if r["cell"] == first]))


def verdict(values: Sequence[float]) -> str:
  """Say whether a claim held in every seed.

  Args:
    values: by seed; above zero where it holds.

  Returns:
    "reproduced", "not reproduced" or "mixed"; "not run" without values.

  Example:
    >>> verdict([0.1, 0.2]), verdict([0.1, -0.2])
    ('reproduced', 'mixed')
  """
  if not values:
    return "not run"
  return "reproduced" if min(values) > 0 else "not reproduced" if max(values) <= 0 else "mixed"


def claims(cells: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
  """Evaluate what the literature expects, for every seed.

  Args:
    cells: results by cell.

  Returns:
    Claim to numbers that are above zero where it holds.
  """
  first = next(iter(cells.values()))

  def gap(a: str, b: str, group: Sequence[Result] = first) -> list[float]:
    return [
      r["methods"][a]["standing"]["normalised"] - r["methods"][b]["standing"]["normalised"]
      for r in group
      if a in r["methods"] and b in r["methods"]
    ]

  def curve(r: Result, name: str) -> dict[float, float]:
    return dict(r["methods"][name]["curve"])

  def collapse(r: Result) -> float:
    found = curve(r, "task arithmetic")
    return max(found.values()) - found[max(found)]

  def interior(r: Result) -> float:
    found = curve(r, "task arithmetic")
    ends = max(found[min(found)], found[max(found)])
    return max(found.values()) - ends

  few, many = cells.get("2 experts", ()), cells.get("8 experts", ())
  weak = cells.get("weak base", ())

  def kept(r: Result, tasks: Sequence[str]) -> float:
    scores, own = r["methods"]["task arithmetic"]["scores"], r["expert_scores"]
    return float(np.mean([scores[t] / own[t] for t in tasks]))

  out = {
    "TIES over an average": gap("TIES", "average"),
    "tuned task arithmetic over an average": gap("task arithmetic", "average"),
    "task arithmetic's best λ lies inside the grid": [interior(r) for r in first],
    "λ = 1 costs more with 8 experts than with 2": [
      collapse(b) - collapse(a) for a, b in zip(few, many, strict=False)
    ],
    "DARE at keep rate 0.1 needs its rescaling": gap("DARE", "DARE, not rescaled"),
    "RegMean over an average": gap("RegMean", "average"),
    "RegMean++ over RegMean": gap("RegMean++", "RegMean"),
    "AdaMerging by tensor over by task": gap("AdaMerging, by tensor", "AdaMerging, by task"),
    "AdaMerging by tensor over task arithmetic": gap("AdaMerging, by tensor", "task arithmetic"),
    "aTLAS over task arithmetic": gap("aTLAS", "task arithmetic"),
    "a task's TALL mask over task arithmetic": gap("TALL masks", "task arithmetic"),
    "EMR over task arithmetic": gap("EMR", "task arithmetic"),
    "TSV over task arithmetic": gap("TSV", "task arithmetic"),
    "ISO-C over task arithmetic": gap("ISO-C", "task arithmetic"),
    "WUDI over task arithmetic": gap("WUDI", "task arithmetic"),
    "OptMerge over task arithmetic": gap("OptMerge", "task arithmetic"),
    "Fisher over an average": gap("Fisher", "average"),
    "consensus over task arithmetic": gap("consensus", "task arithmetic"),
    "PCB over TIES": gap("PCB", "TIES"),
    "breadcrumbs over task arithmetic": gap("breadcrumbs", "task arithmetic"),
    "DELLA over DARE TIES": gap("DELLA", "DARE TIES"),
    "model stock over an average": gap("model stock", "average"),
    "a learned soup over an average": gap("learned soup", "average"),
    "a greedy soup over an average": gap("greedy soup", "average"),
    "the same tasks keep more of 2 experts than of 8": [
      kept(a, a["tasks"]) - kept(b, a["tasks"]) for a, b in zip(few, many, strict=False)
    ],
    "a stronger base merges better": [
      kept(a, a["tasks"]) - kept(b, a["tasks"]) for a, b in zip(first, weak, strict=False)
    ],
    "merged, the held-out tasks gain over the base": [
      r["methods"]["task arithmetic"]["held_out"]
      - float(np.mean([r["base_scores"][t] for t in r["held_out"]]))
      for r in first
      if r["held_out"]
    ],
    "merging forgets less than the mean expert": [
      float(np.mean(list(r["expert_nll"].values()))) - r["methods"]["task arithmetic"]["base_nll"]
      for r in first
    ],
  }
  return out


def _rows(group: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
  """One row a method: means over seeds, and in how many seeds it is significantly behind the best.

  "place" is by mean / by worst task / by mean rank.
  """
  head = ["method", "normalised [95 %, first seed]", "worst task", "mean rank", "place",
          "behind best", "held out", "base loss", "chosen", "seconds", "MB"]  # fmt: skip
  names = [n for n in group[0]["methods"] if all(n in r["methods"] for r in group)]

  def mean(get: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
    return {n: float(np.mean([get(r["methods"][n]) for r in group])) for n in names}

  normalised = mean(lambda m: m["standing"]["normalised"])
  worst = mean(lambda m: m["standing"]["worst"])
  rank = mean(lambda m: m["standing"]["rank"])
  orders = [
    {n: i + 1 for i, n in enumerate(sorted(names, key=lambda n, v=v, s=s: s * v[n]))}
    for v, s in ((normalised, -1), (worst, -1), (rank, 1))
  ]
  held = mean(lambda m: m["held_out"])
  seconds, memory = mean(lambda m: m["cost"]["seconds"]), mean(lambda m: m["cost"]["megabytes"])
  rows = []
  for n in sorted(names, key=lambda n: -normalised[n]):
    each = [r["methods"][n] for r in group]
    behind = sum(m["behind_best"][2] < 0 for m in each)
    loss = "" if "base_nll" not in each[0] else f"{np.mean([m['base_nll'] for m in each]):.3f}"
    chosen = ", ".join("" if m["chosen"] is None else f"{m['chosen']:g}" for m in each)
    s = each[0]["standing"]
    rows.append(
      [n, f"{normalised[n]:.3f} [{s['low']:.3f}, {s['high']:.3f}]", f"{worst[n]:.3f}",
       f"{rank[n]:.1f}", "/".join(str(o[n]) for o in orders), f"{behind} of {len(group)}",
       _number(held[n]), loss, chosen.strip(", "), f"{seconds[n]:.2f}", f"{memory[n]:.0f}"]
    )  # fmt: skip
  base = [
    float(np.mean([r["base_scores"][t] / r["expert_scores"][t] for t in r["tasks"]])) for r in group
  ]
  scores = [r["base_scores"][t] for r in group for t in r["held_out"]]
  kept = float(np.mean(scores)) if scores else float("nan")
  loss = float(np.mean([r["base_nll"] for r in group]))
  rows.append(["(the base)", f"{np.mean(base):.3f}", "", "", "", "", _number(kept), f"{loss:.3f}"])
  rows[-1] += [""] * (len(head) - len(rows[-1]))
  return head, rows


def _number(x: float) -> str:
  """Write a number; nothing where no task was held out."""
  return f"{x:.3f}" if np.isfinite(x) else ""


def _facts(group: Sequence[Result]) -> str:
  r = group[0]
  return (
    f"{len(group)} seeds; {r['parameters']:,} parameters; experts on {', '.join(r['tasks'])}; "
    f"held out: {', '.join(r['held_out'])}. Scores are divided by the task's own expert's; "
    f"'behind best' counts the seeds in which a paired bootstrap puts a method behind the best one."
  )


def _tasks(group: Sequence[Result]) -> str:
  """Base and expert scores, so that a reader sees what there was to keep."""
  out = []
  for t in group[0]["tasks"]:
    base, own = (float(np.mean([r[k][t] for r in group])) for k in ("base_scores", "expert_scores"))
    out.append(f"{t} {base:.2f} → {own:.2f}")
  forgot = np.mean([np.mean(list(r["expert_nll"].values())) for r in group])
  return "Base → expert: " + "; ".join(out) + f". Loss on the base's mixture: experts {forgot:.3f}."


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = ["| " + " | ".join(head) + " |", "|" + "|".join(" --- " for _ in head) + "|"]
  return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def _lambdas(cells: Mapping[str, Sequence[Result]]) -> Any:
  """Validation score of task arithmetic against λ, by cell."""
  fig, ax = plt.subplots(figsize=(7, 3.4))
  for i, (name, group) in enumerate(cells.items()):
    color = report.COLORS[i % len(report.COLORS)]
    line = "o-" if i < len(report.COLORS) else "s--"
    found = [r["methods"]["task arithmetic"]["curve"] for r in group]
    if found:
      xs = [p[0] for p in found[0]]
      ys = np.array([[p[1] for p in c] for c in found])
      ax.plot(xs, ys.mean(0), line, color=color, label=name, linewidth=1.6, markersize=4)
      ax.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.15)
  ax.set_xlabel("λ of task arithmetic (band: all seeds)")
  ax.set_ylabel("normalised validation score")
  ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
  ax.spines[["top", "right"]].set_visible(False)
  return fig


def _factors(cells: Mapping[str, Sequence[Result]]) -> Any:
  """Normalised score of the methods that every cell has, by cell."""
  named = {c: g for c, g in cells.items() if g}
  common = [
    n
    for n in next(iter(named.values()))[0]["methods"]
    if all(n in r["methods"] for g in named.values() for r in g)
  ]
  fig, ax = plt.subplots(figsize=(9, 3.6))
  width = 0.8 / max(1, len(common))
  for i, n in enumerate(common):
    values = [[r["methods"][n]["standing"]["normalised"] for r in g] for g in named.values()]
    x = np.arange(len(named)) + i * width
    color = report.COLORS[i % len(report.COLORS)]
    hatch = "///" if i >= len(report.COLORS) else None
    ax.bar(x, [np.mean(v) for v in values], width, color=color, label=n, hatch=hatch)
    for at, v in zip(x, values, strict=True):
      ax.plot([at] * len(v), v, ".", color="#1d2329", markersize=3)
  ax.set_xticks(np.arange(len(named)) + 0.4 - width / 2, list(named))
  ax.set_ylabel("normalised score (dots: seeds)")
  ax.legend(frameon=False, fontsize=8, ncols=7, loc="lower left", bbox_to_anchor=(0, 1))
  ax.spines[["top", "right"]].set_visible(False)
  return fig


def _heat(group: Sequence[Result]) -> Any:
  """What adding another expert does to a task, next to how similar the two changes are."""
  names = group[0]["interference"]["tasks"]
  fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.9))
  pairs = np.mean([r["interference"]["pairs"] for r in group], axis=0)
  cosines = np.mean([r["interference"]["cosines"] for r in group], axis=0)
  for ax, table, title in (
    (axes[0], pairs, "score of the row's task, the column's expert added"),
    (axes[1], np.where(np.eye(len(names)) > 0, np.nan, cosines), "cosine of the task vectors"),
  ):
    image = ax.imshow(table, cmap="viridis")
    middle = 0.5 * (np.nanmin(table) + np.nanmax(table))
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_title(title, fontsize=9)
    for (i, j), v in np.ndenumerate(table):
      if np.isfinite(v):
        ink = "black" if v > middle else "white"
        ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color=ink)
    fig.colorbar(image, ax=ax, shrink=0.8)
  return fig


def _cost(group: Sequence[Result]) -> Any:
  """Normalised score against seconds of merging, compilation included."""
  fig, ax = plt.subplots(figsize=(8, 4.2))
  for n in group[0]["methods"]:
    each = [r["methods"][n] for r in group if n in r["methods"]]
    x = float(np.mean([m["cost"]["seconds"] for m in each]))
    y = float(np.mean([m["standing"]["normalised"] for m in each]))
    ax.plot(x, y, "o", color=report.COLORS[0], markersize=4)
    ax.annotate(n, (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
  ax.set_xscale("log")
  ax.set_xlabel("seconds to merge, compilation included")
  ax.set_ylabel("normalised score")
  ax.spines[["top", "right"]].set_visible(False)
  return fig
