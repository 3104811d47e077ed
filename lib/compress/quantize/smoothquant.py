# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: move the range of activations into the weights that read them, channel by channel.

With s_j = max|X_j|^a / max|W_j|^(1 - a) the inputs become X / s and the kernels s W. The
outputs stay what they are; both now have ranges that a quantizer of both can serve. The division is
folded into the norm before (`compress.feeds`), and on request into v and up.

Where we differ from the paper's code: a channel that was never active, or that no weight reads, is
left alone instead of scaled by 1e-5. (llm-compressor takes max - min of the activations and twice
the weights' maximum, which for symmetric ranges changes s by one factor for all channels.) Fixed
point: applied to its own result it changes nothing, unless `linear`, where v is read and written.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress import feeds, over_feeds
from treesurgeon.core import step


def scales(
  x_max: Float[Array, " rows"], w_max: Float[Array, " rows"], *, alpha: float
) -> Float[Array, " rows"]:
  """Compute by what each channel of the activations is divided.

  Args:
    x_max: largest magnitude of each input.
    w_max: largest magnitude of the weights that read it.
    alpha: how much of the range moves into the weights.

  Returns:
    s, positive; 1 where either maximum is 0.

  Example:
    >>> scales(jnp.array([16.0, 0.0]), jnp.array([1.0, 1.0]), alpha=0.5).tolist()
    [4.0, 1.0]
  """
  used = (x_max > 0) & (w_max > 0)
  x, w = jnp.where(used, x_max, 1.0), jnp.where(used, w_max, 1.0)
  return jnp.maximum(x**alpha / w ** (1 - alpha), 1e-5)


@step.method("compress.quantize.smoothquant")
def smoothquant(
  *, alpha: float = 0.5, linear: bool = False, select: str | None = None
) -> step.Step:
  """Smooth the inputs of kernels by what norms can absorb; to be followed by a quantizer of both.

  Args:
    alpha: how much of the range moves into the weights, 0 to 1; 0.5 is the paper's, 0.8 usual for
      Llama.
    linear: smooth also the inputs of o and down, which v and up absorb.
    select: which kernels; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for alpha outside 0 to 1, a selection of some of the kernels that share an input,
      compressed kernels, or an architecture whose norms feed no kernel alone.

  Example:
    >>> smoothquant(alpha=0.8)
    (compress.quantize.smoothquant(alpha=0.8),)

  Reference:
    Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models, 2022, arXiv:2211.10438.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha={alpha}: valid is 0 (all range stays) to 1 (all moves into weights)")
  return over_feeds.over_feeds(
    _scales,
    hyper={"alpha": alpha},
    wants={"absmax": "absmax"},
    kinds=_all if linear else _norms,
    select=select,
  )


def _scales(
  reads: Mapping[str, jax.Array],
  writes: Mapping[str, jax.Array],
  *,
  feed: feeds.Feed,
  absmax: jax.Array,
  **hyper: Any,
) -> jax.Array:
  del writes
  rows = jnp.stack([jnp.abs(w).max(axis=1) for w in reads.values()]).max(axis=0)
  return scales(absmax, feeds.pool(feed, rows), **hyper)


def _norms(feed: feeds.Feed) -> bool:
  return feed.norm


def _all(feed: feeds.Feed) -> bool:
  del feed
  return True
