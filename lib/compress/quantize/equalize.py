# SPDX-License-Identifier: Apache-2.0
"""Equalization: scale channels between two layers so that both quantize well; no output changes.

"cross": the columns of v and the rows of o, and of up and down, get the same range, by
s = sqrt(r1 / r2) with r1, r2 the largest magnitudes of what writes and what reads a channel (Nagel
et al., section 4.1, whose two layers around a ReLU these stand for). No data needed.

"log": inputs that norms feed are divided by s = max|X| / log2(2 + max|X|), which compresses the
ranges of outliers more than those of others and moves what is left into the weights (Li et al.).

Fixed point of "cross": applied to its own result it changes nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress import feeds, over_feeds
from treesurgeon.core import step

KINDS = ("cross", "log")


def cross(written: Float[Array, " rows"], read: Float[Array, " rows"]) -> Float[Array, " rows"]:
  """Compute the scales that give a channel one range where it is written and where it is read.

  Args:
    written: largest magnitude of the weights that write each channel.
    read: largest magnitude of the weights that read it.

  Returns:
    s, by which the first are divided and the second multiplied; 1 where either is 0.

  Example:
    >>> cross(jnp.array([8.0, 0.0]), jnp.array([2.0, 1.0])).tolist()
    [2.0, 1.0]
  """
  used = (written > 0) & (read > 0)
  return jnp.where(used, jnp.sqrt(written / jnp.where(used, read, 1.0)), 1.0)


def log(x_max: Float[Array, " rows"]) -> Float[Array, " rows"]:
  """Compute the scales of logarithmic equalization.

  Args:
    x_max: largest magnitude of each input.

  Returns:
    s; 1 where an input was never active.

  Example:
    >>> log(jnp.array([14.0, 0.0])).tolist()
    [3.5, 1.0]
  """
  return jnp.where(x_max > 0, x_max / jnp.log2(2 + x_max), 1.0)


@step.method("compress.quantize.equalize")
def equalize(*, kind: str = "cross", select: str | None = None) -> step.Step:
  """Equalize channels between layers; to be followed by a quantizer.

  Args:
    kind: "cross" equalizes v with o and up with down, "log" what the norms feed, from calibration.
    select: which kernels, those that read; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for another kind, and as `smoothquant`.

  Example:
    >>> equalize()
    (compress.quantize.equalize(),)

  Reference:
    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019,
    arXiv:1906.04721; Li et al., FPTQ, 2023, arXiv:2308.15987.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: valid are {', '.join(KINDS)}")
  wants = {"x_max": "absmax"} if kind == "log" else {}
  fn, kinds = (_log, _norms) if kind == "log" else (_cross, _linears)
  return over_feeds.over_feeds(fn, hyper={}, wants=wants, kinds=kinds, select=select)


def _cross(
  reads: Mapping[str, jax.Array], writes: Mapping[str, jax.Array], *, feed: feeds.Feed
) -> jax.Array:
  (kernel,) = (w for n, w in writes.items() if n.endswith("kernel"))
  rows = jnp.stack([jnp.abs(w).max(axis=1) for w in reads.values()]).max(axis=0)
  return cross(jnp.abs(kernel).max(axis=0), feeds.pool(feed, rows))


def _log(
  reads: Mapping[str, jax.Array],
  writes: Mapping[str, jax.Array],
  *,
  feed: feeds.Feed,
  x_max: jax.Array,
) -> jax.Array:
  del reads, writes, feed
  return log(x_max)


def _norms(feed: feeds.Feed) -> bool:
  return feed.norm


def _linears(feed: feeds.Feed) -> bool:
  return not feed.norm
