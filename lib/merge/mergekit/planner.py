# SPDX-License-Identifier: Apache-2.0
"""From a configuration to views of the models' tensors and the steps that merge them.

The steps are ordinary registered ones on tensors under their own names, so a merge is streamed,
sharded, recorded and replayed like anything else. Where mergekit computes in `dtype`, steps compute
in float32 and round once, to `dtype`; with `dtype: float32` the two agree.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from treesurgeon.core import needs, step
from treesurgeon.io import (
  chat_templates,
  raw,
  remapped,
  tokenizer_files,
  vocabulary,
)
from treesurgeon.merge.mergekit import assembly, methods, opening, parameters, values
from treesurgeon.merge.mergekit import config as config_lib

CONFIG = "mergekit_config.yml"
_WIDE = ("arcee_fusion", "ramplus_tl")  # mergekit saves their float32 whatever `dtype` says
_AVERAGING = ("karcher", "linear")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a configuration asks for, ready to be carried out.

  Attributes:
    base: the tensors that are changed, under the output's names.
    donors: the others, by the names under which `transform` asks for them.
    transform: the merge.
    config: the output's config.json.
    models: every model that is read, by its role in the lineage: "base", "donor 0".
    companions: directory whose tokenizer and license come along.
    dtype: of the configuration.
    out_dtype: dtype the output is cast to, or None.
    notes: what a reader should be told, a sentence each.
    texts: further files of the output, name to content.
    document: the configuration, as parsed.
  """

  base: raw.View
  donors: Mapping[str, raw.View]
  transform: step.Transform
  config: Mapping[str, Any]
  models: Mapping[str, Any]
  companions: pathlib.Path | None
  dtype: str | None = None
  out_dtype: str | None = None
  notes: tuple[str, ...] = ()
  texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  document: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plan(
  config: config_lib.Config,
  *,
  lookup: methods.Lookup,
  opened: Callable[[str], Any] | None = None,
  compat: str = "mergekit",
) -> Plan:
  """Turn a configuration into views and steps, looking at headers only.

  Args:
    config: the merge.
    lookup: finds a factory by its name in the registry.
    opened: opens a model by the configuration's name; None takes directories.
    compat: "mergekit" or "paper": whose granularity is meant where they differ.

  Returns:
    The plan.

  Raises:
    ValueError: for parameters that are unknown, missing or of a wrong type, and for models that do
      not exist or do not fit together.
  """
  method, factory = methods.find(config.method, lookup)
  found = values.Values(config, method, factory, compat)
  for part in config.modules.values():
    for piece in part.slices if config.form != "models" else ():
      methods.check_inputs(piece, config, method)
  sources = {name: (opened or opening.open_model)(name) for name in config.models()}
  settings = {name: opening.settings(source) for name, source in sources.items()}
  homes = {name: opening.home(source) for name, source in sources.items()}
  readers, texts, rows, notes = _vocabulary(config, sources, homes)
  made = assembly.Assembly(config, method, readers, settings)
  entries = made.entries
  if not entries:
    raise ValueError("the configuration leaves no tensor in the output; check its layer_range")
  base, columns, merged = _views(config, method, readers, entries)
  donors = dict(zip(_names(config, method, entries, len(columns)), columns, strict=True))
  names = parameters.Names(e.name for e in entries)
  transform = found.transform(merged, list(donors), names)
  notes = [*notes, *made.notes, *found.notes, *_traps(config, method, compat, found.stepped())]
  texts[CONFIG] = yaml.safe_dump(dict(config.document), sort_keys=False, allow_unicode=True)
  first = next(iter(sources))
  out_config = made.config
  if rows is not None:
    out_config = tokenizer_files.with_vocab_size(out_config, rows)
  return Plan(
    base=base,
    donors=donors,
    transform=transform,
    config=out_config,
    models={_role(k): source for k, source in enumerate(sources.values())},
    companions=homes[first],
    dtype=config.dtype,
    out_dtype=config.out_dtype,
    notes=tuple(notes),
    texts=texts,
    document=config.document,
  )


def _vocabulary(
  config: config_lib.Config,
  sources: Mapping[str, Any],
  homes: Mapping[str, pathlib.Path | None],
) -> tuple[Mapping[str, Any], dict[str, str], int | None, list[str]]:
  """Bring all models to one vocabulary if asked to; (sources, files, rows, notes)."""
  if config.tokenizer is None and config.chat_template is None:
    return sources, {}, None, []
  directories = {name: home for name, home in homes.items() if home is not None}
  if config.tokenizer is None:
    first = next(iter(directories.values()))
    held = [tokenizer_files.template(d) for d in directories.values()]
    template = chat_templates.resolve(str(config.chat_template), held)
    return sources, tokenizer_files.files(first, None, template), None, []
  wanted = config.tokenizer
  config_lib.known(wanted, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
  made = vocabulary.plan(
    directories,
    base=config.base,
    source=str(wanted.get("source", "union")),
    tokens=wanted.get("tokens"),
    pad_to_multiple_of=wanted.get("pad_to_multiple_of"),
    chat_template=config.chat_template,
  )
  readers = remapped.remap(made, sources, base=config.base, dtype=config.dtype)
  return readers, dict(made.files), made.size, list(made.notes)


def _views(
  config: config_lib.Config,
  method: methods.Method,
  sources: Mapping[str, needs.Source],
  entries: Sequence[assembly.Entry],
) -> tuple[raw.View, list[raw.View], list[assembly.Entry]]:
  """Say where each tensor and each of its donors is read; (base, donors, what steps change)."""
  base: dict[str, raw.Place] = {}
  columns: list[dict[str, raw.Place]] = []
  merged = []
  roles = [values.roles(e, config, method) for e in entries]
  width = max(len(r.donors) for r in roles)
  columns = [{} for _ in range(width)]
  for entry, role in zip(entries, roles, strict=True):
    inputs = [
      (sources[one.model], name) for one, name in zip(entry.piece.inputs, entry.names, strict=True)
    ]
    stored = [source.struct(name).dtype for source, name in inputs]
    source, name = inputs[role.first]
    if not all(jnp.issubdtype(d, jnp.floating) for d in stored):
      base[entry.name] = raw.Place(source, name, None, tuple(inputs[k] for k in role.donors))
      for column in columns:
        column[entry.name] = base[entry.name]
      continue
    merged.append(entry)
    first, work = _dtypes(config, stored, role.first)
    base[entry.name] = raw.Place(source, name, first)
    for k, column in enumerate(columns):
      # Where a slice has fewer models nobody asks for this donor.
      at = role.donors[k] if k < len(role.donors) else role.first
      lossy = jnp.promote_types(stored[at], work) != work
      column[entry.name] = raw.Place(*inputs[at], work if lossy else None)
  return raw.View(base), [raw.View(c) for c in columns], merged


def _dtypes(config: config_lib.Config, stored: Sequence[Any], first: int) -> tuple[Any, Any]:
  """Choose what the changed tensor is cast to, and the dtype that inputs are rounded to.

  A step rounds its float32 result to the dtype of the tensor it changes. With float32 arithmetic
  that may be the output's dtype at once, which spares two casts.
  """
  if config.dtype is not None:
    work = jnp.dtype(config.dtype)
  else:
    work = stored[0]
    for other in stored[1:]:
      work = jnp.promote_types(work, other)
    work = jnp.dtype(np.float32) if work == np.float64 else jnp.dtype(work)
  out = work if config.out_dtype is None else jnp.dtype(config.out_dtype)
  if stored[first] == (out if work == np.float32 else work):
    return None, work
  return work, work


def _names(
  config: config_lib.Config,
  method: methods.Method,
  entries: Sequence[assembly.Entry],
  width: int,
) -> list[str]:
  """Name donors after their directories, or by number where slices draw on several."""
  held: list[dict[str, None]] = [{} for _ in range(width)]
  for entry in entries:
    for k, at in enumerate(values.roles(entry, config, method).donors):
      held[k][entry.piece.inputs[at].model] = None
  names = [next(iter(models)) for models in held]
  plain = all(len(models) == 1 for models in held) and len(set(names)) == width
  return names if plain else [f"source {k + 1}" for k in range(width)]


def _role(index: int) -> str:
  return "base" if index == 0 else f"donor {index - 1}"


def _traps(
  config: config_lib.Config, method: methods.Method, compat: str, stepped: bool
) -> list[str]:
  """Say where a configuration does what its author may not expect."""
  found = []
  if stepped:
    found.append(
      "gradients run over the layers: embeddings, final norm and head take the first value, as in "
      "mergekit"
    )
  if config.method in _AVERAGING and config.base is not None and config.form == "models":
    found.append(f"{config.method} takes the base_model for one more model to average")
  elif method.base == "ignored" and config.base is not None and config.form != "models":
    found.append(f"{config.method} uses the base_model for config.json and tokenizer alone")
  narrow = config.dtype not in (None, "float32") and config.out_dtype is None
  if config.method in _WIDE and compat == "mergekit" and narrow:
    found.append(
      f"{config.method} is saved in {config.dtype}, as dtype says; mergekit saves float32 unless "
      "out_dtype is set"
    )
  return found
