# SPDX-License-Identifier: Apache-2.0
"""Any network as a function, whatever its kind: the type of the spec says which.

Drivers, statistics and methods call these, so that what works on a language model works on an image
classifier. `decoder`, `stack` and `vision` hold the functions themselves and their full arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.models import decoder, shapes, stack, vision, vision_shapes
from treesurgeon.models import vision_spec as vision_specs


def init(spec: vision_specs.AnySpec, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Draw fresh parameters.

  Args:
    spec: the architecture.
    key: PRNG key.
    dtype: storage dtype.

  Returns:
    The parameter tree: layers stacked in the segments of `spec.segments()`.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> models.init(spec, jax.random.key(0))["layers"]["0:2"]["mlp"]["up"]["kernel"].shape
    (2, 4, 8)
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision_shapes.init(spec, key, dtype)
  return shapes.init(spec, key, dtype)


def addresses(spec: vision_specs.AnySpec) -> dict[str, tuple[int, ...]]:
  """Return the shape of every leaf of the architecture, by address.

  Args:
    spec: the architecture.

  Returns:
    A mapping from address to shape: embeddings, then layers in order, then head.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=32, num_layers=2)
    >>> models.addresses(spec)["layers/1/dense/kernel"]
    (32, 32)
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision_shapes.addresses(spec)
  return shapes.addresses(spec)


def forward(
  spec: vision_specs.AnySpec, params: Mapping[str, Any], inputs: ArrayLike, **options: Any
) -> decoder.Output:
  """Run the network on a batch.

  Args:
    spec: the architecture.
    params: parameters; leaves may be compressed.
    inputs: tokens [batch, seq], or images.
    **options: observe, patch, remat, dtype; of a transformer also positions, mask and types. See
      `decoder.forward` and `vision.forward`.

  Returns:
    Logits, observations and the last hidden state.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=32, num_layers=2)
    >>> params = models.init(spec, jax.random.key(0))
    >>> models.forward(spec, params, jnp.ones((3, 64))).logits.shape
    (3, 10)
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision.forward(spec, params, inputs, **options)
  return decoder.forward(spec, params, inputs, **options)


def embed(
  spec: vision_specs.AnySpec,
  params: Mapping[str, Any],
  inputs: ArrayLike,
  *rest: Any,
  **options: Any,
) -> Float[Array, "batch *places width"]:
  """Turn a batch into the first layer's input.

  Args:
    spec: the architecture.
    params: parameters; only `embed` is read.
    inputs: tokens [batch, seq], or images.
    *rest: see `decoder.embed`.
    **options: see `decoder.embed` and `vision.embed`.

  Returns:
    The first layer's input.
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision.embed(spec, params, inputs, *rest, **options)
  return decoder.embed(spec, params, inputs, *rest, **options)


def block(
  spec: vision_specs.AnySpec,
  layer_params: Mapping[str, Any],
  h: Float[Array, "batch *places width"],
  *,
  layer: int | jax.Array,
  **options: Any,
) -> tuple[Float[Array, "batch *places out"], dict[str, Any]]:
  """Run one layer on its unstacked parameters.

  Args:
    spec: the architecture of the whole network.
    layer_params: the layer's leaves.
    h: the layer's input.
    layer: layer index, an int or a traced int32.
    **options: observe and patch; of a transformer also positions and mask.

  Returns:
    The layer's output, and the observations by tap.
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision.block(spec, layer_params, h, layer=layer, **options)
  return stack.block(spec, layer_params, h, layer=layer, **options)


def head(
  spec: vision_specs.AnySpec,
  params: Mapping[str, Any],
  h: Float[Array, "batch *places width"],
  **options: Any,
) -> Float[Array, "batch ..."]:
  """Turn the last layer's output into logits.

  Args:
    spec: the architecture.
    params: parameters; the layers are not read.
    h: output of the last layer.
    **options: observe and patch.

  Returns:
    float32 logits.
  """
  if isinstance(spec, vision_specs.VisionSpec):
    return vision.head(spec, params, h, **options)
  return decoder.head(spec, params, h, **options)
