# SPDX-License-Identifier: Apache-2.0
"""What a step must be told besides the model, declared without data.

A driver reads the needs, gathers the evidence, and hands it to the step. Evidence is a mapping
from the need's name to its value; for every need that is about leaves the value is itself a
mapping from address to value.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from treesurgeon.core import paths

Evidence = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Statistic:
  """A statistic of the inputs of linear kernels, or of the loss at leaves.

  Attributes:
    fold: a name from `stats.FOLDS`, such as "second_moment", which is handed over as the fold's
      state; or a statistic of the loss, taken before the step changes anything: "fisher" and
      "gradient", arrays of the leaf's shape, or "slope", a `stats.Slope`.
    select: regular expression over addresses; None means the step's own selection.
    of: "model" takes it on the model as it stands; "donors" on every donor and that donor's
      batches, and hands over a tuple with one value a donor; "sets", for statistics of the loss,
      on the model with each of several calibration sets, a tuple with one value a set.
    block: of "fisher", takes this many consecutive rows of a column together and hands over the
      diagonal blocks, (..., blocks, cols, block, block), the last ones padded with zeros.
  """

  fold: str
  select: str | None = None
  of: Literal["model", "donors", "sets"] = "model"
  block: int | None = None


@dataclasses.dataclass(frozen=True)
class Donors:
  """Other models' leaves at the step's addresses.

  Attributes:
    models: names a driver resolves to models (directories); empty takes the donors
      that were handed to the driver.
    lazy: hand over, for each address, a sequence that reads a donor's leaf when it is indexed; for
      steps that let go of one before they take the next. Otherwise a tuple of all.
    alike: whether donors must have the base's leaves and shapes; a teacher need only share its
      vocabulary, and is read as a whole from `Aligned.sources`.
  """

  models: tuple[str, ...] = ()
  lazy: bool = False
  alike: bool = True


@dataclasses.dataclass(frozen=True)
class Requests:
  """Edit requests, tokenized.

  Attributes:
    path: JSON file of requests; empty takes those handed to the driver.
  """

  path: str = ""


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches, for steps that train.

  Attributes:
    of: "model" hands over one list of batches; "donors" a tuple with each donor's list, which
      has but one entry where all donors share their batches.
  """

  of: Literal["model", "donors"] = "model"


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What goes into blocks and what should come out, for steps that tune a block as a whole.

  The evidence is a mapping from a block's name, "layers/3", to its `Block`.

  Attributes:
    select: regular expression over addresses; blocks that hold a match are wanted. None means the
      step's own selection.
  """

  select: str | None = None


Need = Statistic | Donors | Requests | Batches | Blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
  """One block on the calibration data, before anything in it is changed.

  Attributes:
    inputs: what enters it now that the blocks before it were changed, (rows, places, width); from
      the driver `run`, which changes them all at once, what enters it in the model as it was.
    targets: what it gives in the model as it was, on that model's own hidden states.
    params: its leaves, nested.
    layer: its index.
    call: (params, h, layer) -> the block's output; one object for all blocks of a network.
  """

  inputs: Any
  targets: Any
  params: Any
  layer: Any
  call: Callable[[Any, Any, Any], Any] = dataclasses.field(metadata={"static": True})

  def forward(self, changes: Mapping[str, Any], h: Any) -> Any:
    """Run the block with some of its leaves replaced.

    Args:
      changes: relative address ("mlp/up/kernel") to leaf, array or compressed; the others stay.
      h: some rows of the inputs.

    Returns:
      The block's output.
    """
    kept = paths.walk(self.params)
    unknown = [a for a in changes if a not in kept]
    if unknown:
      raise ValueError(f"{unknown[0]!r} is not in the block, which holds {', '.join(kept)}")
    return self.call(paths.nest({**kept, **changes}), h, self.layer)


@runtime_checkable
class Source(Protocol):
  """A model read leaf by leaf: a directory, a checkpoint, or a model in memory."""

  @property
  def spec(self) -> Any:
    """Architecture description."""
    ...

  def addresses(self) -> Sequence[str]:
    """List the addresses of every leaf."""
    ...

  def leaf(self, address: str) -> Any:
    """Read one leaf."""
    ...

  def struct(self, address: str) -> Any:
    """Describe one leaf's shapes and dtypes, without reading it."""
    ...


class Aligned(Mapping[str, Sequence[Any]]):
  """Several sources as one mapping: address to each source's leaf, read on demand.

  Attributes:
    sources: the sources.
    lazy: whether an address gives `Leaves`, which read one leaf at a time, or a tuple of all.
  """

  def __init__(self, sources: Sequence[Source], *, lazy: bool = False):
    self.sources = tuple(sources)
    self.lazy = lazy

  def __getitem__(self, address: str) -> Sequence[Any]:
    leaves = Leaves(self.sources, address)
    return leaves if self.lazy else tuple(leaves)

  def __iter__(self) -> Iterator[str]:
    return iter(self.sources[0].addresses())

  def __len__(self) -> int:
    return len(self.sources[0].addresses())


class Leaves(Sequence[Any]):
  """One address' leaf in each of several sources, read anew whenever it is indexed."""

  def __init__(self, sources: Sequence[Source], address: str):
    self._sources = tuple(sources)
    self._address = address

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return Leaves(self._sources[index], self._address)
    return self._sources[index].leaf(self._address)

  def __len__(self) -> int:
    return len(self._sources)
