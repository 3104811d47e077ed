# SPDX-License-Identifier: Apache-2.0
"""Which units of a network may be renumbered without changing what it computes.

Derived from the architecture description as data: groups of axes that are permuted together. A
unit may be a residual channel, a hidden unit of a feed-forward block (gate, up and down together),
a key/value head with its query heads, a query head within its group, or a dimension within a head:
of values always, of queries and keys where the rotary embedding leaves it alone. The experts of a
mixture keep their numbers, their hidden units need not. Heads nest, so an
axis may be cut by several groups; the product of all of them is the network's symmetry group.

Entezari et al., "The role of permutation invariance in linear mode connectivity", 2021 (arXiv
2110.06296); Ainsworth et al., "Git Re-Basin", 2022 (arXiv 2209.04836), whose code lists the groups
of three networks by hand.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from treesurgeon import models
from treesurgeon.merge import units
from treesurgeon.models import vision_shapes

_ALL = units.Member("", -1)  # of a tap: every entry of the last axis is a unit


@functools.lru_cache(maxsize=64)
def groups(spec: Any, *, residual: bool = True) -> tuple[units.Group, ...]:
  """List the groups of an architecture.

  Args:
    spec: architecture of a decoder or encoder.
    residual: whether the residual stream's channels may be permuted too.

  Returns:
    Groups of at least two units, outer before inner.

  Raises:
    ValueError: for an architecture whose symmetries are not known.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> [(g.name, g.size) for g in groups(spec)][:3]
    [('residual', 4), ('layers/0/mlp', 8), ('layers/0/heads', 2)]
  """
  if isinstance(spec, models.Spec):
    found = [*(_outer(spec) if residual else ()), *_layers(spec)]
  elif isinstance(spec, models.VisionSpec):
    found = _vision(spec, residual)
  else:
    raise ValueError(f"{type(spec).__name__} is no architecture whose symmetries are known")
  table = models.addresses(spec)
  # The lists say where a leaf would lie; the architecture says which leaves there are.
  kept = [
    dataclasses.replace(g, members=tuple(m for m in g.members if m.address in table)) for g in found
  ]
  return tuple(g for g in kept if g.size > 1)


def identity(spec: Any, *, residual: bool = True) -> dict[str, dict[int, np.ndarray]]:
  """Return the index that changes nothing, over every axis that a group touches.

  Args:
    spec: architecture.
    residual: as for `groups`.

  Returns:
    Address to axis to int32 entries.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> identity(spec)["layers/0/mlp/up/kernel"][1].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
  """
  table = models.addresses(spec)
  out: dict[str, dict[int, np.ndarray]] = {}
  for group in groups(spec, residual=residual):
    for m in group.members:
      entries = np.arange(table[m.address][m.axis], dtype=np.int32)
      out.setdefault(m.address, {})[m.axis] = entries
  return out


def _outer(spec: models.Spec) -> list[units.Group]:
  """Group the channels of the residual stream, and those within an encoder's head."""
  head = [units.Member("mlm_head/dense/kernel", 1)]
  head += [units.Member(f"mlm_head/{n}", 0) for n in ("dense/bias", "norm/scale", "norm/bias")]
  head += [units.Member("lm_head/kernel", 0)]
  stream = [units.Member(f"embed/{n}/embedding", 1) for n in ("tokens", "positions", "types")]
  stream += [units.Member(f"embed/norm/{leaf}", 0) for leaf in ("scale", "bias")]
  stream += [units.Member(f"{n}/kernel", 0) for n in ("mlm_head/dense", "pooler")]
  if spec.mlm_head and not spec.tied:
    return [_stream(spec, stream), units.Group("mlm_head", spec.d_model, tuple(head))]
  # Tied, what the head's own layer puts out meets the embedding's channels again.
  return [_stream(spec, [*stream, *(head if spec.mlm_head else head[-1:])])]


def _stream(spec: models.Spec, ends: list[units.Member]) -> units.Group:
  """Group the channels of a residual stream, given where they lie outside the blocks."""
  stream, norms = ends, ["final_norm"]
  for i in range(spec.num_layers):
    at = f"layers/{i}"
    norms += [f"{at}/{n}_norm" for n in ("attn", "mlp", "post_attn", "post_mlp")]
    blocks = spec.feed_forwards()
    read = ["attn/q", "attn/k", "attn/v", "mlp/router"]
    read += [f"{b}/{n}" for b in blocks for n in ("gate", "up")]
    write = ["attn/o", *(f"{b}/down" for b in blocks)]
    stream = stream + [units.Member(f"{at}/{n}/kernel", 0) for n in read]
    stream += [units.Member(f"{at}/{n}/kernel", 1) for n in write]
    stream += [units.Member(f"{at}/{n}/bias", 0) for n in write]
  stream = stream + [units.Member(f"{n}/{leaf}", 0) for n in norms for leaf in ("scale", "bias")]
  last = spec.num_layers - 1
  taps = [*(("in", i, _ALL) for i in range(spec.num_layers)), ("out", last, _ALL)]
  return units.Group("residual", spec.d_model, tuple(stream), taps=tuple(taps))


def _vision(spec: models.VisionSpec, residual: bool) -> list[units.Group]:
  """Group the units of an image classifier."""
  entry, name = vision_shapes.entry(spec), vision_shapes.layer_name(spec)
  first = [units.Member(f"{entry}/kernel", 1), units.Member(f"{entry}/bias", 0)]
  last = units.Member("head/kernel", 0)
  if spec.kind == "vit":
    ends = [*first, units.Member("embed/positions/embedding", 1), last]
    inner = spec.transformer()
    return [*([_stream(inner, ends)] if residual else ()), *_layers(inner)]
  repeat = spec.kernel_size**2 if spec.kind == "conv" else 1

  def put(i: int) -> list[units.Member]:
    at = f"layers/{i}/{name}"
    return [units.Member(f"{at}/kernel", 1), units.Member(f"{at}/bias", 0)]

  def read(i: int) -> list[units.Member]:
    if i == spec.num_layers:
      return [units.Member("final_norm/scale", 0), units.Member("final_norm/bias", 0), last]
    norm = [units.Member(f"layers/{i}/norm/{leaf}", 0) for leaf in ("scale", "bias")]
    return [*norm, units.Member(f"layers/{i}/{name}/kernel", 0, repeat=repeat)]

  widths, count = spec.widths(), spec.num_layers
  taps = [("embed/out", -1, _ALL), *(("out", i, _ALL) for i in range(count))]
  links = [[*(put(i - 1) if i else first), *read(i)] for i in range(count + 1)]
  if spec.residual:
    every = tuple(m for link in links for m in link)
    return [units.Group("residual", widths[0], every, taps=tuple(taps))] if residual else []
  names = ["embed", *(f"layers/{i}" for i in range(count))]
  return [
    units.Group(n, w, tuple(link), taps=(tap,))
    for n, w, link, tap in zip(names, widths, links, taps, strict=True)
  ]


def _layers(spec: models.Spec) -> list[units.Group]:
  """Group hidden units and heads, layer by layer."""
  return [group for i in range(spec.num_layers) for group in _layer(spec, i)]


def _layer(spec: models.Spec, i: int) -> list[units.Group]:
  at = f"layers/{i}"
  heads, kv, width = (spec.per_layer(n)[i] for n in ("num_heads", "num_kv_heads", "d_ff"))
  blocks = []
  for name in spec.feed_forwards():
    block = f"{at}/{name}"
    hidden = [units.Member(f"{block}/{n}/kernel", 1) for n in ("gate", "up")]
    hidden += [units.Member(f"{block}/{n}/bias", 0) for n in ("gate", "up")]
    hidden += [units.Member(f"{block}/down/kernel", 0)]
    taps = ((f"{name}/down/in", i, _ALL),)
    blocks.append(units.Group(block, width, tuple(hidden), taps=taps))
  return [*blocks, *_heads(spec, f"{at}/attn", i, heads, kv)]


def _heads(spec: models.Spec, at: str, layer: int, heads: int, kv: int) -> list[units.Group]:
  """Group key/value heads, the query heads of each, and the dimensions of each."""
  d, r = spec.head_dim, heads // kv
  free = spec.rope_dim if spec.positions == "rotary" else 0  # below it, rotation fixes the order
  outer = at.removesuffix("/attn")

  def lie(names: str, **where: int) -> list[units.Member]:
    """Place units in the outputs of some of q, k, v, and in the inputs of o."""
    out: list[units.Member] = []
    for n in names:
      if n == "o":
        out.append(units.Member(f"{at}/o/kernel", 0, **where))
        continue
      out += [
        units.Member(f"{at}/{n}/kernel", 1, **where),
        units.Member(f"{at}/{n}/bias", 0, **where),
      ]
      if spec.qk_norm == "full" and n in "qk":
        out.append(units.Member(f"{at}/{n}_norm/scale", 0, **where))
    return out

  def tap(**where: int) -> tuple[tuple[str, int, units.Member], ...]:
    return (("attn/o/in", layer, units.Member("", -1, **where)),)

  def pair(a: str, x: dict[str, int], n: int, b: str, y: dict[str, int], k: int) -> units.Circuit:
    return lie(a, **x)[0], n, lie(b, **y)[0], k

  narrow, wide = {"block": d}, {"block": r * d}
  inside = [f"{outer}/{n}/{g}" for g in range(kv) for n in ("queries", "values", "keys")]
  out = [
    units.Group(
      f"{outer}/heads", kv, tuple(lie("qo", **wide) + lie("kv", **narrow)),
      inner=(*inside, f"{outer}/keys"), dims=d, taps=tap(**wide),
      circuits=(pair("v", narrow, kv, "o", wide, kv), pair("q", wide, kv, "k", narrow, kv)),
    )
  ]  # fmt: skip
  for g in range(kv):
    mine = {"start": g * r * d, "block": d}
    shared = {"start": g * d, "block": d}
    out.append(
      units.Group(
        f"{outer}/queries/{g}", r, tuple(lie("qo", **mine)),
        inner=(f"{outer}/values/{g}", f"{outer}/keys/{g}"), dims=d, taps=tap(**mine),
        circuits=(pair("v", shared, 1, "o", mine, r), pair("q", mine, r, "k", shared, 1)),
      )
    )  # fmt: skip
    runs = {"start": g * r * d, "repeat": r}
    values = lie("v", start=g * d) + lie("o", **runs)
    out.append(units.Group(f"{outer}/values/{g}", d, tuple(values), taps=tap(**runs)))
    if spec.qk_norm != "head":
      runs = {"start": g * r * d + free, "repeat": r, "stride": d}
      out.append(
        units.Group(
          f"{outer}/keys/{g}", d - free, tuple(lie("q", **runs) + lie("k", start=g * d + free))
        )
      )
  if spec.qk_norm == "head":  # one scale for all heads, so that they share one order
    every = lie("q", start=free, repeat=heads, stride=d) + lie("k", start=free, repeat=kv, stride=d)
    scales = [units.Member(f"{at}/{n}_norm/scale", 0, start=free) for n in "qk"]
    out.append(units.Group(f"{outer}/keys", d - free, (*every, *scales)))
  return out
