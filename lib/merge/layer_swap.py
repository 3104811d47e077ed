# SPDX-License-Identifier: Apache-2.0
"""Layer swapping: the bottom and top layers of a language expert in a task expert.

Bandarkar et al., "Layer swapping for zero-shot cross-lingual transfer in large language models",
2024 (arXiv 2410.01335). The model at hand is the task (math) expert, the one donor the language
expert, both tuned from one model. The donor gives the first `bottom` and the last `top` layers;
the `transition` layers next to these are averages of both. The paper swaps 5 and 2 of Llama 3.1's
32 layers, with one transition layer at each seam, and finds a wide range of these numbers to do.

What lies outside the layers goes with the layer it touches: the embeddings come from the donor if
`bottom` > 0, the final norm and the head if `top` > 0. Without transition this is what mergekit's
`passthrough` does with the slices donor, model, donor. `ends=False` leaves it all as it is.
Averages are computed in float32 and returned in the storage dtype; every other leaf is one of the
two models' to the bit. Neutral at bottom=0, top=0.
"""

import re
from collections.abc import Sequence

import jax
import numpy as np

from treesurgeon.core import leaves, model, needs, paths, programs, step
from treesurgeon.merge import wise_ft

_LAYER = re.compile(r"layers/(\d+)/.*")


def shares(
  num_layers: int,
  *,
  bottom: int,
  top: int,
  transition: tuple[int, int] = (0, 0),
  weight: float = 0.5,
) -> list[float]:
  """Tell the donor's share in each layer.

  Args:
    num_layers: layers of the model.
    bottom: first layers, from the donor.
    top: last layers, from the donor.
    transition: layers to average above the bottom and below the top; none where these are 0.
    weight: the donor's share in averaged layers.

  Returns:
    One number a layer: 0 the model's, 1 the donor's.

  Raises:
    ValueError: if the zones overlap.

  Example:
    >>> shares(8, bottom=2, top=1, transition=(1, 1))
    [1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.5, 1.0]
  """
  above = transition[0] if bottom else 0
  below = transition[1] if top else 0
  middle = num_layers - bottom - above - below - top
  if middle < 0:
    raise ValueError(
      f"bottom={bottom}, top={top} and transition={transition} are "
      f"{num_layers - middle} layers; the model has {num_layers}"
    )
  return [1.0] * bottom + [weight] * above + [0.0] * middle + [weight] * below + [1.0] * top


@step.method("merge.layer_swap")
def layer_swap(
  *,
  models: Sequence[str] = (),
  bottom: int = 5,
  top: int = 2,
  transition: int | tuple[int, int] = 1,
  weight: float = 0.5,
  ends: bool = True,
  select: str | None = None,
) -> step.Step:
  """Put the donor's bottom and top layers into a model, with averaged layers at the seams.

  Args:
    models: directory of the donor; empty takes the one handed to the driver.
    bottom: how many of the first layers to take from the donor.
    top: how many of the last layers to take from the donor.
    transition: how many layers to average at each seam, or at the lower and the upper one.
    weight: the donor's share in averaged layers.
    ends: whether the embeddings go with the bottom, the final norm and the head with the top.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it raises ValueError unless there is exactly one donor, and if the zones
    do not fit into the model.

  Raises:
    ValueError: for a negative number of layers.

  Example:
    >>> layer_swap(bottom=4, top=4, transition=2)
    (merge.layer_swap(bottom=4, top=4, transition=2),)

  Reference:
    Bandarkar et al., Layer swapping, 2024, arXiv 2410.01335.
  """
  seams = transition if isinstance(transition, tuple) else (transition, transition)
  if min(bottom, top, *seams) < 0:
    raise ValueError(f"bottom={bottom}, top={top}, transition={transition} must not be negative")
  return _over(tuple(models), bottom, top, seams, weight, ends, select or ".*")


def _over(
  models: tuple[str, ...],
  bottom: int,
  top: int,
  seams: tuple[int, int],
  weight: float,
  ends: bool,
  pattern: str,
) -> step.Step:
  wants: dict[str, needs.Need] = {"donors": needs.Donors(models)}

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    del key
    of_layer = shares(_depth(m), bottom=bottom, top=top, transition=seams, weight=weight)
    run = programs.compiled(wise_ft.interpolate, ())
    changes = {}
    for address in m.addresses():
      share = _share(address, of_layer, bottom, top, ends)
      if not share or not re.fullmatch(pattern, address):
        continue
      w, donors = m.leaf(address), evidence["donors"][address]
      if len(donors) != 1:
        raise ValueError(f"it takes exactly 1 donor, the language expert; got {len(donors)}")
      step.check_donors(address, w, donors)
      w, donors = leaves.map_leaves(leaves.dense, (w, donors))
      changes[address] = run(w, {"donors": donors, "alpha": np.float32(share)})
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    return [(n,) for n in paths.select(names, pattern)]

  def reselect(narrower: str) -> step.Step:
    return _over(models, bottom, top, seams, weight, ends, step.both(pattern, narrower))

  return step.Step(wants, apply, "leaf", {}, units, reselect)


def _share(address: str, of_layer: list[float], bottom: int, top: int, ends: bool) -> float:
  match = _LAYER.fullmatch(address)
  if match:
    return of_layer[int(match[1])]
  return float(ends and (bottom if address.startswith("embed/") else top) > 0)


def _depth(m: model.Model) -> int:
  """Count the layers of the whole model, of which `m` may be a part."""
  if m.spec is not None:
    return m.spec.num_layers
  if isinstance(m, model.Part):
    raise ValueError("a part of a model does not tell how many layers the model has; give a spec")
  return paths.num_layers(m.params)
