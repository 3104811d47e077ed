# SPDX-License-Identifier: Apache-2.0
"""Image classifiers as functions: multilayer perceptrons, conv nets, vision transformers.

Every layer is linear on rows: a convolution is stored as a kernel (k * k * c_in, c_out) and applied
to patches, in the order (row, column, channel). So whatever reads or rewrites kernels (second
moments, pruning, quantizers, merges) sees the (in, out) matrix that it sees in a language model.

Addresses: `embed/input/kernel|bias` (`embed/patches/...` and `embed/positions/embedding` in a ViT);
`layers/{i}/dense/...`, `layers/{i}/conv/...` or an encoder's block; `layers/{i}/norm/...`,
`final_norm/...` where the spec has norms; `head/kernel|bias`. Taps: `embed/in`, `embed/out`; `in`,
`dense/in` or `conv/in`, `dense/out` or `conv/out` (before the activation), `out`; `head/in`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon import kernels
from treesurgeon.core import leaves, paths
from treesurgeon.models import decoder, layers, stack, taps, vision_shapes
from treesurgeon.models import vision_spec as specs


def forward(
  spec: specs.VisionSpec,
  params: Mapping[str, Any],
  inputs: ArrayLike,
  *,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
  remat: bool = False,
  dtype: Any = None,
) -> decoder.Output:
  """Run the network on a batch of images.

  Args:
    spec: the architecture.
    params: parameters; leaves may be compressed.
    inputs: [batch, height, width, channels], or flat, [batch, features].
    observe: called as observe(tap, value); what it returns is gathered unless None.
    patch: called as patch(tap, value, layer), layer -1 outside layers; returns the value to use.
    remat: recompute each layer in the backward pass.
    dtype: dtype of the activations; None keeps that of the first kernel.

  Returns:
    Logits [batch, classes] in float32, observations and the last layer's output.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("conv", image_size=4, num_classes=3, d_model=5, num_layers=2)
    >>> out = forward(spec, models.init(spec, jax.random.key(0)), jnp.ones((2, 4, 4, 1)))
    >>> out.logits.shape, out.hidden.shape
    ((2, 3), (2, 4, 4, 5))
  """
  outer = taps.Tap(observe, patch)
  h = embed(spec, params, inputs, tap=outer)
  h = outer("embed/out", h if dtype is None else h.astype(dtype))
  if spec.kind == "vit":
    h, seen, _ = stack.run(spec.transformer(), params, h, observe=observe, patch=patch, remat=remat)
  else:
    h, seen = _run(spec, params, h, observe, patch, remat)
  return decoder.Output(_read(spec, params, h, outer), {**outer.gathered, **seen}, h)


def embed(
  spec: specs.VisionSpec,
  params: Mapping[str, Any],
  inputs: ArrayLike,
  *,
  tap: taps.Tap | None = None,
  observe: taps.Observe | None = None,
) -> Float[Array, "batch *places width"]:
  """Turn images into the first layer's input.

  Args:
    spec: the architecture.
    params: parameters; only `embed` is read.
    inputs: [batch, height, width, channels], or flat, [batch, features].
    tap: where patches and observations are applied.
    observe: as for `forward`, called for effect, in place of `tap`.

  Returns:
    [batch, width] in an MLP, [batch, height, width, width] in a conv net, [batch, patches, width]
    in a ViT.

  Raises:
    ValueError: for images of another size.
  """
  tap = taps.Tap(observe, None) if tap is None else tap
  x, side = jnp.asarray(inputs), spec.image_size
  if x.shape[1:] not in ((spec.features,), (side, side, spec.channels)):
    raise ValueError(
      f"inputs have shape {x.shape}; valid: [batch, {side}, {side}, {spec.channels}] or "
      f"[batch, {spec.features}]"
    )
  tree = params["embed"][vision_shapes.entry(spec).split("/")[1]]
  x = x.astype(tree["kernel"].dtype).reshape(-1, side, side, spec.channels)
  if spec.kind == "mlp":
    x = x.reshape(x.shape[0], -1)
  elif spec.kind == "conv":
    x = windows(x, size=spec.kernel_size, stride=spec.patch_size)
  else:
    p, n = spec.patch_size, side // spec.patch_size
    x = x.reshape(-1, n, p, n, p, spec.channels).swapaxes(2, 3).reshape(x.shape[0], n * n, -1)
  h = _apply(tree, tap("embed/in", x))
  if spec.kind != "vit":
    return layers.ACTIVATIONS[spec.activation](h)
  return h + leaves.dense(params["embed"]["positions"]["embedding"])[None, :, :].astype(h.dtype)


def block(
  spec: specs.VisionSpec,
  layer_params: Mapping[str, Any],
  h: Float[Array, "batch *places width"],
  *,
  layer: int | jax.Array,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
) -> tuple[Float[Array, "batch *places out"], dict[str, Any]]:
  """Run one layer on its unstacked parameters.

  Args:
    spec: the architecture of the whole network.
    layer_params: the layer's leaves.
    h: the layer's input.
    layer: layer index, an int or a traced int32.
    observe: as for `forward`.
    patch: as for `forward`.

  Returns:
    The layer's output, and the observations by tap.
  """
  if spec.kind == "vit":
    return stack.block(
      spec.transformer(), layer_params, h, layer=layer, observe=observe, patch=patch
    )
  tap, name = taps.Tap(observe, patch, layer), vision_shapes.layer_name(spec)
  h = tap("in", h)
  x = h if spec.norm == "none" else _normalize(spec, layer_params["norm"], h)
  x = windows(x, size=spec.kernel_size) if spec.kind == "conv" else x
  x = tap(f"{name}/out", _apply(layer_params[name], tap(f"{name}/in", x)))
  x = layers.ACTIVATIONS[spec.activation](x)
  return tap("out", h + x if spec.residual else x), tap.gathered


def head(
  spec: specs.VisionSpec,
  params: Mapping[str, Any],
  h: Float[Array, "batch *places width"],
  *,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
) -> Float[Array, "batch classes"]:
  """Turn the last layer's output into logits: norm, mean over places, projection.

  Args:
    spec: the architecture.
    params: parameters; the layers are not read.
    h: output of the last layer.
    observe: as for `forward`, called for effect: what it returns is dropped.
    patch: as for `forward`.

  Returns:
    float32 logits.
  """
  return _read(spec, params, h, taps.Tap(observe, patch))


def windows(
  x: Float[Array, "batch height width channels"], *, size: int, stride: int = 1
) -> Float[Array, "batch rows columns window"]:
  """Lay every pixel's neighbourhood out in a row, zeros beyond the border.

  Args:
    x: images.
    size: side of the neighbourhood, odd.
    stride: pixels from one neighbourhood to the next.

  Returns:
    The neighbourhoods, flat in the order (row, column, channel).

  Example:
    >>> windows(jnp.ones((1, 2, 2, 1)), size=3)[0, 0, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
  """
  _, high, wide, _ = x.shape
  edge = (size // 2, size // 2)
  x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
  shifts = [(i, j) for i in range(size) for j in range(size)]
  parts = [x[:, i : i + high : stride, j : j + wide : stride] for i, j in shifts]
  return jnp.concatenate(parts, axis=-1)


def _run(
  spec: specs.VisionSpec, params: Any, h: jax.Array, observe: Any, patch: Any, remat: bool
) -> tuple[jax.Array, dict[str, Any]]:
  """Run all layers: a scan a segment, but for single layers, which may change the width."""
  segments = paths.segments(params)
  stack.check_partition(spec.num_layers, segments)
  observed = []
  for first, stop, stacked in segments:

    def body(h: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
      return block(spec, xs[0], h, layer=xs[1], observe=observe, patch=patch)

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    if stop - first == 1:
      h, seen = body(h, (jax.tree.map(lambda x: x[0], stacked), jnp.int32(first)))
      observed.append(jax.tree.map(lambda x: x[None], seen))
    else:
      h, seen = jax.lax.scan(body, h, (stacked, jnp.arange(first, stop, dtype=jnp.int32)))
      observed.append(seen)
  return h, stack.join(observed)


def _read(spec: specs.VisionSpec, params: Any, h: jax.Array, tap: taps.Tap) -> jax.Array:
  if spec.norm != "none":
    h = _normalize(spec, params["final_norm"], h)
  h = tap("head/in", h.mean(axis=tuple(range(1, h.ndim - 1))) if h.ndim > 2 else h)
  return _apply(params["head"], h).astype(jnp.float32)


def _apply(tree: Mapping[str, Any], x: jax.Array) -> jax.Array:
  y = kernels.matmul(x, tree["kernel"])
  bias = leaves.dense(tree["bias"]).astype(y.dtype)
  return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _normalize(spec: specs.VisionSpec, leaf: Mapping[str, jax.Array], h: jax.Array) -> jax.Array:
  return layers.normalize(h, leaf["scale"], leaf.get("bias"), kind=spec.norm, eps=spec.norm_eps)
