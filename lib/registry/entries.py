# SPDX-License-Identifier: Apache-2.0
"""What the tables hold of a method, an architecture or a procedure, and commands they share."""

import dataclasses
from typing import Literal

# What shows the verdict of several methods at once.
DIRECTIONS = (
  "python -P -m treesurgeon.experiments.directions --config=configs/directions.py --workdir=DIR"
)

CONNECTIVITY = (
  "python -P -m treesurgeon.experiments.connectivity --config=configs/connectivity.py --workdir=DIR"
)

MERGE_BENCH = (
  "python -P -m treesurgeon.experiments.merge_bench --config=configs/merge_bench.py:digits "
  "--workdir=DIR"
)

STUDY = "python -P -m treesurgeon.experiments.ptq_study --config=configs/ptq_study.py --workdir=DIR"
MINIFLOATS = (
  "python -P -m treesurgeon.experiments.minifloat_study --config=configs/minifloat.py --workdir=DIR"
)
PRUNE = (
  "python -P -m treesurgeon.experiments.prune_directions --config=configs/prune.py --workdir=DIR"
)
STRUCTURE = (
  "python -P -m treesurgeon.experiments.structure_directions --config=configs/structure.py "
  "--workdir=DIR"
)
QUANTIZE = (
  "python -P -m treesurgeon.experiments.quantize_directions --config=configs/quantize.py "
  "--workdir=DIR"
)

VECTORS = "python -P -m treesurgeon.experiments.vq_directions --config=configs/vq.py --workdir=DIR"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One method.

  Attributes:
    factory: "module:function".
    paper: authors, title, year, identifier.
    oracle: the test file that checks it exactly.
    verdict: "reproduced", "not reproduced", or "exact only".
    command: what shows the verdict.
    note: what a reader of the ledger should know.
  """

  factory: str
  paper: str
  oracle: str
  verdict: Literal["reproduced", "not reproduced", "exact only"] = "exact only"
  command: str = ""
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One family of networks, all of which `lib/models` covers by the switches of one spec.

  Attributes:
    paper: authors, title, year, identifier.
    model_types: `model_type` in config.json.
    note: what a reader of the ledger should know.
  """

  paper: str
  model_types: tuple[str, ...]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Procedure:
  """What works on models but is no transform: a study, a measure, a converter.

  Attributes:
    file: where it is, from the root of the repository.
    paper: authors, title, year, identifier.
    oracle: the test file that checks it.
    verdict: as of an `Entry`.
    command: what runs it, or shows the verdict.
    note: what a reader of the ledger should know.
  """

  file: str
  paper: str
  oracle: str
  verdict: Literal["reproduced", "not reproduced", "exact only"] = "exact only"
  command: str = ""
  note: str = ""
