# SPDX-License-Identifier: Apache-2.0
"""Descriptions of small image classifiers: multilayer perceptrons, conv nets, vision transformers.

They are here for what is studied on such networks: merges by permutation (which need nets without
residual connections), of experts on several image tasks, out-of-distribution accuracy, backdoors.
Frozen and hashable as `Spec` is, and read by the same functions.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

from treesurgeon.models import spec as specs

CHOICES = {
  "kind": ("mlp", "conv", "vit"),
  "norm": ("none", "layer", "rms"),
  "activation": specs.CHOICES["activation"],
}
PER_LAYER = ("num_heads", "d_ff")
_COUNTS = ("image_size", "channels", "num_classes", "d_model", "num_layers", "patch_size",
           "kernel_size")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VisionSpec:
  """Describe an image classifier; hashable, so it can be a static argument of jit.

  Args:
    kind: "mlp" (flattened pixels), "conv" (kernel_size x kernel_size convolutions, all at the
      resolution of the first) or "vit" (Dosovitskiy et al., arXiv:2010.11929, without a class
      token: the mean over patches is read out).
    image_size: height and width in pixels; 1 with `channels` features makes an MLP on vectors.
    channels: values a pixel.
    num_classes: classes.
    d_model: width of the embedding; of the residual stream of a ViT.
    num_layers: layers between embedding and head.
    d_ff: (per layer) output width of the layers of an MLP or conv net, None means d_model; hidden
      width of a ViT's feed-forward blocks, None means 4 * d_model.
    num_heads: attention heads of a ViT (per layer).
    head_dim: width of one head; None means d_model // num_heads.
    patch_size: side of a ViT's patches, or stride of a conv net's first convolution.
    kernel_size: side of the convolutions, odd.
    norm: "none", "layer" or "rms", before every layer and before the head; a ViT needs one.
    norm_eps: added to the variance.
    residual: whether an MLP's or conv net's layers add to their input; a ViT's always do.
    activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
    family: for names in files; there is only ours.
    extra: config keys that are not modelled, as (key, JSON) pairs; neither compared nor hashed.

  Raises:
    ValueError: naming the field, its value and what would be valid.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=32, num_layers=2)
    >>> spec.features, spec.widths()
    (64, (32, 32, 32))
  """

  kind: str
  image_size: int
  num_classes: int
  d_model: int
  num_layers: int
  channels: int = 1
  d_ff: Any = None
  num_heads: int | tuple[int, ...] = 1
  head_dim: Any = None
  patch_size: int = 1
  kernel_size: int = 3
  norm: str = "none"
  norm_eps: float | int = 1e-6
  residual: bool = False
  activation: str = "relu"
  family: str = "treesurgeon"
  extra: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

  def __post_init__(self):
    for name, valid in CHOICES.items():
      if getattr(self, name) not in valid:
        raise ValueError(f"VisionSpec.{name} is {getattr(self, name)!r}; valid: {', '.join(valid)}")
    for name in _COUNTS:
      _check_count(name, getattr(self, name))
    if self.d_ff is None:
      object.__setattr__(self, "d_ff", self.d_model * (4 if self.kind == "vit" else 1))
    for name in PER_LAYER:
      object.__setattr__(self, name, _per_layer(name, getattr(self, name), self.num_layers))
    if self.kind == "vit" and self.head_dim is None:
      if not isinstance(self.num_heads, int) or self.d_model % self.num_heads:
        raise ValueError(
          f"VisionSpec.d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; "
          "give head_dim explicitly"
        )
      object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
    _check_relations(self)

  @property
  def features(self) -> int:
    """Values an image."""
    return self.image_size**2 * self.channels

  @property
  def num_positions(self) -> int:
    """Places at which the layers run: patches, pixels after the stride, or one."""
    return 1 if self.kind == "mlp" else (-(-self.image_size // self.patch_size)) ** 2

  def per_layer(self, name: str) -> tuple[Any, ...]:
    """Return field `name` as a tuple with one entry a layer.

    Args:
      name: "num_heads" or "d_ff".

    Returns:
      A tuple of `num_layers` values.

    Raises:
      ValueError: for a field that does not vary by layer.
    """
    if name not in PER_LAYER:
      raise ValueError(f"{name!r} is not a per-layer field; valid: {', '.join(PER_LAYER)}")
    value = getattr(self, name)
    return value if isinstance(value, tuple) else (value,) * self.num_layers

  def widths(self) -> tuple[int, ...]:
    """Return the widths between layers: of the embedding, then of every layer's output."""
    if self.kind == "vit":
      return (self.d_model,) * (self.num_layers + 1)
    return (self.d_model, *self.per_layer("d_ff"))

  def take_layers(self, layers: Sequence[int]) -> VisionSpec:
    """Return the spec of a network made of the given layers, in the given order.

    Args:
      layers: indices into the present layers; they may repeat.

    Returns:
      The spec.

    Raises:
      ValueError: for an empty list, an index out of range, or layers whose widths do not meet.

    Example:
      >>> from treesurgeon import models
      >>> spec = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=32, num_layers=2)
      >>> spec.take_layers([0, 1, 1]).num_layers
      3
    """
    layers = [int(i) for i in layers]
    bad = [i for i in layers if not 0 <= i < self.num_layers]
    if bad or not layers:
      raise ValueError(
        f"take_layers needs a non-empty list of indices in [0, {self.num_layers}); got {layers}"
      )
    widths, at = self.widths(), self.d_model
    for i in layers:
      if widths[i] != at:
        raise ValueError(f"layer {i} takes a width of {widths[i]}; the one before gives {at}")
      at = widths[i + 1]
    taken = {n: tuple(self.per_layer(n)[i] for i in layers) for n in PER_LAYER}
    return dataclasses.replace(self, num_layers=len(layers), **taken)

  def segments(self) -> tuple[tuple[int, int], ...]:
    """Return the maximal runs [start, stop) of layers whose parameters have equal shapes.

    Returns:
      A tuple of (start, stop) pairs that partition the layers.
    """
    if self.kind == "vit":
      return self.transformer().segments()
    w = self.widths()
    cuts = [i for i in range(1, self.num_layers) if (w[i - 1], w[i]) != (w[i], w[i + 1])]
    return tuple(zip([0, *cuts], [*cuts, self.num_layers], strict=True))

  def transformer(self) -> specs.Spec:
    """Return the encoder whose blocks a ViT's are.

    Raises:
      ValueError: for another kind.
    """
    if self.kind != "vit":
      raise ValueError(f"a network of kind {self.kind!r} has no transformer blocks")
    return specs.Spec(
      vocab_size=self.num_classes, d_model=self.d_model, num_layers=self.num_layers,
      num_heads=self.num_heads, d_ff=self.d_ff, head_dim=self.head_dim,
      max_positions=self.num_positions, kind="encoder", positions="none", norm=self.norm,
      norm_eps=self.norm_eps, gated=False, activation=self.activation,
      qkv_bias=True, o_bias=True, mlp_bias=True,
    )  # fmt: skip


AnySpec = specs.Spec | VisionSpec


def _check_count(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f"VisionSpec.{name} must be a positive integer; got {value!r}")


def _per_layer(name: str, value: Any, num_layers: int) -> Any:
  values = tuple(value) if isinstance(value, Sequence) else (value,)
  if isinstance(value, Sequence) and len(values) != num_layers:
    raise ValueError(
      f"VisionSpec.{name} lists {len(values)} layers; num_layers is {num_layers} "
      "(a scalar means all)"
    )
  for v in values:
    _check_count(name, v)
  values = tuple(int(v) for v in values)
  return values[0] if len(set(values)) == 1 else values


def _check_relations(spec: VisionSpec) -> None:
  if spec.kind == "vit" and spec.norm == "none":
    raise ValueError("VisionSpec.norm is 'none', but a ViT needs 'layer' or 'rms'")
  if spec.kind == "vit" and spec.image_size % spec.patch_size:
    raise ValueError(
      f"VisionSpec.image_size={spec.image_size} is not a multiple of patch_size={spec.patch_size}"
    )
  if spec.kind == "conv" and spec.kernel_size % 2 == 0:
    raise ValueError(f"VisionSpec.kernel_size={spec.kernel_size} must be odd")
  if spec.kind == "mlp" and spec.patch_size != 1:
    raise ValueError(f"VisionSpec.patch_size={spec.patch_size}: an MLP has no patches; leave it 1")
  if spec.residual and len(set(spec.widths())) > 1:
    raise ValueError(f"VisionSpec.residual needs layers of equal width; got {spec.widths()}")
  if spec.norm_eps < 0:
    raise ValueError(f"VisionSpec.norm_eps must be >= 0; got {spec.norm_eps}")
