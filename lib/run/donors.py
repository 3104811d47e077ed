# SPDX-License-Identifier: Apache-2.0
"""Statistics of donors: each donor's own, on that donor's own batches.

One donor is in memory at a time. Donors that share their batches share the embedded batches too
where a driver walks through the blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treesurgeon.core import meshes, needs, paths
from treesurgeon.core import model as model_lib
from treesurgeon.run import gradients, statistics


class Together(Mapping[str, tuple[Any, ...]]):
  """Several mappings from address as one: address to a tuple with each one's value."""

  def __init__(self, views: Sequence[Mapping[str, Any]]):
    self._views = tuple(views)

  def __getitem__(self, address: str) -> tuple[Any, ...]:
    return tuple(v[address] for v in self._views)

  def __iter__(self) -> Iterator[str]:
    return iter(self._views[0])

  def __len__(self) -> int:
    return len(self._views[0])


def deal(shared: Any, own: Sequence[Any], count: int) -> tuple[Any, ...]:
  """Give each donor its batches.

  Args:
    shared: batches for all donors, where they have none of their own.
    own: each donor's batches; empty if they share.
    count: number of donors.

  Returns:
    `count` collections of batches, one and the same where they are shared.

  Raises:
    ValueError: if `own` are given for another number of donors.

  Example:
    >>> deal(["a"], (), 2), deal(["a"], (["b"], ["c"]), 2)
    ((['a'], ['a']), (['b'], ['c']))
  """
  if not len(own):
    return (shared,) * count
  if len(own) != count:
    raise ValueError(
      f"calibration text was given for {len(own)} donors of {count}; give one a donor, or one for "
      "all of them"
    )
  return tuple(own)


def layer(source: needs.Source, index: int) -> dict[str, Any]:
  """Read one layer of a donor, unstacked.

  Args:
    source: the donor.
    index: which layer.

  Returns:
    The layer's leaves, nested.

  Example:
    >>> import numpy as np
    >>> m = model_lib.Model(None, {"layers": {"0:2": {"w": np.arange(2)}}})
    >>> int(layer(m, 1)["w"])
    1
  """
  start = f"layers/{index}/"
  names = [a for a in source.addresses() if a.startswith(start)]
  return meshes.to_auto(paths.nest({a[len(start) :]: source.leaf(a) for a in names}))


def outer(source: needs.Source) -> dict[str, Any]:
  """Read what lies outside a donor's layers.

  Args:
    source: the donor.

  Returns:
    The leaves, nested.

  Example:
    >>> import numpy as np
    >>> outer(model_lib.Model(None, {"w": 1, "layers": {"0:1": {"w": np.zeros(1)}}}))
    {'w': 1}
  """
  names = [a for a in source.addresses() if not a.startswith("layers/")]
  return meshes.to_auto(paths.nest({a: source.leaf(a) for a in names}))


def gather(
  wants: Mapping[str, needs.Statistic],
  sources: Sequence[needs.Source],
  batches: Sequence[Any],
  names: Sequence[str],
) -> dict[str, Mapping[str, tuple[Any, ...]]]:
  """Take statistics on every donor, one donor after another.

  Args:
    wants: statistics by name.
    sources: donors.
    batches: each donor's batches.
    names: addresses of the base.

  Returns:
    For each name, address to a tuple with one value a donor.

  Raises:
    ValueError: as `statistics.wanted`, `statistics.covered` and `gradients.take`, naming the
      donor.
  """
  taps = {n: w for n, w in wants.items() if w.fold not in gradients.FOLDS}
  want = statistics.wanted(taps, names) if taps else {}
  found: dict[str, list[Mapping[str, Any]]] = {n: [] for n in wants}
  for i, (source, mine) in enumerate(zip(sources, batches, strict=True)):
    try:
      donor = model_lib.load(source)
      donor = donor.replace(params=meshes.to_auto(donor.params))
      seen = statistics.tap_statistics(donor, want, mine) if want else {}
      for name, need in wants.items():
        if need.fold in gradients.FOLDS:
          found[name].append(gradients.take(need, donor, mine))
        else:
          found[name].append({a: s for (fold, a), s in seen.items() if fold == need.fold})
    except paths.NoMatch:
      raise
    except ValueError as error:
      raise ValueError(f"donor {i}: {error}") from error
  return {name: Together(views) for name, views in found.items()}
