# SPDX-License-Identifier: Apache-2.0
"""Which merge to pick: experts of one base are merged by every method and compared.

python -P -m treesurgeon.experiments.merge_bench --config=configs/merge_bench.py --workdir=DIR

A cell of the benchmark is one setting of the factors (number of experts, steps of the base, size,
full or LoRA fine-tuning); a cell is run for every seed. Hyper-parameters are chosen on validation
rows, reported on test rows. Bases and experts are kept in the work directory, so a run that was
interrupted goes on. Results: `results.json`, `report.html`, and the figures as PNG.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.core import paths, step
from treesurgeon.evaluate import merge_bench
from treesurgeon.experiments import launch, merge_suites, merge_tables
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop

Settings = Mapping[str, Any]


def main(config: Settings, workdir: pathlib.Path) -> None:
  """Run every cell for every seed that is not finished, then write the report.

  Args:
    config: see `configs/merge_bench.py`.
    workdir: where models and results are kept.
  """
  results = []
  for cell in config["order"]:
    for seed in config["seeds"]:
      settings = {**config["default"], **config["cells"][cell]}
      path = workdir / "cells" / f"{cell}-{seed}.json"
      if not path.is_file():
        print(f"{cell}, seed {seed}", flush=True)
        _write(path, run(workdir, {**settings, "methods": config["methods"]}, cell, seed))
      results.append(json.loads(path.read_text()))
  page = merge_tables.write(workdir, results, config)
  print(merge_tables.summary(results, config))
  print(f"report: {page}")


def run(workdir: pathlib.Path, settings: Settings, cell: str, seed: int) -> dict[str, Any]:
  """Run one cell for one seed.

  Args:
    workdir: where bases and experts are kept.
    settings: the cell's factors and the methods.
    cell: its name.
    seed: of everything random.

  Returns:
    JSON values: scores, standings, costs, forgetting, interference.
  """
  suite = merge_suites.build(settings, seed)
  names = list(settings["tasks"])[: settings["experts"]]
  rest = [t for t in suite.tasks if t not in names]
  base = _trained(workdir, settings, suite, None, seed)
  experts = {t: _trained(workdir, settings, suite, t, seed) for t in names}

  def judge(m: model_lib.Model, tasks: list[str], split: str) -> dict[str, merge_bench.Items]:
    return {
      t: merge_bench.score(m, getattr(suite.tasks[t], split), exact=suite.tasks[t].exact)
      for t in tasks
    }

  own = {t: judge(experts[t], [t], "test")[t] for t in names}
  chosen_by = {t: merge_bench.rate(judge(experts[t], [t], "validation")[t]) for t in names}

  def validation(m: model_lib.Model, tasks: list[str]) -> list[float]:
    found = judge(m, tasks, "validation")
    return [merge_bench.rate(found[t]) / max(chosen_by[t], 1e-9) for t in tasks]

  donors = [experts[t] for t in names]
  materials = collect.Materials(donors=donors, **suite.materials(names, seed))
  sheets = {"base": judge(base, [*names, *rest], "test")}
  out: dict[str, Any] = {"cell": cell, "seed": seed, "tasks": names, "methods": {}}
  for name, method in settings["methods"].items():
    if method.get("only") and cell not in method["only"]:
      continue
    sheet: dict[str, merge_bench.Items] = {}
    curve, cost, best = [], {}, None
    merged = base
    for x in method.get("grid", [None]):
      targets = names if method.get("per_task") else [None]
      values = []
      made = []
      for i, task in enumerate(targets):
        text = method["transform"].format(x=x, task=i)
        merged, spent = _merge(registry.parse(text), base, materials, seed)
        made.append(merged)
        cost = cost or spent
        values += validation(merged, names if task is None else [task])
      curve.append([x, float(np.mean(values))])
      if best is None or curve[-1][1] > best[0]:
        best = (curve[-1][1], x, made)
    assert best is not None
    if method.get("per_task"):
      for t, m in zip(names, best[2], strict=True):
        sheet[t] = judge(m, [t], "test")[t]
      sheet |= {t: sheets["base"][t] for t in rest}
    else:
      sheet = judge(best[2][0], [*names, *rest], "test")
      out["methods"].setdefault(name, {})["base_nll"] = suite.base_nll(best[2][0])
    out["methods"].setdefault(name, {}).update({"curve": curve, "chosen": best[1], "cost": cost})
    sheets[name] = sheet
  ranked = merge_bench.standings({k: v for k, v in sheets.items() if k != "base"}, own)
  top = next(iter(ranked))
  for name, entry in out["methods"].items():
    gap = merge_bench.difference(sheets[name], sheets[top], own)
    held = np.mean([merge_bench.rate(sheets[name][t]) for t in rest]) if rest else float("nan")
    entry |= {"standing": ranked[name]._asdict(), "behind_best": gap, "held_out": float(held),
              "scores": {t: merge_bench.rate(x) for t, x in sheets[name].items()}}  # fmt: skip
  tasks, cosines, clashes = merge_bench.conflicts(base, experts)
  out |= {
    "base_scores": {t: merge_bench.rate(x) for t, x in sheets["base"].items()},
    "expert_scores": {t: merge_bench.rate(own[t]) for t in names},
    "cross": {t: {u: merge_bench.rate(x) for u, x in judge(experts[t], names, "test").items()}
              for t in names},
    "base_nll": suite.base_nll(base),
    "expert_nll": {t: suite.base_nll(experts[t]) for t in names},
    "held_out": rest,
    "interference": {"tasks": tasks, "cosines": cosines.tolist(), "clashes": clashes.tolist(),
                     "pairs": _pairs(base, experts, suite, own, seed)},
    "parameters": base.size(),
    "factors": {k: v for k, v in settings.items() if k not in ("methods",)},
    "device": jax.devices()[0].device_kind,
  }  # fmt: skip
  return out


def _pairs(
  base: model_lib.Model, experts: Mapping[str, model_lib.Model], suite: Any, own: Any, seed: int
) -> list[list[float]]:
  """Score task i after adding expert j's task vector to its own: the heat map."""
  names = list(experts)
  table = []
  for t in names:
    row = []
    for u in names:
      pair = [experts[t]] if t == u else [experts[t], experts[u]]
      text = registry.parse("merge.task_arithmetic()")
      m = drivers.run(text, base, collect.Materials(donors=pair), seed=seed)
      items = merge_bench.score(m, suite.tasks[t].test, exact=suite.tasks[t].exact)
      row.append(merge_bench.rate(items) / max(merge_bench.rate(own[t]), 1e-9))
    table.append(row)
  return table


def _merge(
  transform: step.Transform, base: model_lib.Model, materials: collect.Materials, seed: int
) -> tuple[model_lib.Model, dict[str, float]]:
  """Merge, and tell the seconds and the memory that it took beyond what was held before."""
  _reset_peak()
  before = _memory("VmRSS")
  start = time.perf_counter()
  blockwise = any(s.scope == "block" for s in transform)
  go = drivers.run_blockwise if blockwise else drivers.run
  merged = go(transform, base, materials, seed=seed)
  jax.block_until_ready(merged.params)
  seconds = time.perf_counter() - start
  return merged, {"seconds": seconds, "megabytes": max(0.0, _memory("VmHWM") - before) / 1e6}


def _trained(
  workdir: pathlib.Path, settings: Settings, suite: Any, task: str | None, seed: int
) -> model_lib.Model:
  """Train the base, or fine-tune an expert from it; read it where that was done before."""
  key = {"suite": settings["suite"], "spec": settings["spec"], "base": settings["base"],
         "seed": seed, "task": task}  # fmt: skip
  how = settings[settings["tuning"]]
  if task is not None:
    key |= {"tuning": settings["tuning"], "how": how}
  name = hashlib.sha256(json.dumps(key, sort_keys=True, default=list).encode()).hexdigest()[:16]
  path = workdir / "models" / f"{task or 'base'}-{name}.safetensors"
  fresh = model_lib.Model(suite.spec, models.init(suite.spec, jax.random.key(seed)))
  if path.is_file():
    flat = safetensors.numpy.load_file(path)
    return fresh.replace(params=paths.nest({k: jnp.asarray(v) for k, v in flat.items()}))
  settings_of = settings["base"] if task is None else how
  start = fresh if task is None else _trained(workdir, settings, suite, None, seed)
  rank = settings_of.get("rank")
  if rank:
    start = drivers.run(registry.parse(f"adapt.lora(rank={rank})"), start, seed=seed)
  out = loop.fit(
    start,
    suite.batches(task, settings_of["batch"], seed),
    steps=settings_of["steps"],
    optimizer={"lr": settings_of["lr"], "warmup": settings_of["steps"] // 20, "weight_decay": 0.0},
    objective=suite.objective,
    types=("LowRank",) if rank else None,
    seed=seed,
    label=task or "base",
  )
  if rank:
    out = drivers.run(registry.parse("adapt.merge()"), out, seed=seed)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_suffix(".tmp")
  safetensors.numpy.save_file({k: np.asarray(v) for k, v in paths.walk(out.params).items()}, draft)
  os.replace(draft, path)
  return fresh.replace(params=out.params)


def _reset_peak() -> None:
  """Let the kernel count this process' peak memory anew (Linux)."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> float:
  """Read a field of this process' status, in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return float(line.split()[1]) * 1024
  return 0.0


def _write(path: pathlib.Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_suffix(".tmp")
  draft.write_text(json.dumps(value, indent=1) + "\n")
  os.replace(draft, path)


if __name__ == "__main__":
  launch.run(main)
