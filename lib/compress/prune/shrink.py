# SPDX-License-Identifier: Apache-2.0
"""Cut a transformer to some of its units: neurons, heads and channels become fewer, arrays smaller.

What structured pruning does once it has chosen. The spec follows: widths and heads may differ from
layer to layer. Zeroing the units instead would give the same function, but for the norms, which see
fewer channels. Indices may be traced, their number is static.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from treesurgeon import models
from treesurgeon.core import leaves, paths, programs
from treesurgeon.core import model as model_lib


class Units(NamedTuple):
  """What stays, each in the order in which it shall stand.

  Attributes:
    channels: of the residual stream, (n,); None is all.
    neurons: of each layer's feed-forward block; None is all of every layer.
    heads: query heads of each layer, those of one key/value head together.
    kv_heads: key/value heads of each layer; with `heads`.
  """

  channels: Int[Array, " n"] | None = None
  neurons: Sequence[Int[Array, "..."]] | None = None
  heads: Sequence[Int[Array, "..."]] | None = None
  kv_heads: Sequence[Int[Array, "..."]] | None = None


def shrink(m: model_lib.Model, units: Units) -> model_lib.Model:
  """Keep some of a transformer's units.

  Args:
    m: the model; not modified.
    units: which stay.

  Returns:
    The smaller model, its spec rewritten.

  Raises:
    ValueError: as `check`.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> shrink(m, Units(neurons=[jnp.array([1, 5]), jnp.arange(3)])).spec.d_ff
    (2, 3)
  """
  check(m)
  flat = paths.flatten(m.params)
  outer = {a: x for a, x in flat.items() if not a.startswith("layers/")}
  made = {}
  for i in range(m.spec.num_layers):
    start = f"layers/{i}/"
    one = {a.removeprefix(start): x for a, x in flat.items() if a.startswith(start)}
    made |= {start + name: x for name, x in _taken(one, _of_layer(m.spec, units, i)).items()}
  if units.channels is not None:
    outer = _taken(outer, _of_stream(units.channels))
  return m.replace(spec=_spec(m.spec, units), params=paths.unflatten({**outer, **made}))


def check(m: model_lib.Model) -> None:
  """Refuse a network whose units cannot be cut out.

  Args:
    m: the model.

  Raises:
    ValueError: for another kind of network, or a kernel that is compressed.
  """
  if not isinstance(m.spec, models.Spec):
    raise ValueError(f"units of a {type(m.spec).__name__} cannot be pruned; valid: a Spec")
  if m.spec.num_experts:
    raise ValueError(f"num_experts={m.spec.num_experts}: units of experts are not pruned")
  packed = [a for a, x in paths.walk(m.params).items() if leaves.is_leaf(x)]
  if packed:
    raise ValueError(f"{packed[0]} is compressed; prune structure before that")


def top(scores: Array, count: int) -> Int[Array, " count"]:
  """Name the units of highest score, in ascending order.

  Args:
    scores: one a unit; of equal ones the earlier is kept.
    count: how many to keep.

  Returns:
    Indices.

  Example:
    >>> top(jnp.array([1.0, 3.0, 3.0, 0.0]), 2).tolist()
    [1, 2]
  """
  return jnp.sort(jnp.argsort(-scores, stable=True)[:count])


def entries(units: Int[Array, " n"], block: int) -> Int[Array, " entries"]:
  """List the entries of an axis on which each unit has several.

  Args:
    units: indices of units.
    block: entries of a unit.

  Returns:
    Their entries, unit by unit.

  Example:
    >>> entries(jnp.array([2, 0]), 2).tolist()
    [4, 5, 0, 1]
  """
  return (units[:, None] * block + jnp.arange(block)[None, :]).reshape(-1)


Places = Mapping[str, Mapping[str, Array]]  # name, or its end -> "in" or "out" -> entries


def _of_layer(spec: models.Spec, units: Units, layer: int) -> dict[str, dict[str, Array]]:
  """Say which entries of a layer's leaves stay."""
  out: dict[str, dict[str, Array]] = {}

  def add(names: Sequence[str], axis: str, index: Array) -> None:
    for name in names:
      out.setdefault(name, {})[axis] = index

  if units.channels is not None:
    reads = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel", "mlp/gate/kernel", "mlp/up/kernel")
    add(reads, "in", units.channels)
    writes = ("attn/o/kernel", "attn/o/bias", "mlp/down/kernel", "mlp/down/bias")
    add(writes, "out", units.channels)
    for norm in ("attn_norm", "mlp_norm", "post_attn_norm", "post_mlp_norm"):
      add((f"{norm}/scale", f"{norm}/bias"), "out", units.channels)
  if units.neurons is not None:
    kept = units.neurons[layer]
    add(tuple(f"mlp/{k}/{p}" for k in ("gate", "up") for p in ("kernel", "bias")), "out", kept)
    add(("mlp/down/kernel",), "in", kept)
  if units.heads is not None and units.kv_heads is not None:
    q, kv = (entries(x[layer], spec.head_dim) for x in (units.heads, units.kv_heads))
    add(("attn/q/kernel", "attn/q/bias"), "out", q)
    add(("attn/o/kernel",), "in", q)
    add(tuple(f"attn/{k}/{p}" for k in ("k", "v") for p in ("kernel", "bias")), "out", kv)
    if spec.qk_norm == "full":
      add(("attn/q_norm/scale",), "out", q)
      add(("attn/k_norm/scale",), "out", kv)
  return out


def _of_stream(channels: Array) -> dict[str, dict[str, Array]]:
  """Say which entries of the leaves outside the layers stay."""
  lasts = ("embed/tokens/embedding", "embed/positions/embedding", "embed/types/embedding")
  norms = tuple(f"{n}/{p}" for n in ("embed/norm", "final_norm") for p in ("scale", "bias"))
  return {**{n: {"out": channels} for n in lasts + norms}, "lm_head/kernel": {"in": channels}}


def _taken(flat: Mapping[str, Any], places: Places) -> dict[str, Any]:
  index = {name: places[name] for name in flat if name in places}
  if not index:
    return dict(flat)
  some = {name: flat[name] for name in index}
  return {**flat, **programs.compiled(_take, ())(some, {"index": index})}


def _take(flat: Mapping[str, jax.Array], index: Places) -> dict[str, jax.Array]:
  out = dict(flat)
  for name, axes in index.items():
    for axis, found in axes.items():
      out[name] = jnp.take(out[name], found, axis={"in": -2, "out": -1}[axis])
  return out


def _spec(spec: models.Spec, units: Units) -> models.Spec:
  changes: dict[str, Any] = {}
  if units.channels is not None:
    changes["d_model"] = units.channels.shape[0]
  if units.neurons is not None:
    changes["d_ff"] = tuple(x.shape[0] for x in units.neurons)
  if units.heads is not None and units.kv_heads is not None:
    changes["num_heads"] = tuple(x.shape[0] for x in units.heads)
    changes["num_kv_heads"] = tuple(x.shape[0] for x in units.kv_heads)
  return dataclasses.replace(spec, **changes)
