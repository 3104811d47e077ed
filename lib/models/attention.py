# SPDX-License-Identifier: Apache-2.0
"""Attention over explicit masks: grouped queries, sliding windows, soft-capped scores.

Grouped queries: Ainslie et al., arXiv:2305.13245. Windows: Beltagy et al., arXiv:2004.05150, in the
convention of Mistral, where a query sees itself and the `window - 1` positions before it.
Scores and their softmax are float32 whatever the dtype of the activations.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from treesurgeon.kernels.attention_lowbit import api as lowbit
from treesurgeon.kernels.attention_lowbit import cache as caches
from treesurgeon.models import spec as specs

_UNLIMITED = 2**30


def attend(
  q: Float[Array, "batch seq heads head_dim"],
  k: Float[Array, "batch keys kv_heads head_dim"],
  v: Float[Array, "batch keys kv_heads head_dim"],
  allowed: Bool[Array, "#batch seq keys"],
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
  """Return softmax(scale * q k^T) v over the allowed keys.

  Args:
    q: queries; consecutive groups of heads share one key/value head.
    k: keys.
    v: values.
    allowed: True where a query may look.
    scale: multiplier of the scores.
    softcap: c in c * tanh(score / c), or None.

  Returns:
    The mixed values in the dtype of `q`. A query that may look nowhere gets the plain mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon.models import attention
    >>> q = k = jnp.zeros((1, 2, 1, 1)); v = jnp.arange(2.0).reshape(1, 2, 1, 1)
    >>> attention.attend(q, k, v, jnp.tri(2, dtype=bool)[None], scale=1.0).ravel().tolist()
    [0.0, 0.5]
  """
  batch, seq, heads, dim = q.shape
  shape = (batch, k.shape[2], heads // k.shape[2], seq)
  # Queries that share a key/value head are rows of one product, and the division comes last: on a
  # CPU half the time of the sums over [batch, seq, heads, dim] as they stand.
  q = q.reshape(batch, seq, *shape[1:3], dim).transpose(0, 2, 3, 1, 4).reshape(*shape[:2], -1, dim)
  k, v = (jnp.swapaxes(x.astype(q.dtype), 1, 2) for x in (k, v))
  scores = jnp.einsum("bkrd,bktd->bkrt", q, k, preferred_element_type=jnp.float32) * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = scores.reshape(*shape, -1)
  scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  rows = weights.astype(q.dtype).reshape(*shape[:2], -1, weights.shape[-1])
  mixed = jnp.einsum("bkrt,bktd->bkrd", rows, v, preferred_element_type=jnp.float32)
  mixed = (mixed.reshape(*shape, dim) / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, dim)


def extend(
  q: Float[Array, "batch seq heads head_dim"],
  k: Float[Array, "batch seq kv_heads head_dim"],
  v: Float[Array, "batch seq kv_heads head_dim"],
  cache: Any,
  start: int | jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | jax.Array = 0,
  causal: bool = True,
  mask: jax.Array | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Any]:
  """Attend over what a cache holds and the new tokens, and add these to it.

  Args:
    q, k, v: of the new tokens.
    cache: {"k", "v"}, each [batch, length, kv_heads, head_dim]; a `QuantizedCache`; or None.
    start: how many tokens the cache holds; an int or traced.
    scale, softcap: as for `attend`.
    window, causal, mask: as for `visible`; a quantized cache is causal and takes [batch, keys].

  Returns:
    The mixed values, and the cache with the new tokens.
  """
  if isinstance(cache, caches.QuantizedCache):
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "mask": mask}
    return lowbit.attend(q, k, v, cache, start, **options), caches.append(cache, k, v, start)
  if cache is not None:
    at = (0, start, 0, 0)
    k = jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), at)
    v = jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), at)
    cache = {"k": k, "v": v}
  allowed = visible(q.shape[1], k.shape[1], start=start, window=window, causal=causal, mask=mask)
  return attend(q, k, v, allowed, scale=scale, softcap=softcap), cache


def visible(
  num_queries: int,
  num_keys: int,
  *,
  start: int | jax.Array = 0,
  window: int | jax.Array = 0,
  causal: bool = True,
  mask: jax.Array | None = None,
) -> Bool[Array, "#batch seq keys"]:
  """Return which keys each query may look at.

  Args:
    num_queries: length of the query block.
    num_keys: length of the keys, cache included.
    start: index of the first query among the keys; an int or traced.
    window: keys a query sees, itself included; 0 is unlimited. An int or traced.
    causal: whether later keys are hidden.
    mask: [batch, keys], nonzero at real tokens, or [batch, seq, keys], nonzero where allowed.

  Returns:
    A boolean array [batch or 1, seq, keys].

  Raises:
    ValueError: for a mask of another shape.

  Example:
    >>> from treesurgeon.models import attention
    >>> attention.visible(3, 3, window=2)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
  """
  query = (start + jnp.arange(num_queries))[None, :, None]
  key = jnp.arange(num_keys)[None, None, :]
  reach = jnp.where(jnp.asarray(window) > 0, window, _UNLIMITED)
  allowed = key > query - reach
  allowed &= key <= query if causal else key < query + reach
  if mask is not None:
    shape = (num_queries, num_keys)
    if mask.ndim not in (2, 3) or mask.shape[1:] != shape[3 - mask.ndim :]:
      raise ValueError(
        f"mask has shape {mask.shape}; valid: [batch, {num_keys}] over keys, or "
        f"[batch, {num_queries}, {num_keys}] over pairs"
      )
    allowed = allowed & (mask != 0 if mask.ndim == 3 else mask[:, None, :] != 0)
  return allowed


def window_at(spec: specs.Spec, layer: int | jax.Array) -> int | jax.Array:
  """Return the window of one layer, which may be a traced index.

  Args:
    spec: the architecture.
    layer: layer index.

  Returns:
    The window; 0 is unlimited.
  """
  return spec.window if isinstance(spec.window, int) else jnp.asarray(spec.window)[layer]
