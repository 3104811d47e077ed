# SPDX-License-Identifier: Apache-2.0
"""Put two networks side by side in one that is wider where their units differ.

Of a group of n units that were paired, some pairs become one unit and the others stay apart, so
that the group has between n and 2 n: first the merged units, then those of the first network alone,
then those of the second alone. Weights between units of the same network are its own, between
those of different networks zero; what goes into a merged unit is a weighted mean of what went into
the pair. With every pair apart the network is block-diagonal.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.core import varied
from treesurgeon.merge import permutations, units

MERGED, FIRST, SECOND = 0, 1, 2  # whose an entry is
_COLUMNS = {"mlp": ("d_ff",), "heads": ("num_heads", "num_kv_heads")}


class Axis(NamedTuple):
  """How one axis of a leaf is widened.

  Attributes:
    old: for each new entry the old one, int32; data.
    kind: for each new entry whose it is, as bytes, so that it can be static.
  """

  old: Any
  kind: bytes

  @property
  def kinds(self) -> np.ndarray:
    """Whose each entry is, as an int8 array."""
    return np.frombuffer(self.kind, np.int8)


def separate(size: int, ratio: float) -> int:
  """Count the pairs that stay apart: those whose score is below its quantile at the ratio.

  Args:
    size: n, number of pairs.
    ratio: 0 merges all, 1 none.

  Returns:
    Between 0 and n.

  Example:
    >>> [separate(5, r) for r in (0.0, 0.5, 0.9, 1.0)]
    [0, 2, 4, 5]
  """
  return size if ratio >= 1 else math.ceil(ratio * (size - 1) - 1e-9)


def widenable(spec: Any, *, residual: bool = True) -> tuple[units.Group, ...]:
  """List the groups that may be widened: not those under a norm, nor within other units.

  Args:
    spec: architecture.
    residual: as for `permutations.groups`.

  Returns:
    Groups.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> [g.name for g in widenable(spec)]
    ['layers/0/mlp', 'layers/0/heads']
  """
  groups = permutations.groups(spec, residual=residual)
  inner = {n for g in groups for n in g.inner}
  return tuple(
    g
    for g in groups
    if g.name not in inner
    and "/experts/" not in g.name  # which are all of one width
    and not any(m.address.endswith("scale") for m in g.members)
  )


def choose(score: Float[np.ndarray, " n"], count: int) -> tuple[np.ndarray, np.ndarray]:
  """Keep the worst pairs apart.

  Args:
    score: how well each pair matches.
    count: how many stay apart.

  Returns:
    (merged pairs, separate pairs), each in their order, int32.

  Example:
    >>> [x.tolist() for x in choose(np.array([0.5, 0.1, 0.9]), 1)]
    [[0, 2], [1]]
  """
  order = np.argsort(score, kind="stable")
  return np.sort(order[count:]).astype(np.int32), np.sort(order[:count]).astype(np.int32)


def axes(
  groups: Sequence[units.Group], picks: Mapping[str, tuple[Any, Any]]
) -> dict[str, dict[int, Axis]]:
  """Work out how the leaves' axes are widened.

  Args:
    groups: from `widenable`.
    picks: group's name to (merged, separate) pairs, from `choose`.

  Returns:
    Address to axis to how; axes that stay are left out.

  Example:
    >>> one = units.Group("g", 2, (units.Member("w", 0),))
    >>> how = axes([one], {"g": (np.array([1]), np.array([0]))})["w"][0]
    >>> how.old.tolist(), how.kinds.tolist()
    ([1, 0, 0], [0, 1, 2])
  """
  out: dict[str, dict[int, Axis]] = {}
  for group in groups:
    merged, apart = picks[group.name]
    if not apart.shape[0]:
      continue
    xp = np if isinstance(apart, np.ndarray) else jnp
    order = xp.concatenate([merged, apart, apart])
    counts = [merged.shape[0], apart.shape[0], apart.shape[0]]
    kind = np.repeat(np.array([MERGED, FIRST, SECOND], np.int8), counts)
    for m in group.members:
      at = m.places(group.size)
      old = xp.asarray(at).take(order, axis=1).reshape(-1)
      kinds = np.broadcast_to(kind[None, :, None], (at.shape[0], len(kind), at.shape[2]))
      out.setdefault(m.address, {})[m.axis] = Axis(old, kinds.tobytes())
  return out


def blend(
  x: Float[Array, "*rows n"],
  y: Float[Array, "*rows n"],
  axis: Axis | None,
  weights: Sequence[ArrayLike],
) -> Float[Array, "*rows m"]:
  """Put two networks' features side by side.

  Args:
    x: the first network's.
    y: the second's.
    axis: how their axis is widened; None merges all.
    weights: of the two in a merged feature.

  Returns:
    The wider network's features, float32.

  Example:
    >>> how = Axis(np.array([1, 0, 0]), np.array([0, 1, 2], np.int8).tobytes())
    >>> blend(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), how, (0.5, 0.5)).tolist()
    [3.0, 1.0, 3.0]
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  if axis is None:
    return jnp.asarray(weights[0] * x + weights[1] * y)
  a, b = (
    jnp.asarray(t, jnp.float32)[axis.kinds]
    for t in ((weights[0], 1.0, 0.0), (weights[1], 0.0, 1.0))
  )
  lead = (1,) * (x.ndim - 1) + (-1,)
  return a.reshape(lead) * x.take(axis.old, axis=-1) + b.reshape(lead) * y.take(axis.old, axis=-1)


def combine(
  w: Float[Array, "*shape"], v: Float[Array, "*shape"], rows: Axis | None, columns: Axis | None,
  weights: Sequence[ArrayLike],
) -> Float[Array, "..."]:  # fmt: skip
  """Put two networks' leaves side by side.

  Args:
    w: the first network's.
    v: the second's.
    rows: how the first axis is widened, if there are two.
    columns: how the last axis is widened.
    weights: of the two in a merged unit.

  Returns:
    The wider network's leaf, float32.

  Example:
    >>> how = Axis(np.array([0, 0]), np.array([1, 2], np.int8).tobytes())
    >>> w, v = jnp.array([[2.0]]), jnp.array([[4.0]])
    >>> combine(w, v, how, None, (0.5, 0.5)).tolist(), combine(w, v, how, how, (0.5, 0.5)).tolist()
    ([[1.0], [2.0]], [[2.0, 0.0], [0.0, 4.0]])
  """
  if rows is None:
    return blend(w, v, columns, weights)
  p, q = weights
  first = jnp.asarray([[p, 1, 0], [p, 1, 0], [0, 0, 0]], jnp.float32)
  second = jnp.asarray([[q, 0, 1], [0, 0, 0], [q, 0, 1]], jnp.float32)
  kinds = np.zeros(w.shape[1], np.int8) if columns is None else columns.kinds
  out = jnp.zeros((), jnp.float32)
  for table, x in ((first, w), (second, v)):
    x = x.astype(jnp.float32).take(rows.old, axis=0)
    x = x if columns is None else x.take(columns.old, axis=1)
    out = out + table[rows.kinds[:, None], kinds[None, :]] * x
  return out


def widen(spec: Any, sizes: Mapping[str, int]) -> Any:
  """Return the architecture whose groups have new sizes.

  Args:
    spec: architecture.
    sizes: group's name to number of units.

  Returns:
    The architecture.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=2, d_ff=8)
    >>> wide = widen(spec, {"layers/0/mlp": 12, "layers/1/heads": 3})
    >>> wide.d_ff, wide.num_heads, wide.head_dim
    ((12, 8), (2, 3), 2)
  """
  if isinstance(spec, models.VisionSpec) and spec.kind != "vit":
    every = sizes.get("residual")
    widths = spec.widths() if every is None else (every,) * (spec.num_layers + 1)
    names = ["embed", *(f"layers/{i}" for i in range(spec.num_layers))]
    first, *rest = (sizes.get(n, w) for n, w in zip(names, widths, strict=True))
    return dataclasses.replace(spec, d_model=first, d_ff=tuple(rest))
  fields = [f.name for f in dataclasses.fields(spec)]
  new = {n: list(spec.per_layer(n)) for part in _COLUMNS.values() for n in part if n in fields}
  kv = new.get("num_kv_heads", new["num_heads"])
  for name, size in sizes.items():
    _, layer, part = name.split("/")
    i, old = int(layer), kv[int(layer)]
    grown = {"d_ff": size, "num_kv_heads": size, "num_heads": new["num_heads"][i] // old * size}
    for field in _COLUMNS[part]:
      if field in new:
        new[field][i] = grown[field]
  return dataclasses.replace(spec, **{n: tuple(v) for n, v in new.items()})


def sizes(groups: Sequence[units.Group], ratio: varied.Varied) -> dict[str, int]:
  """Count the units of each group after widening.

  Args:
    groups: from `widenable`.
    ratio: share of pairs that stay apart; may vary over the groups' names.

  Returns:
    Group's name to number of units.

  Example:
    >>> sizes([units.Group("layers/0/mlp", 5, ())], 0.5)
    {'layers/0/mlp': 7}
  """
  return {g.name: g.size + separate(g.size, varied.at(ratio, g.name)) for g in groups}
