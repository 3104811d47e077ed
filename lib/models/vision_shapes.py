# SPDX-License-Identifier: Apache-2.0
"""Every parameter of an image classifier: its address, its shape, and a fresh value.

Kernels start normal with variance 2 / fan-in (He et al., arXiv:1502.01852), those of a ViT and of
the head with 1 / fan-in. Each leaf draws from the key folded with the CRC-32 of its address.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import paths
from treesurgeon.models import shapes
from treesurgeon.models import vision_spec as specs


def init(spec: specs.VisionSpec, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Draw fresh parameters.

  Args:
    spec: the architecture.
    key: PRNG key.
    dtype: storage dtype.

  Returns:
    The parameter tree: layers stacked in the segments of `spec.segments()`.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=32, num_layers=2)
    >>> init(spec, jax.random.key(0))["layers"]["0:2"]["dense"]["kernel"].shape
    (2, 32, 32)
  """
  table = addresses(spec)
  flat = {a: _draw(spec, key, (a,), s, dtype)[0] for a, s in table.items() if a[:7] != "layers/"}
  for start, stop in spec.segments():
    for name, shape in layer_shapes(spec, start).items():
      where = tuple(f"layers/{i}/{name}" for i in range(start, stop))
      flat[f"layers/{start}:{stop}/{name}"] = _draw(spec, key, where, shape, dtype)
  return paths.nest(flat)


@functools.lru_cache(maxsize=64)
def addresses(spec: specs.VisionSpec) -> dict[str, tuple[int, ...]]:
  """Return the shape of every leaf of the architecture, by address.

  Args:
    spec: the architecture.

  Returns:
    A mapping from address to shape: embedding, then layers in order, then head.
  """
  table = _linear(entry(spec), _entry_rows(spec), spec.d_model)
  if spec.kind == "vit":
    table["embed/positions/embedding"] = (spec.num_positions, spec.d_model)
  for i in range(spec.num_layers):
    table |= {f"layers/{i}/{name}": s for name, s in layer_shapes(spec, i).items()}
  width = spec.widths()[-1]
  return table | _norm(spec, "final_norm", width) | _linear("head", width, spec.num_classes)


def layer_shapes(spec: specs.VisionSpec, layer: int) -> dict[str, tuple[int, ...]]:
  """Return the shapes of one layer's leaves, by the part of the address after the index.

  Args:
    spec: the architecture.
    layer: layer index.

  Returns:
    A mapping from name to shape.
  """
  if spec.kind == "vit":
    return shapes.layer_shapes(spec.transformer(), layer)
  before, after = spec.widths()[layer : layer + 2]
  rows = before * spec.kernel_size**2 if spec.kind == "conv" else before
  return _norm(spec, "norm", before) | _linear(layer_name(spec), rows, after)


def entry(spec: specs.VisionSpec) -> str:
  """Return where the first linear layer lies.

  Args:
    spec: the architecture.

  Returns:
    "embed/input" or, in a ViT, "embed/patches".
  """
  return "embed/patches" if spec.kind == "vit" else "embed/input"


def layer_name(spec: specs.VisionSpec) -> str:
  """Return what the linear layer of an MLP's or conv net's layer is called.

  Args:
    spec: the architecture.

  Returns:
    "dense" or "conv".
  """
  return "dense" if spec.kind == "mlp" else "conv"


def _entry_rows(spec: specs.VisionSpec) -> int:
  side = {"mlp": spec.image_size, "conv": spec.kernel_size, "vit": spec.patch_size}[spec.kind]
  return side**2 * spec.channels


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
  return {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}


def _norm(spec: specs.VisionSpec, name: str, width: int) -> dict[str, tuple[int, ...]]:
  parts = {"none": (), "rms": ("scale",), "layer": ("scale", "bias")}[spec.norm]
  return {f"{name}/{part}": (width,) for part in parts}


def _draw(
  spec: specs.VisionSpec, key: jax.Array, where: tuple[str, ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  last = where[0].rsplit("/", 1)[-1]
  if last in ("bias", "scale"):
    return jnp.full((len(where), *shape), 0.0 if last == "bias" else 1.0, dtype)
  if last == "embedding":
    std = shapes.STD
  else:
    std = math.sqrt((1 if spec.kind == "vit" or where[0] == "head/kernel" else 2) / shape[0])
  if where[0].endswith(("attn/o/kernel", "mlp/down/kernel")):
    std /= math.sqrt(2 * spec.num_layers)
  return shapes.normal(key, where, shape, std=std, dtype=dtype)
