# SPDX-License-Identifier: Apache-2.0
"""Architecture descriptions: one frozen value covers every supported network.

A transformer family differs from the next in a handful of switches (where the norms sit, how
positions enter, what the feed-forward block looks like), so `Spec` lists the switches instead of
subclassing: surgery rewrites a spec with `dataclasses.replace`, jit hashes it as a static
argument, and no code path asks for a family by name.

Quantities that may differ from layer to layer (`PER_LAYER`) are a scalar when uniform and a tuple
of `num_layers` entries otherwise; a tuple of equal entries is collapsed on construction, so that
equal architectures compare equal however they were written down.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

PER_LAYER = ("num_heads", "num_kv_heads", "d_ff", "window", "rope_theta", "rope_factor")

CHOICES = {
  "kind": ("decoder", "encoder"),
  "positions": ("rotary", "learned", "none"),
  "norm": ("rms", "layer"),
  "norm_place": ("pre", "post", "sandwich", "residual"),
  "qk_norm": ("none", "head", "full"),
  "rope_scaling": ("none", "linear", "llama3"),
  "activation": ("silu", "gelu", "gelu_tanh", "relu"),
}

# None may be given; construction puts an int in its place, which is what a reader finds.
_Filled = int | Any
_OPTIONAL = ("attn_scale", "attn_softcap", "final_softcap")


@dataclasses.dataclass(frozen=True)
class Spec:
  """Describe a transformer; hashable, so it can be a static argument of jit.

  Args:
    vocab_size: tokens in the vocabulary.
    d_model: width of the residual stream.
    num_layers: number of blocks.
    num_heads: query heads (per layer).
    d_ff: hidden width of the feed-forward block (per layer).
    num_kv_heads: key/value heads (per layer); None means `num_heads`.
    head_dim: width of one head; None means `d_model // num_heads`.
    max_positions: context length; the size of the table when positions are learned.
    kind: "decoder" (causal) or "encoder" (bidirectional).
    family: Hugging Face `model_type`, used for names and config only; "treesurgeon" is ours.
    positions: "rotary", "learned" or "none".
    position_offset: rows skipped in the learned table (OPT: 2).
    rope_theta: rotary base (per layer).
    rope_dim: rotated dimensions of a head; None means all of them.
    rope_interleaved: rotate neighbouring pairs (GPT-J) instead of halves.
    rope_scaling: "none", "linear" or "llama3".
    rope_factor: scaling factor (per layer); 1 leaves a layer unscaled.
    rope_low_freq, rope_high_freq, rope_original: the remaining Llama-3 scaling constants.
    norm: "rms" or "layer".
    norm_eps: added to the variance.
    norm_bias: whether a layer norm has a bias.
    norm_plus_one: multiply by 1 + scale (Gemma).
    norm_place: "pre"; "post" on the branch output (OLMo2); "sandwich", both (Gemma 2);
      "residual", after the addition (BERT).
    final_norm: whether a norm precedes the head.
    parallel: attention and feed-forward read the same stream (GPT-J, NeoX).
    shared_norm: with `parallel`, one norm feeds both (GPT-J).
    shortcuts: multiply the stream by a matrix where a branch is added to it (SliceGPT).
    qk_norm: RMS norm of queries and keys, per "head" or over the "full" width (OLMo2).
    qkv_bias, o_bias, mlp_bias: biases of the linear layers.
    gated: gate/up/down feed-forward; otherwise up/down.
    num_experts: feed-forward blocks of width `d_ff` in every layer, among which a router chooses
      for each token; 0 is one block and no router.
    experts_per_token: how many it chooses.
    norm_topk: whether the weights of the chosen experts are made to sum to 1 (Mixtral).
    activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
    attn_scale: multiplier of the scores; None means head_dim ** -0.5.
    attn_softcap, final_softcap: c * tanh(x / c) on scores and logits; None is off.
    window: positions a query sees, itself included (per layer); 0 is unlimited.
    embed_scale: multiplier of the token embeddings.
    tied: the head is the transposed embedding.
    head_bias: whether the head has a bias.
    num_types: token types of an encoder; 0 is none.
    embed_norm: whether a norm follows the embeddings (BERT).
    mlm_head, pooler: the two heads an encoder file may carry.
    name_prefix: prefix of the tensor names in the file it came from; None is the usual one.
    extra: config keys that are not modelled, as (key, JSON) pairs; neither compared nor hashed.

  Raises:
    ValueError: naming the field, its value and what would be valid.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=11, d_model=8, num_layers=3, num_heads=2, d_ff=(16, 16, 4))
    >>> spec.take_layers([0, 2, 2]).d_ff
    (16, 4, 4)
    >>> spec.segments()
    ((0, 2), (2, 3))
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int | tuple[int, ...]
  d_ff: int | tuple[int, ...]
  num_kv_heads: int | tuple[int, ...] | None = None
  head_dim: _Filled = None
  max_positions: int = 2048
  kind: str = "decoder"
  family: str = "treesurgeon"
  positions: str = "rotary"
  position_offset: int = 0
  rope_theta: float | int | tuple[float | int, ...] = 10000.0
  rope_dim: _Filled = None
  rope_interleaved: bool = False
  rope_scaling: str = "none"
  rope_factor: float | int | tuple[float | int, ...] = 1.0
  rope_low_freq: float | int = 1.0
  rope_high_freq: float | int = 4.0
  rope_original: int = 8192
  norm: str = "rms"
  norm_eps: float | int = 1e-6
  norm_bias: bool = True
  norm_plus_one: bool = False
  norm_place: str = "pre"
  final_norm: bool = True
  parallel: bool = False
  shared_norm: bool = False
  shortcuts: bool = False
  qk_norm: str = "none"
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  gated: bool = True
  num_experts: int = 0
  experts_per_token: int = 0
  norm_topk: bool = True
  activation: str = "silu"
  attn_scale: float | int | None = None
  attn_softcap: float | int | None = None
  final_softcap: float | int | None = None
  window: int | tuple[int, ...] = 0
  embed_scale: float | int = 1.0
  tied: bool = False
  head_bias: bool = False
  num_types: int = 0
  embed_norm: bool = False
  mlm_head: bool = False
  pooler: bool = False
  name_prefix: str | None = dataclasses.field(default=None, compare=False)
  extra: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

  def __post_init__(self):
    for name in ("vocab_size", "d_model", "num_layers", "max_positions"):
      _check_positive(name, getattr(self, name))
    for name in PER_LAYER:
      value = self.num_heads if name == "num_kv_heads" and self.num_kv_heads is None else None
      value = getattr(self, name) if value is None else value
      object.__setattr__(self, name, _per_layer(name, value, self.num_layers))
    for name, valid in CHOICES.items():
      if getattr(self, name) not in valid:
        raise ValueError(f"Spec.{name} is {getattr(self, name)!r}; valid: {', '.join(valid)}")
    if self.head_dim is None:
      if not isinstance(self.num_heads, int):
        raise ValueError("Spec.head_dim must be given when num_heads differs between layers")
      if self.d_model % self.num_heads:
        raise ValueError(
          f"Spec.d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; "
          "give head_dim explicitly"
        )
      object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
    if self.rope_dim is None:
      object.__setattr__(self, "rope_dim", self.head_dim)
    _check_relations(self)

  def per_layer(self, name: str) -> tuple[Any, ...]:
    """Return field `name` as a tuple with one entry a layer.

    Args:
      name: one of `PER_LAYER`.

    Returns:
      A tuple of `num_layers` values.

    Raises:
      ValueError: for a field that does not vary by layer.

    Example:
      >>> from treesurgeon import models
      >>> models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8).per_layer("d_ff")
      (8, 8)
    """
    if name not in PER_LAYER:
      raise ValueError(f"{name!r} is not a per-layer field; valid: {', '.join(PER_LAYER)}")
    value = getattr(self, name)
    return value if isinstance(value, tuple) else (value,) * self.num_layers

  def at(self, layer: int) -> Spec:
    """Return the one-layer spec of `layer`, in which every quantity is a scalar.

    Args:
      layer: index in [0, num_layers).

    Returns:
      A `Spec` with `num_layers=1`.

    Example:
      >>> from treesurgeon import models
      >>> models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=(8, 6)).at(1).d_ff
      6
    """
    return self.take_layers([layer])

  def take_layers(self, layers: Sequence[int]) -> Spec:
    """Return the spec of a network made of the given layers, in the given order.

    Args:
      layers: indices into the present layers; they may repeat.

    Returns:
      The spec with `num_layers` and every per-layer tuple rewritten.

    Raises:
      ValueError: for an empty list or an index that is out of range.

    Example:
      >>> from treesurgeon import models
      >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=(8, 6))
      >>> spec.take_layers([1, 0, 1]).d_ff
      (6, 8, 6)
    """
    layers = [int(i) for i in layers]
    bad = [i for i in layers if not 0 <= i < self.num_layers]
    if bad or not layers:
      raise ValueError(
        f"take_layers needs a non-empty list of indices in [0, {self.num_layers}); got {layers}"
      )
    values = {name: self.per_layer(name) for name in PER_LAYER}
    taken = {name: tuple(v[i] for i in layers) for name, v in values.items()}
    return dataclasses.replace(self, num_layers=len(layers), **taken)

  def feed_forwards(self) -> tuple[str, ...]:
    """Name the feed-forward blocks of a layer: one, or one an expert.

    Returns:
      Addresses within a layer.

    Example:
      >>> from treesurgeon import models
      >>> models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8, num_experts=2,
      ...             experts_per_token=1).feed_forwards()
      ('mlp/experts/0', 'mlp/experts/1')
    """
    if not self.num_experts:
      return ("mlp",)
    return tuple(f"mlp/experts/{i}" for i in range(self.num_experts))

  def segments(self) -> tuple[tuple[int, int], ...]:
    """Return the maximal runs [start, stop) of layers whose parameters have equal shapes.

    Returns:
      A tuple of (start, stop) pairs that partition the layers. Windows and rotary bases do not
      split a run: they are not parameters.
    """
    shapes = list(
      zip(*(self.per_layer(n) for n in ("num_heads", "num_kv_heads", "d_ff")), strict=True)
    )
    cuts = [i for i in range(1, self.num_layers) if shapes[i] != shapes[i - 1]]
    return tuple(zip([0, *cuts], [*cuts, self.num_layers], strict=True))


def _check_positive(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f"Spec.{name} must be a positive integer; got {value!r}")


def _per_layer(name: str, value: Any, num_layers: int) -> Any:
  cast = float if name.startswith("rope") else int
  low = 0 if name == "window" else 1 if cast is int else None
  values = tuple(value) if isinstance(value, Sequence) else (value,)
  if isinstance(value, Sequence) and len(values) != num_layers:
    raise ValueError(
      f"Spec.{name} lists {len(values)} layers; num_layers is {num_layers} (a scalar means all)"
    )
  for i, v in enumerate(values):
    if isinstance(v, bool) or not isinstance(v, numbers.Real) or cast(v) != v:  # pyright: ignore[reportArgumentType]
      raise ValueError(f"Spec.{name} must hold {cast.__name__}s; layer {i} has {v!r}")
    if v < low if low is not None else v <= 0:
      raise ValueError(
        f"Spec.{name} must be {'>= ' + str(low) if low is not None else '> 0'}; layer {i} has {v!r}"
      )
  values = tuple(cast(v) for v in values)
  return values[0] if len(set(values)) == 1 else values


def _check_relations(spec: Spec) -> None:
  _check_positive("head_dim", spec.head_dim)
  pairs = zip(spec.per_layer("num_heads"), spec.per_layer("num_kv_heads"), strict=True)
  for i, (h, k) in enumerate(pairs):
    if h % k:
      raise ValueError(f"Spec.num_heads={h} is not a multiple of num_kv_heads={k} in layer {i}")
  if spec.rope_dim % 2 or not 0 < spec.rope_dim <= spec.head_dim:
    if spec.positions == "rotary":
      raise ValueError(
        f"Spec.rope_dim={spec.rope_dim} must be even and in [2, head_dim={spec.head_dim}]"
      )
  if spec.parallel and spec.norm_place != "pre":
    raise ValueError(f"Spec.parallel needs norm_place='pre'; got {spec.norm_place!r}")
  if spec.shortcuts and spec.norm_place != "pre":
    raise ValueError(f"Spec.shortcuts needs norm_place='pre'; got {spec.norm_place!r}")
  if spec.shared_norm and not spec.parallel:
    raise ValueError("Spec.shared_norm needs parallel=True")
  if spec.kind == "decoder" and (spec.mlm_head or spec.pooler or spec.num_types):
    raise ValueError("Spec.mlm_head, pooler and num_types need kind='encoder'")
  if spec.num_experts:
    _check_positive("num_experts", spec.num_experts)
    _check_positive("experts_per_token", spec.experts_per_token)
  if spec.experts_per_token > spec.num_experts:
    raise ValueError(
      f"Spec.experts_per_token={spec.experts_per_token} must not exceed "
      f"num_experts={spec.num_experts}"
    )
  if spec.norm_eps < 0:
    raise ValueError(f"Spec.norm_eps must be >= 0; got {spec.norm_eps}")
  for name in _OPTIONAL:
    value = getattr(spec, name)
    if value is not None and not value > 0:
      raise ValueError(f"Spec.{name} must be positive or None; got {value!r}")
