# SPDX-License-Identifier: Apache-2.0
"""Carry out mergekit's configurations, streamed from directories to a directory.

Merges that others refer to by name are written next to the output and removed when it is complete.
What was done is found again by a fingerprint of the configuration and the state of the files, so an
interrupted run goes on where it was; the files are hashed, for the lineage, while the merge runs.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from treesurgeon.core import lineage, step
from treesurgeon.io import raw, staging, writer
from treesurgeon.merge import mergekit
from treesurgeon.run import casting, collect, drivers

_JOB = "merge.job"


def merge(
  configs: Sequence[mergekit.Config],
  out: str | pathlib.Path,
  *,
  lookup: Callable[[str], Callable[..., step.Transform]],
  compat: str = "mergekit",
  seed: int = 0,
  overwrite: bool = False,
  max_shard_bytes: int | float = writer.MAX_SHARD_BYTES,
  expect: Mapping[str, str] | None = None,
  tell: Callable[[str], None] | None = None,
) -> pathlib.Path:
  """Carry out merges in order; the last one makes the output.

  Args:
    configs: as `mergekit.read` returns them.
    out: directory to write.
    lookup: finds a method's factory by its name in the registry.
    compat: "mergekit" or "paper", see `mergekit.plan`.
    seed: of everything random.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    expect: digests that the last merge's inputs must have, by role; None for any.
    tell: takes a sentence on what a reader may not expect.

  Returns:
    The output directory.

  Raises:
    ValueError: for configurations or models that do not fit, or inputs other than expected.
    OSError: if the disk is full; finished shards are kept for a rerun.
  """
  staging.check_output(out, overwrite)
  out = pathlib.Path(out).absolute()
  between = out.with_name(f".{out.name}.merges")
  named: dict[str, pathlib.Path] = {}
  # Notice what does not fit before anything is written, as far as it can be seen.
  for config in configs[:-1]:
    named[str(config.name)] = between / hashlib.sha256(str(config.name).encode()).hexdigest()[:16]

  def opened(name: str) -> Any:
    model, plus, adapter = name.partition("+")
    return mergekit.open_model(f"{named.get(model, model)}{plus}{adapter}")

  for i, config in enumerate(configs):
    last = i + 1 == len(configs)
    plan = mergekit.plan(config, lookup=lookup, opened=opened, compat=compat)
    for note in plan.notes:
      if tell is not None:
        tell(note)
    job = _job(plan, seed, compat)
    target = out if last else named[str(config.name)]
    if not last and _made(target, job):
      continue
    recipe = {
      "mergekit": [dict(c.document) for c in configs[: i + 1]],
      "compat": compat,
      **{k: v for k in ("dtype", "out_dtype") if (v := getattr(plan, k)) is not None},
    }
    limits = {"overwrite": overwrite or not last, "max_shard_bytes": max_shard_bytes}
    _write(plan, target, job, seed, recipe, limits, expect=expect if last else None, last=last)
  if between.is_dir():
    shutil.rmtree(between)
  return out


class _Pending(Mapping[str, str]):
  """Digests that are waited for when they are asked for."""

  def __init__(self, futures: Mapping[str, concurrent.futures.Future[str]]):
    self._futures = futures

  def __getitem__(self, role: str) -> str:
    return self._futures[role].result()

  def __iter__(self) -> Iterator[str]:
    return iter(self._futures)

  def __len__(self) -> int:
    return len(self._futures)


def _write(
  plan: mergekit.Plan,
  out: pathlib.Path,
  job: str,
  seed: int,
  recipe: Mapping[str, Any],
  limits: Mapping[str, Any],
  *,
  expect: Mapping[str, str] | None,
  last: bool,
) -> None:
  pool = concurrent.futures.ThreadPoolExecutor(1)
  try:
    hashing = {role: pool.submit(mergekit.digest, source) for role, source in plan.models.items()}
    materials = collect.Materials(
      open_model=plan.donors.__getitem__, digests=_Pending(hashing), recipe=recipe
    )
    names = plan.base.addresses()
    with raw.Sink(
      out, plan.config, tensors=len(names), companions=plan.companions, job=job, **limits
    ) as sink:
      target = casting.CastSink(sink, plan.out_dtype)
      records = _apply(plan, target, materials, seed)
      told = dict(materials.digests)
      for role, found in told.items():
        if expect is not None and expect.get(role, found) != found:
          raise ValueError(f"another {role} than before: sha256 {found}, not {expect[role]}")
      before = getattr(plan.models["base"], "lineage", ())
      texts = plan.texts if last else {**plan.texts, _JOB: job}
      recipe_text = plan.texts[mergekit.CONFIG]
      sink.close((*before, *records), inputs=told, texts=texts, recipe=recipe_text)
  finally:
    pool.shutdown(cancel_futures=True)


def _apply(
  plan: mergekit.Plan, sink: drivers.Sink, materials: collect.Materials, seed: int
) -> tuple[lineage.Record, ...]:
  """Stream the merge; a method that takes the model as one gets it in memory."""
  if drivers.streamable(plan.transform):
    return drivers.stream(plan.transform, plan.base, sink, materials, seed=seed)
  held = raw.load(plan.base)
  made = drivers.run(plan.transform, held, materials, seed=seed)
  for name in made.addresses():
    sink.write(name, made.leaf(name))
  return made.lineage


def _job(plan: mergekit.Plan, seed: int, compat: str) -> str:
  """Fingerprint all that the output's bytes depend on."""
  stamps = {role: mergekit.stamp(source) for role, source in plan.models.items()}
  document = json.dumps(plan.document, sort_keys=True, default=str)
  texts = sorted(plan.texts.items())
  parts = (step.spell(plan.transform), document, compat, seed, sorted(stamps.items()), texts)
  return hashlib.sha256(repr(parts).encode()).hexdigest()


def _made(out: pathlib.Path, job: str) -> bool:
  """Tell whether an earlier run has completed a merge that others refer to."""
  file = out / _JOB
  return file.is_file() and file.read_text() == job
