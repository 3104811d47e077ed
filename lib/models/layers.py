# SPDX-License-Identifier: Apache-2.0
"""The modules of one transformer block, in Flax linen and used functionally.

`Block(spec).apply({"params": p}, h, ...)` with one layer's parameters. Vaswani et al.,
arXiv:1706.03762, with the switches of `Spec`. Modules read their leaves with `get_variable`, since
a leaf may be a compressed container whose shape linen must not check, and every linear layer
calls `kernels.matmul`, so a compressed model runs compressed. The number of heads is read off
the activations, so that one traced layer index runs in networks whose layers are unequal.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from treesurgeon import kernels
from treesurgeon.models import attention, rotary, taps
from treesurgeon.models import spec as specs

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
}


def normalize(
  x: Float[Array, "*batch dim"],
  scale: Float[Array, " dim"],
  bias: Float[Array, " dim"] | None = None,
  *,
  kind: str,
  eps: float,
  plus_one: bool = False,
) -> Float[Array, "*batch dim"]:
  """Normalize the last axis, in float32.

  Args:
    x: activations.
    scale: multiplier, as stored.
    bias: added last, or None.
    kind: "rms" (Zhang and Sennrich, arXiv:1910.07467) or "layer" (Ba et al., arXiv:1607.06450).
    eps: added to the mean square.
    plus_one: multiply by 1 + scale.

  Returns:
    The normalized activations in the dtype of `x`.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon.models import layers
    >>> layers.normalize(jnp.array([3.0, 3.0]), jnp.ones(2), kind="rms", eps=0.0).tolist()
    [1.0, 1.0]
  """
  y = x.astype(jnp.float32)
  if kind == "layer":
    y = y - y.mean(axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  gain = scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
  y = y * _row(gain, y.ndim)
  if bias is not None:
    y = y + _row(bias.astype(jnp.float32), y.ndim)
  return y.astype(x.dtype)


class Linear(nn.Module):
  """Multiply by a kernel leaf [in, out], dense or compressed, and add a bias."""

  features: int
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map [..., in] to [..., features]."""
    kernel = _leaf(self, "kernel", (x.shape[-1], self.features), nn.initializers.normal(0.02))
    y = kernels.matmul(x, kernel)
    if self.bias:
      bias = _leaf(self, "bias", (self.features,), nn.initializers.zeros)
      y = y + _row(bias.astype(y.dtype), y.ndim)
    return y


class Norm(nn.Module):
  """Apply `normalize` with the switches of the spec."""

  spec: specs.Spec
  kind: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalize the last axis."""
    kind = self.kind or self.spec.norm
    plus_one = self.spec.norm_plus_one
    start = nn.initializers.zeros if plus_one else nn.initializers.ones
    scale = _leaf(self, "scale", (x.shape[-1],), start)
    bias = None
    if kind == "layer" and self.spec.norm_bias:
      bias = _leaf(self, "bias", (x.shape[-1],), nn.initializers.zeros)
    return normalize(x, scale, bias, kind=kind, eps=self.spec.norm_eps, plus_one=plus_one)


class Attention(nn.Module):
  """Grouped-query attention over the sequence, or over a cache and the sequence."""

  spec: specs.Spec

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "batch seq dim"],
    tap: taps.Tap,
    *,
    layer: int | jax.Array,
    positions: Int[Array, "batch seq"],
    mask: jax.Array | None,
    cache: Any = None,
    start: Any = 0,
  ) -> tuple[jax.Array, Any]:
    """Return the mixed and projected values, and the cache with the new keys and values."""
    s = self.spec
    one = s.at(layer) if isinstance(layer, int) else s.at(0)  # widths matter to `init` only
    heads, kv_heads = (one.per_layer(n)[0] for n in ("num_heads", "num_kv_heads"))
    x = tap("attn/in", x)
    q = Linear(heads * s.head_dim, s.qkv_bias, name="q")(x)
    k = Linear(kv_heads * s.head_dim, s.qkv_bias, name="k")(x)
    v = Linear(kv_heads * s.head_dim, s.qkv_bias, name="v")(x)
    if s.qk_norm == "full":
      q, k = Norm(s, "rms", name="q_norm")(q), Norm(s, "rms", name="k_norm")(k)
    q, k, v = (y.reshape(*y.shape[:2], -1, s.head_dim) for y in (q, k, v))
    if s.qk_norm == "head":
      q, k = Norm(s, "rms", name="q_norm")(q), Norm(s, "rms", name="k_norm")(k)
    if s.positions == "rotary":
      inv_freq = rotary.at_layer(s, layer)
      q = rotary.rotate(q, positions, inv_freq, interleaved=s.rope_interleaved)
      k = rotary.rotate(k, positions, inv_freq, interleaved=s.rope_interleaved)
    y, cache = attention.extend(
      q,
      k,
      v,
      cache,
      start,
      scale=s.head_dim**-0.5 if s.attn_scale is None else s.attn_scale,
      softcap=s.attn_softcap,
      window=attention.window_at(s, layer),
      causal=s.kind == "decoder",
      mask=mask,
    )
    y = tap("attn/o/in", y.reshape(*y.shape[:2], -1))
    y = Linear(s.d_model, s.o_bias, name="o")(y)
    return tap("attn/out", y), cache


class Mlp(nn.Module):
  """Feed-forward block, plain or gated (Shazeer, arXiv:2002.05202); `at` begins its taps' names."""

  spec: specs.Spec
  at: str = "mlp"

  @nn.compact
  def __call__(self, x: jax.Array, tap: taps.Tap, *, layer: int | jax.Array) -> jax.Array:
    """Transform each position on its own."""
    s = self.spec
    width = s.per_layer("d_ff")[layer if isinstance(layer, int) else 0]
    act = ACTIVATIONS[s.activation]
    x = tap(f"{self.at}/in", x)
    if s.gated:
      gate = Linear(width, s.mlp_bias, name="gate")(x)
      y = act(gate) * Linear(width, s.mlp_bias, name="up")(x)
    else:
      y = act(Linear(width, s.mlp_bias, name="up")(x))
    y = Linear(s.d_model, s.mlp_bias, name="down")(tap(f"{self.at}/down/in", y))
    return tap(f"{self.at}/out", y)


class Mixture(nn.Module):
  """Feed-forward blocks weighted by a router (Shazeer, arXiv:1701.06538; Mixtral, 2401.04088).

  Every expert computes every token, and a gate of 0 discards what was not asked for: exact, of
  static shapes, no token dropped, and d_ff * num_experts wide in cost.
  """

  spec: specs.Spec

  @nn.compact
  def __call__(self, x: jax.Array, tap: taps.Tap, *, layer: int | jax.Array) -> jax.Array:
    """Transform each position on its own."""
    s = self.spec
    x = tap("mlp/in", x)
    gates = route(s, Linear(s.num_experts, name="router")(x))
    gates = tap(taps.GATES, gates.astype(x.dtype))
    return tap("mlp/out", _Experts(s, name="experts")(x, gates, tap, layer=layer))


class _Experts(nn.Module):
  spec: specs.Spec

  @nn.compact
  def __call__(
    self, x: jax.Array, gates: jax.Array, tap: taps.Tap, *, layer: int | jax.Array
  ) -> jax.Array:
    y = jnp.zeros_like(x)
    for i, at in enumerate(self.spec.feed_forwards()):
      one = Mlp(self.spec, at, name=str(i))(x, tap, layer=layer)
      y = y + one * gates[..., i : i + 1]
    return y


def route(
  spec: specs.Spec, scores: Float[Array, "*batch experts"]
) -> Float[Array, "*batch experts"]:
  """Weight the experts: a softmax over all, of which the largest stay, in float32.

  Args:
    spec: how many stay, and whether they are made to sum to 1.
    scores: the router's outputs.

  Returns:
    The gates, 0 for experts that are not chosen; of equal ones the first is chosen.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon import models
    >>> from treesurgeon.models import layers
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8,
    ...                    num_experts=3, experts_per_token=1)
    >>> layers.route(spec, jnp.array([0.0, 2.0, 1.0])).tolist()
    [0.0, 1.0, 0.0]
  """
  share = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
  top, where = jax.lax.top_k(share, spec.experts_per_token)
  if spec.norm_topk:
    top = top / top.sum(axis=-1, keepdims=True)
  return (jax.nn.one_hot(where, spec.num_experts) * top[..., None]).sum(axis=-2)


class Block(nn.Module):
  """One transformer block: attention, feed-forward, norms and residual additions."""

  spec: specs.Spec

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "batch seq dim"],
    tap: taps.Tap,
    *,
    layer: int | jax.Array,
    positions: Int[Array, "batch seq"],
    mask: jax.Array | None = None,
    cache: Any = None,
    start: Any = 0,
  ) -> tuple[jax.Array, Any]:
    """Return the residual stream after the block, and the cache."""
    s = self.spec
    before = s.norm_place in ("pre", "sandwich")
    after = s.norm_place in ("post", "sandwich")
    mlp = (Mixture if s.num_experts else Mlp)(s, name="mlp")
    h = tap("in", h)
    skip = Linear(s.d_model, name="attn_skip") if s.shortcuts else lambda h: h
    x = Norm(s, name="attn_norm")(h) if before else h
    a, cache = Attention(s, name="attn")(
      x, tap, layer=layer, positions=positions, mask=mask, cache=cache, start=start
    )
    if s.parallel:
      x = x if s.shared_norm else Norm(s, name="mlp_norm")(h)
      h = skip(h) + a + mlp(x, tap, layer=layer)
      return tap("out", h), cache
    h = skip(h) + (Norm(s, name="post_attn_norm")(a) if after else a)
    if s.norm_place == "residual":
      h = Norm(s, name="post_attn_norm")(h)
    h = tap("mid", h)
    skip = Linear(s.d_model, name="mlp_skip") if s.shortcuts else skip
    x = Norm(s, name="mlp_norm")(h) if before else h
    m = mlp(x, tap, layer=layer)
    h = skip(h) + (Norm(s, name="post_mlp_norm")(m) if after else m)
    if s.norm_place == "residual":
      h = Norm(s, name="post_mlp_norm")(h)
    return tap("out", h), cache


def _leaf(module: nn.Module, name: str, shape: tuple[int, ...], start: Any) -> Any:
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, start, shape)


def _row(vector: jax.Array, ndim: int) -> jax.Array:
  return vector.reshape((1,) * (ndim - 1) + (-1,))
