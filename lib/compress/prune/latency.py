# SPDX-License-Identifier: Apache-2.0
"""What a block costs by how many heads and neurons it has: counted, measured here, or read.

A table tells the cost of attention by key/value heads and of the feed-forward block by neurons;
between its entries it is linear. Counting takes the weights, hence operations a token, and is
the same everywhere. Measuring takes milliseconds on the machine at hand, the least of a few runs.
A file holds {"unit", "attention": {"1": ...}, "mlp": {"64": ...}} and, if it shall count, "other":
the cost of all that is never pruned.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.models import layers, taps

REPEATS = 5


class Table(NamedTuple):
  """Costs of one layer's parts.

  Attributes:
    attention: key/value heads to cost.
    mlp: neurons to cost.
    other: cost of what is not pruned.
    unit: of the costs.
  """

  attention: Mapping[int, float]
  mlp: Mapping[int, float]
  other: float = 0.0
  unit: str = "weights"

  def cost(self, part: str, units: int) -> float:
    """Look a cost up, linear between entries.

    Args:
      part: "attention" or "mlp".
      units: how many.

    Returns:
      The cost.

    Raises:
      ValueError: for a number beyond the entries.
    """
    known = getattr(self, part)
    sizes = sorted(known)
    if not sizes[0] <= units <= sizes[-1]:
      raise ValueError(
        f"the latency table tells of {part} with {sizes[0]} to {sizes[-1]} units, not {units}"
      )
    return float(np.interp(units, sizes, [known[s] for s in sizes]))


def counted(spec: models.Spec) -> Table:
  """Count weights.

  Args:
    spec: the architecture.

  Returns:
    The table.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> counted(spec).cost("mlp", 2), counted(spec).cost("attention", 1)
    (24.0, 32.0)
  """
  groups, width = max(spec.per_layer("num_kv_heads")), max(spec.per_layer("d_ff"))
  each = max(_group(spec, i) for i in range(spec.num_layers))
  head = spec.d_model * spec.head_dim * (2 * each + 2)
  neuron = spec.d_model * (3 if spec.gated else 2)
  return Table({1: head, groups: head * groups}, {1: neuron, width: neuron * width})


def measured(spec: models.Spec, *, batch: int = 1, length: int = 128) -> Table:
  """Measure attention with every number of heads, and the feed-forward block with a few widths.

  Args:
    spec: the architecture; its first layer stands for all.
    batch: sequences.
    length: tokens a sequence.

  Returns:
    The table, in milliseconds.
  """
  h = jnp.ones((batch, length, spec.d_model))
  positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
  groups, width = max(spec.per_layer("num_kv_heads")), max(spec.per_layer("d_ff"))
  tap: Any = taps.Tap(None, None)

  def shaped(**changes: int) -> models.Spec:
    one = spec.at(0)
    return type(one)(**{**_fields(one), **changes})

  def attention(count: int) -> float:
    one = shaped(num_heads=count * _group(spec, 0), num_kv_heads=count)
    block: Any = layers.Attention(one)
    more = {"layer": 0, "positions": positions, "mask": None}
    params = block.init(jax.random.key(0), h, tap, **more)
    return _time(lambda p, h: block.apply(p, h, tap, **more), params, h)

  def mlp(count: int) -> float:
    block: Any = layers.Mlp(shaped(d_ff=count))
    params = block.init(jax.random.key(0), h, tap, layer=0)
    return _time(lambda p, h: block.apply(p, h, tap, layer=0), params, h)

  widths = sorted({1, *(max(1, width * i // 8) for i in range(1, 9))})
  return Table(
    {g: attention(g) for g in range(1, groups + 1)}, {w: mlp(w) for w in widths}, unit="ms"
  )


def read(path: str) -> Table:
  """Read a table from a JSON file.

  Args:
    path: the file.

  Returns:
    The table.

  Raises:
    ValueError: if it is missing, or is no such table.
  """
  try:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    attention, mlp = ({int(k): float(v) for k, v in found[p].items()} for p in ("attention", "mlp"))
    if not attention or not mlp:
      raise ValueError("a part has no entry")
    return Table(attention, mlp, float(found.get("other", 0.0)), str(found.get("unit", "ms")))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path}: not a latency table, {{"attention": {{"1": 0.2, ...}}, "mlp": {{"64": 0.3, ...}}}}'
      f": {error}"
    ) from error


def named(name: str, spec: models.Spec) -> Table:
  """Find a table by how a method's argument names it.

  Args:
    name: "weights", "measured", or a file.
    spec: the architecture.

  Returns:
    The table.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> named("weights", spec).unit
    'weights'
  """
  makers: dict[str, Callable[[models.Spec], Table]] = {"weights": counted, "measured": measured}
  return makers[name](spec) if name in makers else read(name)


def _group(spec: models.Spec, layer: int) -> int:
  return spec.per_layer("num_heads")[layer] // spec.per_layer("num_kv_heads")[layer]


def _fields(spec: models.Spec) -> dict[str, Any]:
  return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def _time(call: Callable[..., Any], params: Any, h: jax.Array) -> float:
  run = jax.jit(call)
  jax.block_until_ready(run(params, h))
  found: Sequence[float] = [_once(run, params, h) for _ in range(REPEATS)]
  return 1000 * min(found)


def _once(run: Callable[..., Any], params: Any, h: jax.Array) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run(params, h))
  return time.perf_counter() - start
