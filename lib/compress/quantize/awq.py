# SPDX-License-Identifier: Apache-2.0
"""AWQ: scale up the channels that activations make important before rounding; then clip.

For every set of kernels with one input, s = mean|x|^a (over mean|w|^(1 - a) with `duo_scaling`,
where |w| is relative to its group's largest) is tried for 20 values of a, s = 1 among them, and the
s of least output error is folded: rows of the kernels times s, what makes the input over s
(`compress.feeds`). Then every group of weights of a column is clipped to what of 1, 0.95, ... 0.55
of its largest magnitude gives the least error of the group's share of the output, but for q and k.
At last all is rounded to nearest. Statistics are those of the original model's inputs, or with the
driver that goes block by block of the quantized prefix; as in the paper's code no weight makes up
for another's error.

Where we differ from the paper's code and from llm-compressor: errors are exact over all calibration
tokens, tr(dWᵀ H dW) with H = sum x xᵀ, where theirs run tokens through the block for every a; so
the error is that of the kernels' own outputs, not of what attention and the gate make of them.
Value heads that several query heads share are scaled too, by the mean of their magnitudes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress import feeds as feeds_lib
from treesurgeon.compress import over_feeds
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, step

POINTS = 20  # of the search for a, and steps into which clipping divides the range
LEAST = 0.5  # no group is clipped to less


def scale(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  x: Float[Array, " channels"],
  *,
  form: Mapping[str, Any],
  duo_scaling: bool = True,
  feed: feeds_lib.Feed | None = None,
) -> Float[Array, " channels"]:
  """Search for the scales of a kernel's inputs.

  Args:
    w: all kernels that read the inputs, side by side.
    h: second moment of the inputs, up to a factor.
    x: mean magnitude of each channel, up to a factor.
    form: bits, group_size, symmetric, and what else `rtn.quantize` takes.
    duo_scaling: divide by the weights' mean relative magnitude too.
    feed: how inputs share channels; None is not at all.

  Returns:
    One scale a channel; largest times smallest is 1.

  Example:
    >>> w, h = jnp.array([[1.0, 1.0], [0.1, -0.07]]), jnp.diag(jnp.array([1.0, 1e4]))
    >>> s = scale(w, h, jnp.array([1.0, 100.0]), form={"bits": 3, "group_size": 2})
    >>> bool(s[1] > 2 * s[0])
    True
  """
  feed = feed or feeds_lib.Feed((), (), False)
  w, h = w.astype(jnp.float32), h.astype(jnp.float32)
  share = feeds_lib.pool(feed, _relative(w, form["group_size"]), jnp.mean)

  def candidate(i: jax.Array) -> jax.Array:
    if not duo_scaling:
      s = jnp.maximum(x ** (i / (POINTS - 1)), 1e-4)
    else:
      a = (i - 1) / (POINTS - 2)
      s = jnp.maximum(x**a / (share ** (1 - a) + 1e-4), 1e-4)
    s = jnp.where(i == 0, 1.0, s)
    s = s / jnp.sqrt(s.max() * s.min())
    return jnp.where(jnp.isfinite(s), s, 1.0)

  def better(i: jax.Array, state: tuple) -> tuple:
    s = candidate(i)
    wide = feeds_lib.spread(feed, s)[:, None]
    wrong = _nearest(w * wide, form) / wide - w
    error = (jnp.matmul(h, wrong, precision="highest") * wrong).sum()
    pick = error < state[1]
    return jnp.where(pick, s, state[0]), jnp.where(pick, error, state[1])

  start = jnp.ones_like(x, jnp.float32), jnp.float32(jnp.inf)
  return jax.lax.fori_loop(0, POINTS, better, start)[0]


def clip(
  w: Float[Array, "rows cols"], h: Float[Array, "rows rows"], *, form: Mapping[str, Any]
) -> Float[Array, "rows cols"]:
  """Clip every group of a column where that brings its share of the output nearer.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    form: bits, group_size, symmetric, and what else `rtn.quantize` takes.

  Returns:
    The weights, in float32.

  Example:
    >>> w, h = jnp.array([[1.0], [0.3], [0.3]]), jnp.diag(jnp.array([0.0, 1.0, 1.0]))
    >>> clip(w, h, form={"bits": 2, "group_size": 3})[0, 0].item() < 1
    True
  """
  size, (rows, cols) = form["group_size"], w.shape
  more = -rows % size
  parts = jnp.pad(w.astype(jnp.float32), [(0, more), (0, 0)]).reshape(-1, size, cols)
  count = parts.shape[0]
  h = jnp.pad(h.astype(jnp.float32), [(0, more), (0, more)])
  own = h.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count)]
  top = jnp.abs(parts).max(axis=1, keepdims=True)

  def clipped(share: jax.Array) -> jax.Array:
    return jnp.clip(parts, -share * top, share * top)

  def better(i: jax.Array, state: tuple) -> tuple:
    share = 1 - i / POINTS
    wrong = _nearest(clipped(share).reshape(-1, cols), form).reshape(parts.shape) - parts
    error = (jnp.matmul(own, wrong, precision="highest") * wrong).sum(axis=1, keepdims=True)
    pick = error < state[1]
    return jnp.where(pick, share, state[0]), jnp.where(pick, error, state[1])

  start = jnp.ones_like(top), jnp.full_like(top, jnp.inf)
  best, _ = jax.lax.fori_loop(0, int(POINTS * LEAST), better, start)
  return clipped(best).reshape(-1, cols)[:rows]


@step.method("compress.quantize.awq")
def awq(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = False,
  duo_scaling: bool = True,
  clip: bool = True,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by AWQ, from second moments and mean magnitudes of their inputs.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points; the paper has them.
    duo_scaling: let weights' magnitudes count in the scales too, as llm-compressor does.
    clip: search for ranges of groups.
    scale_dtype: how scales are stored, as for rtn; None is the weight's dtype.
    select: which kernels; None is every kernel inside the layers. Norms change along.

  Returns:
    The transform. Its fixed point is its own format: kernels that are in it stay as they are.

  Raises:
    ValueError: for values out of range, or a selection of some of the kernels of one input.

  Example:
    >>> awq(bits=3)
    (compress.quantize.awq(bits=3),)

  Reference:
    Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration,
    2023, arXiv:2306.00978.
  """
  form = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
  grids.check(**form, scale_dtype=scale_dtype)
  how = {**form, "scale_dtype": scale_dtype}
  hyper = {"form": tuple(how.items()), "clipping": clip, "duo_scaling": duo_scaling}
  return over_feeds.over_layers(
    _layer,
    hyper=hyper,
    wants={"hessian": "second_moment", "magnitudes": "sum_magnitudes"},
    select=select,
    done=functools.partial(grids.already, **form),
  )


def _layer(
  own: Mapping[str, Any],
  *,
  feeds: tuple[feeds_lib.Feed, ...],
  hessian: Mapping[str, Any],
  magnitudes: Mapping[str, Any],
  form: tuple[tuple[str, Any], ...],
  todo: tuple[str, ...],
  clipping: bool,
  duo_scaling: bool,
  plus_one: bool,
) -> dict[str, Any]:
  """Scale, clip and round the kernels of one layer."""
  now: dict[str, Any] = {n: leaves.dense(x) for n, x in own.items()}
  moments: dict[str, Any] = {}

  def sized(rows: int) -> dict[str, Any]:
    return {**dict(form), "group_size": grids.clamp_group(dict(form)["group_size"], rows)}

  for feed in feeds:
    whole = jnp.concatenate([now[n] for n in feed.reads], axis=1)
    x = feeds_lib.pool(feed, magnitudes[feed.reads[0]].mean(), jnp.mean)
    h = hessian[feed.reads[0]].mean()
    s = scale(whole, h, x, form=sized(len(h)), duo_scaling=duo_scaling, feed=feed)
    now |= feeds_lib.fold(feed, now, s, plus_one=plus_one)
    wide = feeds_lib.spread(feed, s)
    moments |= dict.fromkeys(feed.reads, h / wide[:, None] / wide[None, :])
  for name in todo:
    w, how = now[name], sized(now[name].shape[0])
    h = moments[name] if name in moments else hessian[name].mean()
    if clipping and name not in ("attn/q/kernel", "attn/k/kernel"):
      w = clip(w, h, form=how).astype(w.dtype)
    codes, grid = rtn.quantize(w, **how)
    now[name] = grids.tensor(
      codes, grid, bits=how["bits"], group_size=how["group_size"], store=w.dtype
    )
  return now


def _nearest(w: jax.Array, form: Mapping[str, Any]) -> jax.Array:
  codes, grid = rtn.quantize(w, **form)
  wide = grids.spread(grid, group_size=form["group_size"], rows=w.shape[0])
  return grids.dequantize(codes, wide, bits=form["bits"])


def _relative(w: jax.Array, size: int) -> jax.Array:
  """Compute the mean over columns of |w| relative to the largest of its group."""
  rows, cols = w.shape
  parts = jnp.pad(jnp.abs(w), [(0, -rows % size), (0, 0)]).reshape(-1, size, cols)
  parts = parts / (parts.max(axis=1, keepdims=True) + 1e-6)
  return parts.reshape(-1, cols)[:rows].mean(axis=1)
