# SPDX-License-Identifier: Apache-2.0
"""OutlierTune: activations quantized by channel at the price of one scale.

Channel j of a kernel's input has the static scale s_j = max|X_j - z_j|, and the midpoint z_j of its
range. Symmetrization takes z_j off where the input is made, from the bias of a norm or of v, and
puts z W onto the kernel's own bias. The dequantization is executed ahead of time: rows of the
kernel times s_j; and here the division too, by what makes the input (`compress.feeds`), so that all
channels then lie within -1 to 1 and a kernel multiplies integers of one scale. Weights, as changed,
are rounded to nearest with one scale an output.

The paper's own code is not public. Ours differs where there are no biases, as in Llama: channels
are scaled about zero. Inputs that nothing before them can scale (down after a GELU) are quantized
dynamically, by token.
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
from treesurgeon.core import formats, leaves, step


def shift(
  feed: feeds_lib.Feed, own: Mapping[str, jax.Array], z: Float[Array, " channels"]
) -> dict[str, jax.Array]:
  """Subtract z from the input of kernels and add what it gave to their biases.

  Args:
    feed: the feed; what writes its input has a bias.
    own: the layer's leaves by name, those kernels' biases too.
    z: what to subtract, one value a channel.

  Returns:
    The changed biases, in their dtypes.

  Example:
    >>> feed = feeds_lib.Feed(("up/kernel",), ("norm/scale", "norm/bias"), True)
    >>> own = {"up/kernel": jnp.ones((2, 1)), "up/bias": jnp.zeros(1), "norm/bias": jnp.zeros(2)}
    >>> {n: x.tolist() for n, x in shift(feed, own, jnp.array([1.0, 2.0])).items()}
    {'norm/bias': [-1.0, -2.0], 'up/bias': [3.0]}
  """
  source = next(n for n in feed.writes if n.endswith("bias"))
  out = {source: own[source] - z}
  for kernel in feed.reads:
    bias = _bias(kernel)
    gave = jnp.matmul(
      feeds_lib.spread(feed, z), own[kernel].astype(jnp.float32), precision="highest"
    )
    out[bias] = out.get(bias, own[bias]) + gave
  return {n: x.astype(own[n].dtype) for n, x in out.items()}


@step.method("compress.quantize.outliertune")
def outliertune(*, bits: int = 8, weight_bits: int = 8, select: str | None = None) -> step.Step:
  """Quantize kernels and, by channel, their inputs.

  Args:
    bits: width of an input, 2 to 8.
    weight_bits: width of a weight, 2 to 8.
    select: which kernels; None is every kernel inside the layers. Norms and biases change along.

  Returns:
    The transform. Its fixed point is its own result: kernels that are in it stay as they are.

  Raises:
    ValueError: for widths out of range, or a selection of some of the kernels of one input.

  Example:
    >>> outliertune(bits=6)
    (compress.quantize.outliertune(bits=6),)

  Reference:
    Wang et al., OutlierTune: Efficient Channel-Wise Quantization for Large Language Models, 2024,
    arXiv:2406.18832.
  """
  for name, width in (("bits", bits), ("weight_bits", weight_bits)):
    if width not in range(2, 9):
      raise ValueError(f"{name}={width}: valid is a whole number from 2 to 8")
  return over_feeds.over_layers(
    _layer,
    hyper={"bits": bits, "weight_bits": weight_bits},
    wants={"ranges": "range"},
    select=select,
    done=functools.partial(_done, bits=bits, weight_bits=weight_bits),
  )


def _layer(
  own: Mapping[str, Any],
  *,
  feeds: tuple[feeds_lib.Feed, ...],
  todo: tuple[str, ...],
  ranges: Mapping[str, Any],
  plus_one: bool,
  bits: int,
  weight_bits: int,
) -> dict[str, Any]:
  now: dict[str, Any] = {n: leaves.dense(x) for n, x in own.items()}
  unit = 1 / formats.divisor("int", bits)
  scales: dict[str, Any] = dict.fromkeys(todo)
  for feed in feeds:
    seen = ranges[feed.reads[0]]
    low, high = feeds_lib.pool(feed, seen.low, jnp.min), feeds_lib.pool(feed, seen.high)
    z = jnp.zeros_like(low)
    biased = any(n.endswith("bias") for n in feed.writes)
    if biased and all(_bias(n) in now for n in feed.reads):
      z = jnp.where(jnp.isfinite(low + high), (low + high) / 2, 0.0)
      now |= shift(feed, now, z)
    s = jnp.maximum(jnp.abs(low - z), jnp.abs(high - z))
    s = jnp.where(jnp.isfinite(s) & (s > 0), s, 1.0)
    now |= feeds_lib.fold(feed, now, s, plus_one=plus_one)
    scales |= dict.fromkeys(feed.reads, jnp.full((1, 1), unit, jnp.float32))
  for name in todo:
    w = now[name]
    form = {"bits": weight_bits, "group_size": w.shape[0]}
    codes, grid = rtn.quantize(w, **form)
    packed = grids.tensor(codes, grid, **form, store=w.dtype)
    per = "token" if scales[name] is None else "tensor"
    now[name] = leaves.ActivationQuantized(packed, scales[name], bits=bits, per=per)
  return now


def _bias(kernel: str) -> str:
  return kernel.removesuffix("kernel") + "bias"


def _done(leaf: Any, *, bits: int, weight_bits: int) -> bool:
  return (
    isinstance(leaf, leaves.ActivationQuantized)
    and (leaf.bits, leaf.format) == (bits, "int")
    and grids.already(leaf.weight, bits=weight_bits, group_size=-1, symmetric=True)
  )
