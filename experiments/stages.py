# SPDX-License-Identifier: Apache-2.0
"""The stages an experiment is made of: train, transform, edit, export.

A config names its stages and their order; each takes the models of earlier stages by name and
leaves a directory: the model and `result.json`, which is written last. A stage whose `result.json`
exists is finished, so a run that was interrupted goes on with the first stage that is not.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from treesurgeon import models, registry
from treesurgeon.core import leaves, lineage
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import bootstrap, perplexity
from treesurgeon.experiments import fact_stage
from treesurgeon.io import export as export_lib
from treesurgeon.io import loading, sink
from treesurgeon.run import collect, describe, drivers
from treesurgeon.train import corpus, data, loop, metrics
from treesurgeon.train import tokenizer as bpe

Settings = Mapping[str, Any]


@dataclasses.dataclass
class Lab:
  """Where an experiment keeps its models and texts.

  Attributes:
    workdir: the experiment's directory.
    text: settings of the corpus: vocab_size, length, validation_bytes, calibration.
    seed: of everything random.
  """

  workdir: pathlib.Path
  text: Settings
  seed: int = 0

  def folder(self, name: str) -> pathlib.Path:
    """Name a stage's directory."""
    return self.workdir / "stages" / name

  def result(self, name: str) -> dict[str, Any] | None:
    """Read a finished stage's result; None if it is not finished."""
    path = self.folder(name) / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None

  def model(self, name: str) -> model_lib.Model:
    """Load the model that a finished stage left."""
    return loading.load(self.folder(name) / "model")

  @functools.cached_property
  def documents(self) -> list[corpus.Document]:
    """The corpus."""
    return corpus.load()

  @functools.cached_property
  def tokenizer(self) -> Any:
    """The corpus' tokenizer, trained once and cached."""
    return bpe.cached(self.documents, vocab_size=self.text["vocab_size"])

  def rows(self, domain: str) -> np.ndarray:
    """Pack a domain's training documents into rows of tokens."""
    texts = [d.text for d in self.documents if d.split == "train" and d.domain == domain]
    eos = self.tokenizer.token_to_id(bpe.EOS)
    return data.rows(texts, self.tokenizer, length=self.text["length"], eos=eos)

  def held_out(self, domain: str) -> list[str]:
    """Cut a domain's validation documents to an equal length and take enough of them."""
    size = self.text["document_bytes"]
    texts = [d.text[:size] for d in self.documents if d.split != "train" and d.domain == domain]
    return texts[: max(1, self.text["validation_bytes"] // size)]


def run(lab: Lab, name: str, settings: Settings) -> dict[str, Any]:
  """Run one stage, or read its result if it is finished.

  Args:
    lab: the experiment.
    name: the stage.
    settings: its settings; "kind" says what it does.

  Returns:
    The stage's result.

  Raises:
    ValueError: for an unknown kind.
  """
  done = lab.result(name)
  if done is not None:
    return done
  if settings["kind"] not in KINDS:
    known = ", ".join(KINDS)
    raise ValueError(f"stage {name!r}: unknown kind {settings['kind']!r}; known: {known}")
  lab.folder(name).mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  model, extra = KINDS[settings["kind"]](lab, name, settings)
  result = {"name": name, "kind": settings["kind"], "seconds": time.perf_counter() - start, **extra}
  if model is not None:
    result |= describe_model(model)
    if settings.get("evaluate", True):
      result["evaluation"] = {t: evaluate(lab, model, t) for t in corpus.DOMAINS}
    result["lineage"] = lineage.to_json(model.lineage)
    _save(lab, model, name, result.get("evaluation"), result.pop("tokenizer_from", None))
  path = lab.folder(name) / "result.json"
  path.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
  os.replace(path.with_suffix(".tmp"), path)
  return result


def train(lab: Lab, name: str, settings: Settings) -> tuple[model_lib.Model, dict[str, Any]]:
  """Train from a fresh initialisation or from an earlier stage's model.

  Args:
    lab: the experiment.
    name: the stage.
    settings: "spec" (a fresh model) or "model" (an earlier stage, changed by "transform" if
      given); "domains", "batch", "max_flops", "optimizer"; "types" of leaf that train.

  Returns:
    The model and its loss curve.
  """
  model = _start(lab, settings)
  rows = {d: lab.rows(d) for d in settings["domains"]}
  batches = data.batches(rows, batch=settings["batch"], seed=lab.seed)
  workdir = lab.folder(name) / "train"
  model = loop.fit(
    model,
    batches,
    max_flops=settings["max_flops"],
    optimizer=dict(settings["optimizer"]),
    types=settings.get("types"),
    seed=lab.seed,
    workdir=workdir,
    checkpoint_every=settings.get("checkpoint_every", 500),
    log_every=settings.get("log_every", 20),
    label=name,
  )
  records = metrics.read(workdir)
  curve = [(r["flops"], r["loss"]) for r in records if "loss" in r]
  said = f"train(stage={name!r}, domains={tuple(settings['domains'])!r})"
  record = lineage.Record(
    said, {k: _plain(v) for k, v in settings.items()}, seed=lab.seed, driver="fit",
    inputs={"corpus": corpus.digest(lab.documents)}, versions=lineage.versions(),
  )  # fmt: skip
  compiled = [r["compile_seconds"] for r in records if "compile_seconds" in r]
  extra = {"curve": curve, "flops": curve[-1][0], "compile_seconds": sum(compiled)}
  return model_lib.Model(model.spec, model.params, (*model.lineage, record)), extra


def transform(lab: Lab, name: str, settings: Settings) -> tuple[model_lib.Model, dict[str, Any]]:
  """Apply a transform to an earlier stage's model.

  Args:
    lab: the experiment.
    name: the stage.
    settings: "model", "transform", and what it needs: "donors", "driver", "calibration" (a
      domain).

  Returns:
    The model, and a histogram of one kernel.
  """
  del name
  model = lab.model(settings["model"])
  batches: Sequence[np.ndarray] = ()
  if settings.get("calibration"):
    rows = np.concatenate([lab.rows(d)[:, :-1] for d in settings["calibration"]])
    keep = np.linspace(0, len(rows) - 1, lab.text["calibration"]).astype(int)
    batches = np.split(rows[keep], 8)
  materials = collect.Materials(
    batches=batches, donors=[lab.model(d) for d in settings.get("donors", ())]
  )
  go = {"run": drivers.run, "blockwise": drivers.run_blockwise}[settings.get("driver", "run")]
  return go(registry.parse(settings["transform"]), model, materials, seed=lab.seed), {}


def export(lab: Lab, name: str, settings: Settings) -> tuple[None, dict[str, Any]]:
  """Write an earlier stage's model as a Hugging Face directory, every leaf dense.

  Args:
    lab: the experiment.
    name: the stage; the directory is `workdir/name`.
    settings: "model".

  Returns:
    Nothing, and the directory.
  """
  model = lab.model(settings["model"])
  out = lab.workdir / name
  source = lab.folder(settings["model"]) / "model"
  export_lib.to_hf(
    model,
    out,
    overwrite=True,
    tokenizer_from=source,
    evaluation=_figures((lab.result(settings["model"]) or {}).get("evaluation")),
  )
  return None, {"directory": str(out)}


def facts(lab: Lab, name: str, settings: Settings) -> tuple[model_lib.Model, dict[str, Any]]:
  """Train on a small world of facts and edit one of them.

  Args:
    lab: the experiment.
    name: the stage.
    settings: see `fact_stage.edit`.

  Returns:
    The edited model, and what the edit did.
  """
  return fact_stage.edit(lab.folder(name), settings, lab.seed)


def evaluate(lab: Lab, model: model_lib.Model, domain: str) -> dict[str, Any]:
  """Evaluate a model on a domain's held-out documents.

  Args:
    lab: the experiment.
    model: the model.
    domain: which text.

  Returns:
    nll, perplexity, bits_per_byte, tokens, and a 95 % interval of bits per byte over documents.
  """
  length = lab.text["length"]
  found = perplexity.evaluate(
    model, lab.held_out(domain), lab.tokenizer, window=length, stride=length // 2, batch=32
  )
  bounds = bootstrap.interval(found.documents)
  scale = (found.bits_per_byte or 0.0) / found.nll
  return {
    **found.to_json(),
    "ci": [bounds.low * scale, bounds.high * scale],
    "bits_per_nat": scale,
    "documents": found.documents,
  }


def describe_model(model: model_lib.Model) -> dict[str, Any]:
  """Describe a model's size and tree, and the distribution of one kernel's weights.

  Args:
    model: the model.

  Returns:
    JSON values.
  """
  rows = describe.rows(model.params)
  size, nbytes = describe.total(rows)
  kernels = [a for a in model.addresses() if a.endswith("mlp/down/kernel")]
  middle = kernels[len(kernels) // 2]
  counts, edges = np.histogram(np.asarray(leaves.dense(model.leaf(middle)), np.float32), bins=80)
  return {
    "parameters": size,
    "nbytes": nbytes,
    "bits_per_weight": nbytes * 8 / size,
    "tree": [{**dataclasses.asdict(r), "shape": list(r.shape)} for r in rows],
    "histogram": {"address": middle, "counts": counts.tolist(), "edges": edges.tolist()},
  }


def _start(lab: Lab, settings: Settings) -> model_lib.Model:
  if settings.get("spec"):
    spec = models.Spec(vocab_size=lab.tokenizer.get_vocab_size(), **dict(settings["spec"]))
    return model_lib.Model(spec, models.init(spec, jax.random.key(lab.seed)))
  model = lab.model(settings["model"])
  if settings.get("transform"):
    model = drivers.run(registry.parse(settings["transform"]), model, seed=lab.seed)
  return model


def _save(
  lab: Lab, model: model_lib.Model, name: str, evaluation: Any, tokenizer: str | None
) -> None:
  if tokenizer is None:
    tokenizer = str(lab.workdir / "tokenizer")
    bpe.save(lab.tokenizer, tokenizer, context=lab.text["length"])
  out = lab.folder(name) / "model"
  sink.save(model, out, overwrite=True, tokenizer_from=tokenizer, evaluation=_figures(evaluation))


def _figures(evaluation: Any) -> dict[str, float]:
  """Name the figures of a model card."""
  return {
    f"{text}: {key}": numbers[key]
    for text, numbers in (evaluation or {}).items()
    for key in ("nll", "perplexity", "bits_per_byte")
  }


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


KINDS: dict[str, Callable[..., tuple[model_lib.Model | None, dict[str, Any]]]] = {
  "train": train,
  "transform": transform,
  "export": export,
  "facts": facts,
}
