# SPDX-License-Identifier: Apache-2.0
"""Run an experiment from its config.

python -P -m treesurgeon.experiments.run --config=configs/quickstart.py --workdir=DIR

Finished stages are kept: run the same command again after an interruption and it goes on.
"""

import hashlib
import json
import pathlib
import shutil
import sys

from absl import app, flags, logging
from ml_collections import config_flags
from rich import console

from treesurgeon.experiments import report, stages


def main(argv: list[str]) -> None:
  """Run every stage that is not finished and write the report.

  Args:
    argv: no positional arguments.
  """
  del argv
  logging.set_verbosity(logging.WARNING)
  config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
  _claim(workdir, config.to_json_best_effort(sort_keys=True))
  screen = console.Console(stderr=True)
  lab = stages.Lab(workdir, config.text.to_dict(), config.seed)
  results = []
  for i, name in enumerate(config.order):
    known = lab.result(name) is not None
    screen.print(f"[{i + 1}/{len(config.order)}] {name}{' (finished before)' if known else ''}")
    results.append(stages.run(lab, name, config.stages[name].to_dict()))
  _metrics(workdir, results)
  for r in results:
    if "directory" in r:  # the exported model's card stands for the experiment
      shutil.copy(pathlib.Path(r["directory"]) / "README.md", workdir / "README.md")
  page = report.write(workdir, results, config.page.to_dict())
  screen.print(report.plain(results))
  print(f"report: {page}")


def _claim(workdir: pathlib.Path, config: str) -> None:
  """Refuse a directory that holds another experiment's stages."""
  workdir.mkdir(parents=True, exist_ok=True)
  mark, digest = workdir / "config.json", hashlib.sha256(config.encode()).hexdigest()
  old = hashlib.sha256(mark.read_bytes()).hexdigest() if mark.exists() else digest
  if old != digest:
    print(
      f"--workdir={workdir} holds another experiment; choose another directory or remove it",
      file=sys.stderr,
    )
    sys.exit(2)
  mark.write_text(config)


def _metrics(workdir: pathlib.Path, results: list[dict]) -> None:
  lines = []
  for r in results:
    for text, numbers in r.get("evaluation", {}).items():
      lines.append(json.dumps({"stage": r["name"], "text": text, **numbers}))
  (workdir / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines))
  lineage = {r["name"]: r["lineage"] for r in results if r.get("lineage")}
  (workdir / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n")


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("workdir", None, "Where to keep models, metrics and the report.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
