# SPDX-License-Identifier: Apache-2.0
"""Every parameter of an architecture: its address, its shape, and a fresh value.

Initial values follow GPT-2 (Radford et al., 2019): normal with standard deviation 0.02, the
kernels that write to the residual stream divided by sqrt(2 * num_layers). Each leaf draws from
the key folded with the CRC-32 of its address, so it depends neither on the order of leaves nor on
how the layers are grouped into segments.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.models import spec as specs

STD = 0.02


def init(spec: specs.Spec, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Draw fresh parameters.

  Args:
    spec: the architecture.
    key: PRNG key.
    dtype: storage dtype.

  Returns:
    The parameter tree: layers stacked in the segments of `spec.segments()`.

  Example:
    >>> import jax
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> models.init(spec, jax.random.key(0))["layers"]["0:2"]["mlp"]["up"]["kernel"].shape
    (2, 4, 8)
  """
  params: dict[str, Any] = {}
  for address, shape in outer_shapes(spec).items():
    value = _draw(spec, key, (address,), shape, dtype)[0]
    _insert(params, address.split("/"), value)
  for start, stop in spec.segments():
    for name, shape in layer_shapes(spec, start).items():
      where = tuple(f"layers/{i}/{name}" for i in range(start, stop))
      value = _draw(spec, key, where, shape, dtype)
      _insert(params, ["layers", f"{start}:{stop}", *name.split("/")], value)
  return params


@functools.lru_cache(maxsize=64)
def addresses(spec: specs.Spec) -> dict[str, tuple[int, ...]]:
  """Return the shape of every leaf of the architecture, by address.

  Args:
    spec: the architecture.

  Returns:
    A mapping from address to shape: embeddings, then layers in order, then head.
  """
  outer = outer_shapes(spec)
  table = {a: s for a, s in outer.items() if a.startswith("embed/")}
  for i in range(spec.num_layers):
    table.update({f"layers/{i}/{name}": s for name, s in layer_shapes(spec, i).items()})
  return table | outer


def outer_shapes(spec: specs.Spec) -> dict[str, tuple[int, ...]]:
  """Return the shapes of the leaves outside the layers, by address.

  Args:
    spec: the architecture.

  Returns:
    A mapping from address to shape.
  """
  d = spec.d_model
  table: dict[str, tuple[int, ...]] = {"embed/tokens/embedding": (spec.vocab_size, d)}
  if spec.positions == "learned":
    table["embed/positions/embedding"] = (spec.max_positions + spec.position_offset, d)
  if spec.num_types:
    table["embed/types/embedding"] = (spec.num_types, d)
  if spec.embed_norm:
    table |= _norm(spec, "embed/norm")
  if spec.final_norm:
    table |= _norm(spec, "final_norm")
  if spec.pooler:
    table |= _linear("pooler", d, d, True)
  if spec.mlm_head:
    table |= _linear("mlm_head/dense", d, d, True) | _norm(spec, "mlm_head/norm")
  if has_head(spec):
    if not spec.tied:
      table["lm_head/kernel"] = (d, spec.vocab_size)
    if spec.head_bias:
      table["lm_head/bias"] = (spec.vocab_size,)
  return table


def layer_shapes(spec: specs.Spec, layer: int) -> dict[str, tuple[int, ...]]:
  """Return the shapes of one layer's leaves, by the part of the address after the index.

  Args:
    spec: the architecture.
    layer: layer index.

  Returns:
    A mapping from name to shape.
  """
  one = spec.at(layer)
  heads, kv_heads, width = (one.per_layer(n)[0] for n in ("num_heads", "num_kv_heads", "d_ff"))
  d, q, kv = spec.d_model, heads * spec.head_dim, kv_heads * spec.head_dim
  before = spec.norm_place in ("pre", "sandwich")
  table: dict[str, tuple[int, ...]] = {}
  if before:
    table |= _norm(spec, "attn_norm")
  for name, out in (("q", q), ("k", kv), ("v", kv)):
    table |= _linear(f"attn/{name}", d, out, spec.qkv_bias)
  if spec.qk_norm != "none":
    full = spec.qk_norm == "full"
    table["attn/q_norm/scale"] = (q if full else spec.head_dim,)
    table["attn/k_norm/scale"] = (kv if full else spec.head_dim,)
  table |= _linear("attn/o", q, d, spec.o_bias)
  if spec.shortcuts:
    table |= _linear("attn_skip", d, d, False)
  if spec.norm_place != "pre":
    table |= _norm(spec, "post_attn_norm")
  if before and not spec.shared_norm:
    table |= _norm(spec, "mlp_norm")
  if spec.num_experts:
    table["mlp/router/kernel"] = (d, spec.num_experts)
  for block in spec.feed_forwards():
    for name in ("gate", "up") if spec.gated else ("up",):
      table |= _linear(f"{block}/{name}", d, width, spec.mlp_bias)
    table |= _linear(f"{block}/down", width, d, spec.mlp_bias)
  if spec.shortcuts and not spec.parallel:
    table |= _linear("mlp_skip", d, d, False)
  if spec.norm_place != "pre":
    table |= _norm(spec, "post_mlp_norm")
  return table


def has_head(spec: specs.Spec) -> bool:
  """Return whether the architecture predicts tokens: all but an encoder without that head.

  Args:
    spec: the architecture.

  Returns:
    True for decoders and for encoders with a masked-language-model head.
  """
  return spec.kind == "decoder" or spec.mlm_head


def normal(
  key: jax.Array, where: Sequence[str], shape: tuple[int, ...], *, std: float, dtype: Any
) -> jax.Array:
  """Draw normal leaves of one shape, each from the key folded with its address's CRC-32.

  Args:
    key: PRNG key.
    where: the leaves' addresses.
    shape: of one leaf.
    std: standard deviation.
    dtype: of the result.

  Returns:
    The leaves, stacked.
  """
  codes = jnp.asarray(np.array([zlib.crc32(a.encode()) for a in where], np.uint32))
  keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(codes)
  draw = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))
  return (std * draw(keys)).astype(dtype)


def _linear(name: str, width: int, out: int, bias: bool) -> dict[str, tuple[int, ...]]:
  table: dict[str, tuple[int, ...]] = {f"{name}/kernel": (width, out)}
  return table | ({f"{name}/bias": (out,)} if bias else {})


def _norm(spec: specs.Spec, name: str) -> dict[str, tuple[int, ...]]:
  table = {f"{name}/scale": (spec.d_model,)}
  biased = spec.norm == "layer" and spec.norm_bias
  return table | ({f"{name}/bias": (spec.d_model,)} if biased else {})


def _draw(
  spec: specs.Spec, key: jax.Array, where: tuple[str, ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  last = where[0].rsplit("/", 1)[-1]
  shape_all = (len(where), *shape)
  if last == "bias":
    return jnp.zeros(shape_all, dtype)
  if where[0].endswith("_skip/kernel"):
    return jnp.broadcast_to(jnp.eye(shape[0], dtype=dtype)[None], shape_all)
  if last == "scale":
    return jnp.full(shape_all, 0.0 if spec.norm_plus_one else 1.0, dtype)
  writes = where[0].endswith(("attn/o/kernel", "/down/kernel"))
  std = STD / math.sqrt(2 * spec.num_layers) if writes else STD
  return normal(key, where, shape, std=std, dtype=dtype)


def _insert(tree: dict[str, Any], path: list[str], value: Any) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value
