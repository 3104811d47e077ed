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
from treesurgeon.models import spec as specs
from treesurgeon.models import vision_spec as vision_specs

AnySpec = specs.Spec | vision_specs.VisionSpec


def init(spec: AnySpec, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
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
  return (vision_shapes if _sees(spec) else shapes).init(spec, key, dtype)


def addresses(spec: AnySpec) -> dict[str, tuple[int, ...]]:
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
  return (vision_shapes if _sees(spec) else shapes).addresses(spec)


def forward(
  spec: AnySpec, params: Mapping[str, Any], inputs: ArrayLike, **options: Any
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
  return (vision if _sees(spec) else decoder).forward(spec, params, inputs, **options)


def embed(
  spec: AnySpec, params: Mapping[str, Any], inputs: ArrayLike, *rest: Any, **options: Any
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
  return (vision if _sees(spec) else decoder).embed(spec, params, inputs, *rest, **options)


def block(
  spec: AnySpec,
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
  run = vision.block if _sees(spec) else stack.block
  return run(spec, layer_params, h, layer=layer, **options)


def head(
  spec: AnySpec,
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
  return (vision if _sees(spec) else decoder).head(spec, params, h, **options)


def _sees(spec: Any) -> bool:
  return isinstance(spec, vision_specs.VisionSpec)
