# SPDX-License-Identifier: Apache-2.0
"""A merge as a function of its coefficients: θ = θ₀ + Σ c_i (θ_i − θ₀), inside one program.

What learned merges share. Base and donors are held once, as stored (layers stacked, in their own
dtypes); no task vector is kept. The merge is formed in float32 within the compiled program that
runs the network on it, so that its gradient reaches the coefficients and nothing else. There is a
coefficient a donor for the model, for each layer, for each tensor, or for each of several random
blocks of every tensor's entries (drawn from the tensor's address). Here are the arrays;
`mixed_models` gathers them from models and writes the outcome into one.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import paths

GRANULARITIES = ("task", "layer", "tensor")
Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is static of a merge to be learned; hashable.

  Attributes:
    spec: architecture.
    granularity: "task", "layer" or "tensor".
    layers: number of layers.
    chosen: for each stored leaf that is merged, by name, whether each of its layers is (one entry
      outside the layers).
    blocks: random blocks a tensor is divided into; granularity "tensor" only.
    option: what else the loss must know.
  """

  spec: Any
  granularity: str
  layers: int
  chosen: tuple[tuple[str, tuple[bool, ...]], ...]
  blocks: int = 1
  option: Any = None


@dataclasses.dataclass(frozen=True)
class Parts:
  """The arrays of a merge.

  Attributes:
    base: stored name to array.
    donors: the same of each donor.
    rest: stored name to what is not merged.
  """

  base: Flat
  donors: tuple[Flat, ...]
  rest: Flat


jax.tree_util.register_dataclass(Parts, ["base", "donors", "rest"], [])


def start(plan: Plan, donors: int, value: float | Sequence[float]) -> Any:
  """Make the coefficients to begin from.

  Args:
    plan: what is static.
    donors: how many.
    value: what all are, or one number a donor.

  Returns:
    A tree of float32 arrays, the donors' axis first.

  Example:
    >>> start(Plan(None, "task", 0, ()), 3, 0.3).shape
    (3,)
  """
  first = np.broadcast_to(np.asarray(value, np.float32), (donors,))

  def make(*shape: int) -> jax.Array:
    wide = first.reshape((donors,) + (1,) * len(shape))
    return jnp.asarray(np.broadcast_to(wide, (donors, *shape)))

  if plan.granularity == "task":
    return make()
  if plan.granularity == "layer":
    return {"layers": make(plan.layers), "rest": make()}
  tail = (plan.blocks,) if plan.blocks > 1 else ()
  return {
    name: make(*((len(inside),) if stacked(name) else ()), *tail) for name, inside in plan.chosen
  }


def merge(plan: Plan, parts: Parts, coefficients: Any) -> Flat:
  """Form θ₀ + Σ c_i (θ_i − θ₀) of every leaf that is merged.

  Args:
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.

  Returns:
    Stored name to array, in the base's dtypes; layers that are not chosen stay as they are.
  """
  out = {}
  for name, inside in plan.chosen:
    w = parts.base[name]
    base = w.astype(jnp.float32)
    total = base
    for i, donor in enumerate(parts.donors):
      c = _spread(plan, name, coefficients, i, w.shape)
      total = total + c * (donor[name].astype(jnp.float32) - base)
    keep = jnp.asarray(inside).reshape((-1,) + (1,) * (w.ndim - 1)) if stacked(name) else True
    out[name] = total.astype(w.dtype) if all(inside) else jnp.where(keep, total.astype(w.dtype), w)
  return out


def network(plan: Plan, parts: Parts, coefficients: Any) -> Any:
  """Form all parameters of the merged network.

  Args:
    plan: what is static.
    parts: the arrays.
    coefficients: shaped like those of `start`.

  Returns:
    Nested parameters.
  """
  return paths.nest({**parts.rest, **merge(plan, parts, coefficients)})


def pick(plan: Plan, name: str, coefficients: Any, donor: Any, layer: Any) -> Any:
  """Look up the coefficients of a stored leaf.

  Args:
    plan: what is static.
    name: the leaf's name as stored.
    coefficients: shaped like those of `start`.
    donor: index or slice.
    layer: index or slice, counted within the leaf's segment.

  Returns:
    The coefficients; at granularity "task" all layers share one.

  Example:
    >>> pick(Plan(None, "layer", 2, ()), "layers/0:2/w", {"layers": jnp.eye(2)}, 1, 1).item()
    1.0
  """
  if plan.granularity == "task":
    return coefficients[donor]
  if plan.granularity == "layer":
    if not stacked(name):
      return coefficients["rest"][donor]
    first, stop = _segment(name)
    return coefficients["layers"][:, first:stop][donor][..., layer]
  c = coefficients[name]
  if not stacked(name):
    return c[donor]
  if isinstance(donor, slice):
    return c[:, layer]
  return c[donor][layer]


def stacked(name: str) -> bool:
  """Tell whether a stored leaf holds a segment of layers.

  Args:
    name: its name as stored.

  Returns:
    Whether it has a leading layer axis.

  Example:
    >>> stacked("layers/0:2/mlp/up/kernel"), stacked("final_norm/scale")
    (True, False)
  """
  parts = name.split("/")
  return parts[0] == "layers" and len(parts) > 1 and ":" in parts[1]


def addresses(name: str) -> list[str]:
  """List the addresses that a stored leaf holds.

  Args:
    name: its name as stored.

  Returns:
    One address a layer, or the name itself.

  Example:
    >>> addresses("layers/1:3/w")
    ['layers/1/w', 'layers/2/w']
  """
  if not stacked(name):
    return [name]
  suffix = name.split("/", 2)[2]
  return [f"layers/{i}/{suffix}" for i in range(*_segment(name))]


def _spread(
  plan: Plan, name: str, coefficients: Any, donor: int, shape: tuple[int, ...]
) -> jax.Array:
  """Shape a donor's coefficients so that they multiply the stored array."""
  c = pick(plan, name, coefficients, donor, slice(None))
  depth = 1 if stacked(name) and plan.granularity != "task" else 0
  if plan.blocks > 1:
    keys = [jax.random.key(zlib.crc32(a.encode())) for a in addresses(name)]
    if not depth:
      return c[jax.random.randint(keys[0], shape, 0, plan.blocks)]
    draw = jax.vmap(lambda k, row: row[jax.random.randint(k, shape[1:], 0, plan.blocks)])
    return draw(jnp.stack(keys), c)
  return c.reshape(c.shape + (1,) * (len(shape) - depth))


def _segment(name: str) -> tuple[int, int]:
  first, stop = name.split("/")[1].split(":")
  return int(first), int(stop)
