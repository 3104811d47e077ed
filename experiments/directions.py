# SPDX-License-Identifier: Apache-2.0
"""Run an experiment for several seeds and test its claims.

python -P -m treesurgeon.experiments.directions --config=configs/directions.py --workdir=DIR
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from rich import console, table

from treesurgeon.experiments import stages

Terms = Sequence[tuple[float, str, str]]


def value(terms: Terms, results: Mapping[str, Any]) -> float:
  """Evaluate a claim's linear form.

  Args:
    terms: (coefficient, stage, text).
    results: stage to result.

  Returns:
    The sum of coefficient times bits per byte; negative where the claim holds.

  Example:
    >>> result = {"evaluation": {"code": {"bits_per_byte": 2.0}}}
    >>> value([(1.0, "a", "code"), (-1.0, "b", "code")], {"a": result, "b": result})
    0.0
  """
  return sum(c * results[s]["evaluation"][t]["bits_per_byte"] for c, s, t in terms)


def main(argv: list[str]) -> None:
  """Run every seed's stages, then print and keep the verdicts.

  Args:
    argv: no positional arguments.
  """
  del argv
  logging.set_verbosity(logging.WARNING)
  config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
  runs = []
  for seed in config.seeds:
    lab = stages.Lab(workdir / f"seed{seed}", config.text.to_dict(), seed)
    results = {}
    for name in config.order:
      print(f"seed {seed}: {name}", flush=True)
      results[name] = stages.run(lab, name, config.stages[name].to_dict())
    runs.append(results)
  claims = {c: [value(t, r) for r in runs] for c, t in config.claims}
  out = table.Table(box=None)
  for column in ("claim", "bits/byte by seed (below 0 holds)", "verdict"):
    out.add_column(column)
  for claim, values in claims.items():
    verdict = "reproduced" if max(values) < 0 else "not reproduced" if min(values) > 0 else "mixed"
    out.add_row(claim, "  ".join(f"{v:+.4f}" for v in values), verdict)
  console.Console(width=150).print(out)
  (workdir / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("workdir", None, "Where to keep models and verdicts.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
