# SPDX-License-Identifier: Apache-2.0
"""Units of a network that may be renumbered, and the renumbering of them.

A group says where its units lie in which leaves; `permutations` lists the groups of an
architecture. An index is a permutation of a whole network: for every axis that a group touches the
order of its entries. Groups are applied one after another, so that they may nest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Circuit = tuple["Member", int, "Member", int]  # two members, and how many units lie in each
Index = Mapping[str, Mapping[int, np.ndarray]]  # address -> axis -> which old entry comes where


@dataclasses.dataclass(frozen=True)
class Member:
  """Where a group's units lie along one axis of one leaf.

  Unit u occupies, for each r below `repeat`, the entries
  `start + r * stride + u * block` up to the next unit's.

  Attributes:
    address: the leaf.
    axis: its axis.
    start: first entry.
    repeat: how often the run of all units comes; a convolution's input channels come once for each
      place of its window.
    block: entries of a unit within a run; a head has `head_dim`.
    stride: from one run to the next; 0 means that runs are adjacent.
  """

  address: str
  axis: int
  start: int = 0
  repeat: int = 1
  block: int = 1
  stride: int = 0

  def places(self, size: int) -> np.ndarray:
    """Return the entries of all units.

    Args:
      size: number of units.

    Returns:
      int32 array (repeat, size, block).

    Example:
      >>> Member("w", 0, repeat=2).places(3).ravel().tolist()
      [0, 1, 2, 3, 4, 5]
    """
    stride = self.stride or size * self.block
    runs = self.start + stride * np.arange(self.repeat)[:, None, None]
    units = self.block * np.arange(size)[None, :, None]
    return (runs + units + np.arange(self.block)[None, None, :]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Group:
  """Units that are renumbered together.

  Attributes:
    name: like "layers/3/mlp" or "residual".
    size: number of units.
    members: where the units lie.
    inner: names of the groups within this group's units.
    circuits: pairs of members whose product over the units' inner dimensions does not depend on the
      order of these: values with outputs, queries with keys. One unit serves all of the other's.
    dims: inner dimensions of a unit, for `circuits`.
    taps: (tap, layer, member of the activations' last axis) where the units can be observed.
  """

  name: str
  size: int
  members: tuple[Member, ...]
  inner: tuple[str, ...] = ()
  circuits: tuple[Circuit, ...] = ()
  dims: int = 1
  taps: tuple[tuple[str, int, Member], ...] = ()


def compose(
  index: Mapping[str, Mapping[int, np.ndarray]], group: Group, order: Sequence[int] | np.ndarray
) -> dict[str, dict[int, np.ndarray]]:
  """Renumber a group's units on top of what an index does already.

  Args:
    index: from `identity`, or an earlier `compose`; not modified.
    group: whose units.
    order: which unit comes to each place.

  Returns:
    The composed index.

  Example:
    >>> one = Group("g", 2, (Member("w", 0),))
    >>> compose({"w": {0: np.arange(3)}}, one, [1, 0])["w"][0].tolist()
    [1, 0, 2]
  """
  out = {a: dict(axes) for a, axes in index.items()}
  for m in group.members:
    old = out[m.address][m.axis]
    out[m.address][m.axis] = old[entries(m, group.size, order, len(old))]
  return out


def entries(
  member: Member, size: int, order: Sequence[int] | np.ndarray, length: int
) -> np.ndarray:
  """Write a permutation of units as one of the entries of an axis.

  Args:
    member: where the units lie.
    size: number of units.
    order: which unit comes to each place.
    length: length of the axis.

  Returns:
    int32 entries (length,).

  Example:
    >>> entries(Member("w", 0, block=2), 2, [1, 0], 5).tolist()
    [2, 3, 0, 1, 4]
  """
  at = member.places(size)
  out = np.arange(length, dtype=np.int32)
  out[at] = at[:, np.asarray(order)]
  return out


def apply(flat: Mapping[str, Any], index: Index) -> dict[str, Any]:
  """Renumber units in a network's leaves.

  Args:
    flat: address to array.
    index: address to axis to entries.

  Returns:
    All leaves; those in `index` permuted.

  Example:
    >>> apply({"w": np.arange(3)}, {"w": {0: np.array([2, 0, 1])}})["w"].tolist()
    [2, 0, 1]
  """
  out = dict(flat)
  for address, axes in index.items():
    for axis, order in axes.items():
      out[address] = out[address].take(order, axis=axis)
  return out
