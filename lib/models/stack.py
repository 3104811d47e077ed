# SPDX-License-Identifier: Apache-2.0
"""Run the layers: one block on its own, or all of them under a scan per segment.

Consecutive layers of equal structure are stored stacked and scanned, so the time to compile does
not grow with depth. What differs between layers without being a parameter (windows, rotary
frequencies) is looked up by the traced layer index, hence alternating local and global layers stay
one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import kernels
from treesurgeon.core import paths
from treesurgeon.models import layers, taps
from treesurgeon.models import spec as specs


def block(
  spec: specs.Spec,
  layer_params: Mapping[str, Any],
  h: Float[Array, "batch seq dim"],
  *,
  layer: int | jax.Array,
  positions: Int[ArrayLike, "batch seq"] | None = None,
  mask: jax.Array | None = None,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
) -> tuple[Float[Array, "batch seq dim"], dict[str, Any]]:
  """Run one layer on its unstacked parameters.

  Args:
    spec: the architecture of the whole network.
    layer_params: the layer's leaves, e.g. `{"attn": {"q": {"kernel": ...}, ...}, ...}`.
    h: block input.
    layer: layer index, an int or a traced int32.
    positions: absolute positions; None counts from 0.
    mask: [batch, seq], nonzero at real tokens, or [batch, seq, seq], nonzero where allowed.
    observe: called as observe(tap, value); what it returns is gathered unless None.
    patch: called as patch(tap, value, layer); returns the value to use.

  Returns:
    The block output, and the observations by tap.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> one = jax.tree.map(lambda x: x[1], params["layers"]["0:2"])
    >>> models.block(spec, one, jnp.ones((1, 3, 4)), layer=1)[0].shape
    (1, 3, 4)
  """
  h, _, seen = _step(spec, layer_params, h, layer, positions, mask, observe, patch, None, 0)
  return h, seen


def run(
  spec: specs.Spec,
  params: Mapping[str, Any],
  h: Float[Array, "batch seq dim"],
  *,
  positions: Int[ArrayLike, "batch seq"] | None = None,
  mask: jax.Array | None = None,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
  remat: bool = False,
  cache: Mapping[str, Any] | None = None,
  start: int | jax.Array = 0,
) -> tuple[Float[Array, "batch seq dim"], dict[str, Any], dict[str, Any] | None]:
  """Run every layer, one scan per segment.

  Args:
    spec: the architecture.
    params: the whole model's parameters.
    h: output of `embed`.
    positions: absolute positions; None counts from `start`.
    mask: as for `block`; with a cache, its last axis runs over the cache.
    observe: as for `block`.
    patch: as for `block`.
    remat: recompute activations in the backward pass instead of storing them.
    cache: keys and values by segment, or None.
    start: index in the cache at which the sequence begins.

  Returns:
    The last block's output; observations stacked over all layers (a tuple over layers where
    unequal layers make their shapes differ); the new cache.

  Raises:
    ValueError: if the segments are not exactly the layers of the spec.
  """
  segments = paths.segments(params)
  check_partition(spec.num_layers, segments)
  observed, caches = [], {}
  for first, stop, stacked in segments:
    index = jnp.arange(stop - first, dtype=jnp.int32)
    name = f"{first}:{stop}"
    kept = None if cache is None else cache[name]

    def body(
      carry: tuple[jax.Array, Any], xs: Any, first: int = first, stacked: Any = stacked
    ) -> tuple[tuple[jax.Array, Any], Any]:
      (h, kept), (rest, i) = carry, xs
      own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), kept)
      one = kernels.in_place(stacked, rest, i)
      h, own, seen = _step(spec, one, h, first + i, positions, mask, observe, patch, own, start)
      write = jax.lax.dynamic_update_index_in_dim
      return (h, jax.tree.map(lambda a, new: write(a, new, i, 0), kept, own)), seen

    # Without prevent_cse the scan already keeps XLA from undoing the rematerialization.
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    # The cache is carried, not scanned over: the next takes its place instead of lying beside it.
    (h, caches[name]), seen = jax.lax.scan(body, (h, kept), (kernels.hold(stacked), index))
    observed.append(seen)
  return h, join(observed), None if cache is None else caches


def join(segments: list[dict[str, Any]]) -> dict[str, Any]:
  """Concatenate the observations of all segments; unequal ones become a tuple over layers.

  Args:
    segments: tap to observations stacked over a segment's layers, one mapping a segment.

  Returns:
    Tap to observations, stacked over all layers or a tuple over them.
  """

  def widths(seen: Any) -> Any:
    return jax.tree.map(lambda x: x.shape[1:], seen)

  out: dict[str, Any] = {}
  for name in segments[0]:
    parts = [seen[name] for seen in segments]
    if all(widths(p) == widths(parts[0]) for p in parts):
      out[name] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    else:
      counts = [jax.tree.leaves(p)[0].shape[0] for p in parts]
      out[name] = tuple(
        jax.tree.map(lambda x, i=i: x[i], p)
        for p, n in zip(parts, counts, strict=True)
        for i in range(n)
      )
  return out


def check_partition(num_layers: int, segments: list[tuple[int, int, Any]]) -> None:
  """Refuse segments that are not exactly the layers of a network.

  Args:
    num_layers: how many layers there are.
    segments: (start, stop, tree), from `paths.segments`.

  Raises:
    ValueError: naming the segments.
  """
  bounds = [(a, b) for a, b, _ in segments]
  at = 0
  for a, b in bounds:
    if a != at or b <= a:
      break
    at = b
  else:
    if at == num_layers:
      return
  raise ValueError(
    f"params['layers'] has segments {', '.join(f'{a}:{b}' for a, b in bounds) or 'none'}; "
    f"they must cover 0:{num_layers} without gaps (spec.num_layers={num_layers})"
  )


def _step(
  spec: specs.Spec,
  layer_params: Mapping[str, Any],
  h: jax.Array,
  layer: int | jax.Array,
  positions: ArrayLike | None,
  mask: jax.Array | None,
  observe: taps.Observe | None,
  patch: taps.Patch | None,
  cache: Any,
  start: int | jax.Array,
) -> tuple[jax.Array, Any, dict[str, Any]]:
  if positions is None:
    positions = jnp.broadcast_to((start + jnp.arange(h.shape[1]))[None, :], h.shape[:2])
  tap = taps.Tap(observe, patch, layer)
  h, cache = layers.Block(spec).apply(
    {"params": layer_params},
    h,
    tap,
    layer=layer,
    positions=jnp.asarray(positions),
    mask=mask,
    cache=cache,
    start=start,
  )
  return h, cache, tap.gathered
