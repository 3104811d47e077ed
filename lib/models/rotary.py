# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, with every variant the supported families use.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
Halves are rotated against each other (Llama, NeoX) or neighbouring pairs (GPT-J), over all or
the first `rope_dim` dimensions. Frequencies are rescaled linearly (Chen et al.,
arXiv:2306.15595) or by wavelength (Llama 3, arXiv:2407.21783). Angles are float32 throughout.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon.models import spec as specs


def rotate(
  x: Float[Array, "batch seq heads head_dim"],
  positions: Int[ArrayLike, "batch seq"],
  inv_freq: Float[Array, " half"],
  *,
  interleaved: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
  """Rotate the first 2 * half dimensions of every head by position-dependent angles.

  Args:
    x: queries or keys.
    positions: absolute position of each token.
    inv_freq: angular frequency of each pair, radians per position.
    interleaved: pair dimension 2i with 2i + 1 rather than i with i + half.

  Returns:
    The rotated heads, in the dtype of `x`; computed in float32.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon.models import rotary
    >>> x = jnp.ones((1, 1, 1, 2))
    >>> bool((rotary.rotate(x, jnp.zeros((1, 1), int), jnp.ones(1)) == x).all())
    True
  """
  half = inv_freq.shape[0]
  angle = (
    jnp.asarray(positions)[:, :, None, None].astype(jnp.float32) * inv_freq[None, None, None, :]
  )
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
  if interleaved:
    a, b = turned[..., 0::2], turned[..., 1::2]
  else:
    a, b = turned[..., :half], turned[..., half:]
  a, b = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    turned = jnp.stack([a, b], axis=-1).reshape(turned.shape)
  else:
    turned = jnp.concatenate([a, b], axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@functools.lru_cache(maxsize=64)
def frequencies(spec: specs.Spec) -> np.ndarray:
  """Return the rotary frequencies of every layer.

  Args:
    spec: the architecture.

  Returns:
    float32 array [num_layers, rope_dim / 2], radians per position; a constant, not a parameter.

  Example:
    >>> from treesurgeon import models
    >>> from treesurgeon.models import rotary
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> rotary.frequencies(spec).tolist()
    [[1.0, 0.009999999776482582]]
  """
  exponent = np.arange(0, spec.rope_dim, 2, dtype=np.float64) / spec.rope_dim
  theta = np.asarray(spec.per_layer("rope_theta"), np.float64)[:, None]
  factor = np.asarray(spec.per_layer("rope_factor"), np.float64)[:, None]
  freq = theta ** -exponent[None, :]
  if spec.rope_scaling == "linear":
    freq = freq / factor
  elif spec.rope_scaling == "llama3":
    # Long wavelengths are interpolated, short ones kept, and the band between is blended.
    turns = spec.rope_original * freq / (2 * np.pi)
    blend = (turns - spec.rope_low_freq) / (spec.rope_high_freq - spec.rope_low_freq)
    blend = np.clip(blend, 0.0, 1.0)
    freq = (1 - blend) * freq / factor + blend * freq
  freq = freq.astype(np.float32)
  freq.setflags(write=False)
  return freq


def at_layer(spec: specs.Spec, layer: int | jax.Array) -> Float[Array, " half"]:
  """Return the frequencies of one layer, which may be a traced index.

  Args:
    spec: the architecture.
    layer: layer index, an int or a traced int32.

  Returns:
    float32 array [rope_dim / 2].
  """
  return jnp.asarray(frequencies(spec))[layer]
