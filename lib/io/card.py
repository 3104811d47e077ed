# SPDX-License-Identifier: Apache-2.0
"""What an output directory says of itself: lineage.json, and a model card made from it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from treesurgeon.core import lineage


def lineage_json(
  records: Sequence[lineage.Record],
  *,
  inputs: Mapping[str, str],
  outputs: Mapping[str, str],
  evaluation: Mapping[str, Any],
) -> str:
  """Write the content of lineage.json.

  Args:
    records: what was done, oldest first.
    inputs: input file to sha256.
    outputs: output file to sha256.
    evaluation: measure to value, or to {"before", "after"}.

  Returns:
    JSON text.

  Example:
    >>> sorted(json.loads(lineage_json((), inputs={}, outputs={}, evaluation={})))
    ['evaluation', 'inputs', 'outputs', 'records']
  """
  table = {
    "records": lineage.to_json(tuple(records)),
    "inputs": dict(sorted(inputs.items())),
    "outputs": dict(sorted(outputs.items())),
    "evaluation": dict(evaluation),
  }
  return json.dumps(table, indent=2) + "\n"


def model_card(
  name: str,
  records: Sequence[lineage.Record],
  *,
  config: Mapping[str, Any],
  evaluation: Mapping[str, Any],
  ours_only: Sequence[str] = (),
  recipe: str = "",
) -> str:
  """Write README.md: how the model came about, how it does, and how to load it.

  Args:
    name: of the output directory.
    records: what was done, oldest first.
    config: the output's config.json.
    evaluation: measure to value, or to {"before", "after"}.
    ours_only: why other libraries cannot load it, a phrase a reason; empty if they can.
    recipe: YAML that the last record carried out, shown in the place of its spelling.

  Returns:
    Markdown text with the hub's front matter.

  Example:
    >>> done = [lineage.Record("grow.g_stack(growth=2)")]
    >>> text = model_card("small", done, config={}, evaluation={})
    >>> "1. `grow.g_stack(growth=2)`" in text
    True
  """
  library = "treesurgeon" if ours_only or not config else "transformers"
  lines = ["---", f"library_name: {library}", "tags:", "- treesurgeon", "---", "", f"# {name}", ""]
  kind = config.get("model_type", "transformer")
  lines += [f"A {kind} model made with treesurgeon.", "", "The terms of its source models apply."]
  lines += ["", "## How it was made", ""]
  for i, record in enumerate(records, 1):
    spelled = "this configuration" if recipe and i == len(records) else f"`{record.expression}`"
    lines.append(f"{i}. {spelled}, seed {record.seed}, driver `{record.driver}`")
  if recipe:
    lines += ["", "```yaml", recipe.rstrip(), "```"]
  if not records:
    lines.append("Nothing was changed.")
  digests = {role: d for record in records for role, d in record.inputs.items()}
  if digests:
    lines += ["", "| input | sha256 |", "|---|---|"]
    lines += [f"| {role} | `{d}` |" for role, d in digests.items()]
  versions = records[-1].versions if records else {}
  if versions:
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
  if evaluation:
    lines += ["", "## Evaluation", "", "| measure | before | after |", "|---|---|---|"]
    lines += [_row(measure, value) for measure, value in evaluation.items()]
  lines += ["", "## How to load it", ""]
  if ours_only:
    lines += [f"Only treesurgeon loads this directory: {'; '.join(ours_only)}.", ""]
  load = ["from treesurgeon import io", "", f'model = io.load("{name}")']
  if not config:  # tensors without an architecture
    load = ["from treesurgeon.io import raw", "", f'tensors = raw.Directory("{name}")']
  lines += ["```python", *load, "```", ""]
  lines += ["`lineage.json` holds all arguments, and the digests of every file.", ""]
  return "\n".join(lines)


def _row(measure: str, value: Any) -> str:
  if isinstance(value, Mapping):
    return f"| {measure} | {_number(value.get('before'))} | {_number(value.get('after'))} |"
  return f"| {measure} | | {_number(value)} |"


def _number(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.6g}" if isinstance(value, float) else str(value)
