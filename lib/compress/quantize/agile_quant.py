# SPDX-License-Identifier: Apache-2.0
"""Agile-Quant: 4-bit weights by GPTQ, activations of 8 bits, or 4 where they bear it.

Inputs have one static scale a kernel, refined by channel with powers of two (the paper's TRIP,
after the power-of-two factors of FQ-ViT): with s the layer's range over 2^K, channel c takes the
least a_c of 0 ... K for which 2^a_c s reaches its largest magnitude. As in the paper's inference
engine the factors are folded, rows of kernels times 2^a_c and what makes the input over it
(`compress.feeds`), which changes no bit of the outputs by itself. Weights are then rounded by GPTQ
with the second moments of the scaled inputs.

Where we differ: grids are symmetric, the factors come from largest magnitudes instead of a search
by squared error, and what is no property of a kernel is left out: the logarithmic grid of attention
weights, and the pruning of tokens at inference (which helps from 2048 tokens on, by their figure
8). Inputs that nothing before them can scale take a = 0 throughout.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress import feeds as feeds_lib
from treesurgeon.compress import over_feeds
from treesurgeon.compress.quantize import gptq
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import formats, leaves, step


def factors(top: Float[Array, " channels"], *, refine: int = 3) -> Float[Array, " channels"]:
  """Choose each channel's power of two.

  Args:
    top: largest magnitude of each channel.
    refine: K, the largest exponent.

  Returns:
    2^a_c; the largest channel has 2^K.

  Example:
    >>> factors(jnp.array([8.0, 3.0, 0.5, 0.0])).tolist()
    [8.0, 4.0, 1.0, 1.0]
  """
  least = top.max() / 2**refine
  ratio = jnp.where(least > 0, top / jnp.where(least > 0, least, 1.0), 1.0)
  # From the exponent itself: a logarithm may land just above a whole number.
  fraction, power = jnp.frexp(jnp.maximum(ratio, 1.0))
  return jnp.exp2(jnp.clip(jnp.where(fraction == 0.5, power - 1, power), 0, refine))


@step.method("compress.quantize.agile_quant")
def agile_quant(
  *,
  bits: int = 4,
  group_size: int = 128,
  act_bits: int = 8,
  low: str = "attn/o/kernel",
  low_bits: int = 4,
  refine: int = 3,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels by GPTQ and their inputs with one scale and powers of two by channel.

  Args:
    bits: width of a weight, 2 to 8.
    group_size: input rows that share a scale; -1 is one a column.
    act_bits: width of an input, 2 to 8.
    low: regular expression over kernels' names within a layer whose inputs take fewer bits, what
      follows self-attention; "" is none.
    low_bits: the width of those.
    refine: the largest power of two.
    select: which kernels; None is every kernel inside the layers. Norms change along.

  Returns:
    The transform. Its fixed point is its own result: kernels that are in it stay as they are.

  Raises:
    ValueError: for widths out of range, or a selection of some of the kernels of one input.

  Example:
    >>> agile_quant(act_bits=6)
    (compress.quantize.agile_quant(act_bits=6),)

  Reference:
    Shen et al., Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the
    Edge, 2023, arXiv:2312.05693.
  """
  for name, width in (("bits", bits), ("act_bits", act_bits), ("low_bits", low_bits)):
    if width not in range(2, 9):
      raise ValueError(f"{name}={width}: valid is a whole number from 2 to 8")
  if refine not in range(9):
    raise ValueError(f"refine={refine}: valid is 0 (no factors) to 8")
  grids.check(bits=bits, group_size=group_size)
  widths = (act_bits, low, low_bits)
  return over_feeds.over_layers(
    _layer,
    hyper={"bits": bits, "group_size": group_size, "widths": widths, "refine": refine},
    wants={"absmax": "absmax", "hessian": "second_moment"},
    select=select,
    done=functools.partial(_done, bits=bits, group_size=group_size, widths={act_bits, low_bits}),
  )


def _layer(
  own: Mapping[str, Any],
  *,
  feeds: tuple[feeds_lib.Feed, ...],
  todo: tuple[str, ...],
  absmax: Mapping[str, Any],
  hessian: Mapping[str, Any],
  plus_one: bool,
  bits: int,
  group_size: int,
  widths: tuple[int, str, int],
  refine: int,
) -> dict[str, Any]:
  now: dict[str, Any] = {n: leaves.dense(x) for n, x in own.items()}
  groups, tops, moments = [], {}, {}
  for feed in feeds:
    x, h = absmax[feed.reads[0]].value, hessian[feed.reads[0]].mean()
    s = factors(feeds_lib.pool(feed, x), refine=refine)
    now |= feeds_lib.fold(feed, now, s, plus_one=plus_one)
    wide = feeds_lib.spread(feed, s)
    groups.append(feed.reads)
    tops |= dict.fromkeys(feed.reads, (x / wide).max())
    moments[feed.reads] = h / wide[:, None] / wide[None, :]
  for name in todo:
    if name not in tops:
      groups.append((name,))
      tops[name] = absmax[name].value.max()
      moments[(name,)] = hessian[name].mean()
  for names in groups:
    whole = jnp.concatenate([now[n] for n in names], axis=1)
    size = grids.clamp_group(group_size, whole.shape[0])
    codes, grid, _ = gptq.quantize(whole, moments[names], bits=bits, group_size=size)
    start = 0
    for name in names:
      end = start + now[name].shape[1]
      mine = grids.Grid(grid.scales[:, start:end], None)
      packed = grids.tensor(
        codes[:, start:end], mine, bits=bits, group_size=size, store=now[name].dtype
      )
      width = widths[2] if re.fullmatch(widths[1], name) else widths[0]
      top = jnp.where(tops[name] > 0, tops[name], 1.0)
      scale = (top / formats.divisor("int", width)).astype(jnp.float32).reshape(1, 1)
      now[name] = leaves.ActivationQuantized(packed, scale, bits=width, per="tensor")
      start = end
  return now


def _done(leaf: Any, *, bits: int, group_size: int, widths: set[int]) -> bool:
  return (
    isinstance(leaf, leaves.ActivationQuantized)
    and leaf.scale is not None
    and leaf.bits in widths
    and grids.already(leaf.weight, bits=bits, group_size=group_size, symmetric=True)
  )
