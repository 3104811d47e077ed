# SPDX-License-Identifier: Apache-2.0
"""What compression costs: every method at every width, on networks trained here on real text.

python -P -m treesurgeon.experiments.ptq_study --config=configs/ptq_study.py --workdir=DIR

A cell is one transform of one network. For each: loss on held-out text, document by document; the
divergence of predictions; every kernel's output error on the calibration text; bytes; seconds; peak
memory. Finished cells are lines of `results.jsonl`, so a run that was interrupted goes on. A
transform that cannot be read or that names a method nobody registered stops the run before it
begins; one that fails is noted and the rest go on. Results: `report.md` and `pareto.png`.
"""

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from treesurgeon import registry
from treesurgeon.core import leaves, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import bootstrap
from treesurgeon.experiments import launch, ptq_edits, ptq_models, ptq_tables
from treesurgeon.run import collect, drivers, statistics

Cell = dict[str, Any]


def main(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Run every cell that is not finished, then write the report.

  Args:
    config: see `configs/ptq_study.py`.
    workdir: where networks and results are kept.
  """
  wanted = cells(config)
  for cell in wanted:
    registry.parse(cell["transform"])
  path = workdir / "results.jsonl"
  done = read(path)
  labs: dict[str, Lab] = {}
  for i, cell in enumerate(wanted):
    if "failed" in done.get(cell["key"], {"failed": ""}):
      print(f"{i + 1}/{len(wanted)} {cell['model']}: {cell['transform']}", flush=True)
      if cell["model"] not in labs:
        labs[cell["model"]] = Lab(workdir, config, cell["model"])
      made = done[cell["key"]] = labs[cell["model"]].run(cell)
      with path.open("a") as file:
        file.write(json.dumps(made) + "\n")
  results = [{**done[c["key"]], **c} for c in wanted]
  print(f"report: {ptq_tables.write(workdir, results, config)}")


def cells(config: Mapping[str, Any]) -> list[Cell]:
  """List the cells of a config.

  Args:
    config: "methods": name to "transform" with places for {bits} and {group}, the "bits" and
      "groups" to fill in, and the "models", for any of which the two may differ, under its name;
      "extra": single cells; "edits".

  Returns:
    Cells with a "label" that is unique in its model, and a "key" of all that matters.

  Raises:
    ValueError: for two cells of one label, or a model that the config does not have.

  Example:
    >>> method = {"transform": "f(bits={bits})", "bits": (4, 3), "groups": (32,), "models": ("d",)}
    >>> base = {"models": {"d": {}}, "text": {}, "seed": 0, "extra": (), "edits": None}
    >>> [c["label"] for c in cells({**base, "methods": {"RTN": method}})]
    ['RTN 4b g32', 'RTN 3b g32']
  """
  found: list[Cell] = []
  for name, method in config["methods"].items():
    for model in method["models"]:
      own = {**method, **method.get(model, {})}
      for group in own.get("groups", (None,)):
        for bits in own.get("bits", (None,)):
          label = name + (f" {bits}b" if bits else "") + (f" g{group}" if group else "")
          text = method["transform"].format(bits=bits, group=group)
          found.append({"model": model, "label": label, "method": name, "group": group,
                        "transform": text, "rotated": method.get("rotated", False)})  # fmt: skip
  found += [{"method": c["label"], "group": None, "rotated": False, **c} for c in config["extra"]]
  if config["edits"]:
    found += [
      {"model": "facts", "label": label, "method": label, "group": None, "transform": text}
      for label, text in config["edits"]["after"].items()
    ]
  order = [*config["models"], "facts"]
  seen: set[tuple[str, str]] = set()
  for cell in found:
    if cell["model"] not in order:
      known = ", ".join(config["models"])
      raise ValueError(f"{cell['label']}: there is no model {cell['model']!r}; there are {known}")
    if (cell["model"], cell["label"]) in seen:
      raise ValueError(f"{cell['model']}: two cells are called {cell['label']!r}")
    seen.add((cell["model"], cell["label"]))
    # What a cell is called does not change what comes out.
    told = {k: v for k, v in cell.items() if k not in ("label", "method", "group")}
    if cell["model"] == "facts":
      told |= {"edits": [config["edits"]["facts"], config["edits"]["edit"]]}
    else:
      names = [cell["model"], *cell.get("donors", ())]
      bases = [config["models"][n]["base"] for n in names if "base" in config["models"][n]]
      told |= {"models": {n: config["models"][n] for n in names + bases}, "text": config["text"]}
    told["seed"] = config["seed"]
    text = json.dumps(told, sort_keys=True, default=list)
    cell["key"] = hashlib.sha256(text.encode()).hexdigest()[:16]
  # What is quick comes first: a run that is cut short has the baselines of every network.
  later = {n for n, m in config["methods"].items() if m.get("slow")} | {"gradient"}
  return sorted(found, key=lambda c: (c["method"] in later, order.index(c["model"])))


def read(path: pathlib.Path) -> dict[str, Cell]:
  """Read the finished cells; a line that a killed run left half written is passed over.

  Args:
    path: the file, or where it will be.

  Returns:
    Key to cell.
  """
  found = {}
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      one = json.loads(line)
    except json.JSONDecodeError:
      continue
    found[one["key"]] = one
  return found


class Lab:
  """One network, and everything it is measured with.

  Attributes:
    workdir: where networks are kept.
    config: the study's.
    name: the network's.
  """

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], name: str):
    self.workdir, self.config, self.name = workdir, config, name
    if name == "facts":
      self.facts = ptq_edits.Facts(config["edits"], config["seed"])
      return
    self.texts = ptq_models.Texts(config["text"])
    self.model = self._trained(name)
    kind = self.model.spec.kind
    self.held = self.texts.held_out(kind)
    self.batches = self.texts.calibration(kind, config["seed"])
    names = self.model.addresses()
    want = statistics.wanted({"h": needs.Statistic("second_moment")}, names)
    seen = statistics.tap_statistics(self.model, want, self.batches)
    self.moments = {address: state.mean() for (_, address), state in seen.items()}

  def run(self, cell: Cell) -> Cell:
    """Run one cell; a failure is part of the result."""
    if self.name == "facts":
      return {**cell, **self.facts.run(cell["transform"])}
    donors = [self._trained(d) for d in cell.get("donors", ())]
    if cell.get("before"):
      first = registry.parse(cell["before"])
      text = collect.Materials(batches=self.batches)
      donors = [go(first)(first, d, text, seed=self.config["seed"]) for d in donors]
    materials = collect.Materials(batches=self.batches, donors=donors)
    transform = registry.parse(cell["transform"])
    try:
      made, cost = measured(
        lambda: go(transform)(transform, self.model, materials, seed=self.config["seed"])
      )
    except Exception as error:  # what one method cannot do shall not end the study
      logging.exception("%s", cell["transform"])
      return {**cell, "failed": f"{type(error).__name__}: {error}"[:500]}
    judged = ptq_models.judge(made, self.model, self.held)
    bounds = bootstrap.interval(judged.documents)
    out = {**cell, **cost, **sizes(made), "documents": judged.documents, "kl": judged.kl}
    out |= {"perplexity": [math.exp(x) for x in (bounds.value, bounds.low, bounds.high)]}
    if not cell["rotated"]:
      out["errors"] = self.errors(made)
    return out

  def errors(self, made: model_lib.Model) -> dict[str, float]:
    """Compute the relative output error of every kernel on the original's inputs."""
    if made.addresses() != self.model.addresses():
      return {}
    return {
      a: float(_error(leaves.dense(self.model.leaf(a)), leaves.dense(made.leaf(a)), h))
      for a, h in self.moments.items()
    }

  def _trained(self, name: str) -> model_lib.Model:
    return ptq_models.trained(self.workdir, self.config, self.texts, name, self.config["seed"])


def go(transform: step.Transform) -> Callable[..., model_lib.Model]:
  """Choose the driver: block by block for what was made for it.

  Args:
    transform: the transform.

  Returns:
    `drivers.run_blockwise` or `drivers.run`.
  """
  return drivers.run_blockwise if any(s.scope == "block" for s in transform) else drivers.run


def sizes(model: model_lib.Model) -> dict[str, float]:
  """Measure the kernels inside the layers, and the whole.

  Args:
    model: the network.

  Returns:
    "bits" a weight and "kernels" in bytes, scales, masks and all; "bytes" of the model; "zeros",
    the share of kernel weights that are zero.
  """
  held = paths.walk(model.params)
  kernels = {a: x for a, x in held.items() if a.startswith("layers/") and a.endswith("/kernel")}
  nbytes, count = (
    sum(leaves.nbytes(x) for x in kernels.values()),
    sum(x.size for x in kernels.values()),
  )
  zeros = sum(int((np.asarray(leaves.dense(x)) == 0).sum()) for x in kernels.values())
  return {"bits": nbytes * 8 / count, "kernels": nbytes, "zeros": zeros / count,
          "bytes": sum(leaves.nbytes(x) for x in held.values())}  # fmt: skip


def measured(work: Callable[[], model_lib.Model]) -> tuple[model_lib.Model, dict[str, float]]:
  """Do some work, compilation included.

  Args:
    work: what makes a model.

  Returns:
    The model; "seconds", and "megabytes" at the peak beyond what was held before (Linux).
  """
  clear, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")
  if status.is_file():
    clear.write_text("5")
  before, start = _memory(status, "VmRSS"), time.perf_counter()
  made = work()
  jax.block_until_ready(made.params)
  spent = time.perf_counter() - start
  return made, {"seconds": spent, "megabytes": (_memory(status, "VmHWM") - before) / 1e6}


def _memory(path: pathlib.Path, field: str) -> float:
  lines = path.read_text().splitlines() if path.is_file() else ()
  return next((float(x.split()[1]) * 1024 for x in lines if x.startswith(field + ":")), 0.0)


@jax.jit
def _error(w: jax.Array, made: jax.Array, h: jax.Array) -> jax.Array:
  wrong = made.astype(jnp.float32) - w.astype(jnp.float32)

  def size(x: jax.Array) -> jax.Array:
    return (x * jnp.matmul(h, x, precision="highest")).sum()

  return size(wrong) / size(w.astype(jnp.float32))


if __name__ == "__main__":
  launch.run(main)
