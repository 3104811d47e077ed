# SPDX-License-Identifier: Apache-2.0
"""Lineage: the record of what was done to a model, enough to do it again.

A record holds the canonical spelling of a step and everything its outcome depends on. Replaying
the records on inputs of the recorded digests gives bit-identical outputs on the same platform.
"""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Record:
  """One step in a model's history.

  Attributes:
    expression: canonical one-line spelling, `compress.quantize.rtn(bits=4)`.
    arguments: every argument as bound, defaults included.
    seed: the integer seed of the run.
    index: position of the step in its run; its key is `fold_in(key(seed), index)`.
    driver: "run", "run_blockwise" or "stream".
    inputs: role ("base", "donor 0", "calibration", "batches") to digest.
    recipe: how the inputs were prepared: of calibration text the "samples", "length" and "batch";
      the dtypes that leaves were cast to before the run's first step ("dtype") and after its
      last ("out_dtype").
    versions: of treesurgeon, jax and python, and the platform.
    notes: what the step reported of itself (attained errors, warnings).
  """

  expression: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0
  index: int = 0
  driver: str = "run"
  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def to_json(records: tuple[Record, ...]) -> list[dict[str, Any]]:
  """Turn records into JSON values.

  Args:
    records: a model's lineage.

  Returns:
    One dict a record, oldest first.

  Example:
    >>> to_json((Record("grow.g_stack(growth=2)"),))[0]["expression"]
    'grow.g_stack(growth=2)'
  """
  return [dataclasses.asdict(r) for r in records]


def from_json(items: list[dict[str, Any]]) -> tuple[Record, ...]:
  """Read records back from JSON values.

  Args:
    items: what `to_json` returned.

  Returns:
    The records.

  Raises:
    ValueError: for an unknown field.

  Example:
    >>> from_json([{"expression": "merge.linear()"}])[0].driver
    'run'
  """
  known = {f.name for f in dataclasses.fields(Record)}
  for item in items:
    unknown = sorted(set(item) - known)
    if unknown:
      raise ValueError(f"lineage record has unknown field {unknown[0]!r}; known: {sorted(known)}")
  return tuple(Record(**item) for item in items)


def versions() -> dict[str, str]:
  """Name what the bits of a result depend on besides its inputs.

  Returns:
    Versions of treesurgeon, jax and python, and the platform computed on.

  Example:
    >>> sorted(versions())
    ['jax', 'platform', 'python', 'treesurgeon']
  """
  return {
    "treesurgeon": importlib.metadata.version("treesurgeon"),
    "jax": importlib.metadata.version("jax"),
    "python": platform.python_version(),
    "platform": jax.default_backend(),
  }


def digest(path: str | Path) -> str:
  """Hash a file's content.

  Args:
    path: file to read.

  Returns:
    Hexadecimal sha256.

  Example:
    >>> import tempfile, os
    >>> f = tempfile.NamedTemporaryFile(delete=False); f.close()
    >>> digest(f.name)[:8]; os.unlink(f.name)
    'e3b0c442'
  """
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
