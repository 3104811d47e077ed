# SPDX-License-Identifier: Apache-2.0
"""Do again what a lineage records, and tell whether the outcome is the same to the bit."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from treesurgeon.core import lineage, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.merge import mergekit
from treesurgeon.run import casting, collect, drivers, merging

# A leaf step has the same outcome whole as streamed, so a model in memory replays either.
_DRIVERS = {
  "run": drivers.run, "stream": drivers.run, "run_blockwise": drivers.run_blockwise
}  # fmt: skip


def replay(
  records: Sequence[lineage.Record],
  model: model_lib.Model,
  materials: Sequence[collect.Materials] = (),
  *,
  parse: Callable[[str], step.Transform],
  any_version: bool = False,
) -> model_lib.Model:
  """Apply a lineage's steps again, with their drivers, seeds and indices.

  Args:
    records: what to do, oldest first.
    model: the model that the first record started from.
    materials: what each run was given; a run begins where a record's index is 0. The last one
      serves all later runs.
    parse: reads a spelling, `registry.parse`.
    any_version: replay records of other versions too, whose bits may differ.

  Returns:
    The model, with the records it made in its lineage.

  Raises:
    ValueError: for a record of another version or platform, of a driver that is not ours, or made
      from other inputs than those given.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon import registry
    >>> m = model_lib.Model(None, {"layers": {"0:1": {"up": {"kernel": jnp.ones((1, 8, 4))}}}})
    >>> done = drivers.run(registry.parse("compress.quantize.rtn(bits=3)"), m, seed=5)
    >>> again = replay(done.lineage, m, parse=registry.parse)
    >>> differing(done, again), again.lineage == done.lineage
    ([], True)
  """
  runs = _runs(records)
  given = list(materials) or [collect.Materials()]
  for i, run in enumerate(runs):
    mine = given[min(i, len(given) - 1)]
    for record in run:
      _check(record, mine, any_version)
      if "mergekit" in record.recipe:
        raise ValueError(f"{record.expression} worked on tensors by their names; use remerge")
    dtype, out_dtype = (run[0].recipe.get(k) for k in ("dtype", "out_dtype"))
    mine = _cast_donors(mine, dtype)
    model = _cast(model, dtype)
    for record in run:
      model = _DRIVERS[record.driver](
        parse(record.expression),
        model,
        dataclasses.replace(mine, digests=record.inputs, recipe=record.recipe),
        seed=record.seed,
        first=record.index,
      )
    model = _cast(model, out_dtype)
  return model


def remerge(
  record: lineage.Record,
  out: str | pathlib.Path,
  *,
  lookup: Callable[[str], Callable[..., step.Transform]],
  any_version: bool = False,
) -> pathlib.Path:
  """Carry out a recorded mergekit configuration again, into a directory.

  Args:
    record: of the merge; its configuration names the directories to read.
    out: directory to write.
    lookup: finds a method's factory by its name, `registry.load`.
    any_version: merge again by another version too, whose bits may differ.

  Returns:
    The output directory, with the same tensors to the bit.

  Raises:
    ValueError: for a record of something else, of another version or platform, or of other inputs
      than the directories now hold.
  """
  if "mergekit" not in record.recipe:
    raise ValueError(f"{record.expression} was not made by a mergekit configuration; use replay")
  _check(record, collect.Materials(), any_version)
  configs = mergekit.order([mergekit.parse(d) for d in record.recipe["mergekit"]])
  return merging.merge(
    configs, out, lookup=lookup, compat=record.recipe["compat"], seed=record.seed,
    expect=record.inputs,
  )  # fmt: skip


def differing(a: needs.Source, b: needs.Source) -> list[str]:
  """List the leaves in which two models are not the same to the bit.

  Args:
    a: a model.
    b: another.

  Returns:
    Addresses in natural order, those that one model lacks included.

  Example:
    >>> m = model_lib.Model(None, {"w": np.zeros(2), "v": np.zeros(2)})
    >>> differing(m, m.update({"w": np.array([0.0, -0.0])}))
    ['w']
  """
  first, second = set(a.addresses()), set(b.addresses())
  odd = [
    n for n in first | second if n not in first & second or _bits(a.leaf(n)) != _bits(b.leaf(n))
  ]
  return sorted(odd, key=paths.natural)


def _runs(records: Sequence[lineage.Record]) -> list[list[lineage.Record]]:
  runs: list[list[lineage.Record]] = []
  for record in records:
    if record.index == 0 or not runs:
      runs.append([])
    runs[-1].append(record)
  return runs


def _check(record: lineage.Record, materials: collect.Materials, any_version: bool) -> None:
  if record.driver not in _DRIVERS:
    raise ValueError(
      f"{record.expression} was made by {record.driver!r}; replay knows {', '.join(_DRIVERS)}"
    )
  now = lineage.versions()
  odd = sorted(k for k, v in record.versions.items() if now.get(k) != v)
  if odd and not any_version:
    raise ValueError(
      f"{record.expression} was made with {odd[0]} {record.versions[odd[0]]}, this is "
      f"{now.get(odd[0])}; bits may differ, any_version=True replays it all the same"
    )
  for role, digest in materials.inputs.items():
    if record.inputs.get(role, digest) != digest:
      raise ValueError(
        f"{record.expression} was made from another {role}: sha256 {record.inputs[role]}, not "
        f"{digest}"
      )


def _cast(model: model_lib.Model, dtype: str | None) -> model_lib.Model:
  if dtype is None:
    return model
  return model.update({a: casting.cast(model.leaf(a), dtype) for a in model.addresses()})


def _cast_donors(materials: collect.Materials, dtype: str | None) -> collect.Materials:
  if dtype is None:
    return materials
  opens = materials.open_model
  return dataclasses.replace(
    materials,
    donors=[casting.Cast(d, dtype) for d in materials.donors],
    open_model=None if opens is None else lambda name: casting.Cast(opens(name), dtype),
  )


def _bits(leaf: Any) -> tuple:
  arrays, structure = jax.tree.flatten(leaf)
  host = [np.asarray(x) for x in arrays]
  return structure, tuple((x.dtype, x.shape, x.tobytes()) for x in host)
