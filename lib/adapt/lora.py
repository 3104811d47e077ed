# SPDX-License-Identifier: Apache-2.0
"""LoRA: train a low-rank term beside frozen weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685:
`W + (alpha / r) A B`, in our (in, out) layout. A is drawn from U(-1/sqrt(in), 1/sqrt(in)), the
initialization of `peft` (the paper says Gaussian), and B is zero, so the adapted network starts as
the base. On a quantized base it is QLoRA (Dettmers et al., 2023, arXiv:2305.14314): nothing is
dequantized but inside the product. rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732) scales by
alpha / sqrt(r).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, lifting, step
from treesurgeon.io import peft_config

DTYPES = ("float32", "bfloat16", "float16")


def factors(
  key: jax.Array, shape: tuple[int, ...], *, rank: int, dtype: str
) -> tuple[Float[Array, "*batch rows rank"], Float[Array, "*batch rank cols"]]:
  """Draw the factors of a fresh adapter.

  Args:
    key: random key.
    shape: (..., in, out) of the weight.
    rank: inner dimension.
    dtype: dtype of both; A is drawn in float32.

  Returns:
    (A, B): A uniform in +-1/sqrt(in), B zero.

  Example:
    >>> a, b = factors(jax.random.key(0), (4, 6), rank=2, dtype="float32")
    >>> a.shape, b.shape, bool(abs(a).max() <= 0.5)
    ((4, 2), (2, 6), True)
  """
  *batch, rows, cols = shape
  bound = 1.0 / math.sqrt(rows)
  a = jax.random.uniform(key, (*batch, rows, rank), jnp.float32, -bound, bound)
  return a.astype(dtype), jnp.zeros((*batch, rank, cols), dtype)


@step.method("adapt.lora")
def lora(
  *,
  rank: int = 8,
  alpha: int | float = 16.0,
  rslora: bool = False,
  select: str | None = None,
  dtype: str = "float32",
) -> step.Step:
  """Put a fresh LoRA adapter beside every selected kernel; base weights stay bit for bit.

  Neutral point: every setting. B is zero, so the weight keeps its value exactly, and so do the
  logits: zero is added to a product that is computed as before (bit for bit in float32 on a CPU;
  elsewhere a compiler may order that product's sum anew). A second call puts a second adapter on
  top of the first.

  Args:
    rank: inner dimension r.
    alpha: the term is scaled by alpha / rank.
    rslora: scale by alpha / sqrt(rank) instead.
    select: regular expression over addresses; by default every kernel of the blocks.
    dtype: of the factors: "float32", "bfloat16" or "float16", whatever the base is stored in.

  Returns:
    The transform.

  Raises:
    ValueError: for a rank below 1, an alpha that is not a positive number, or another dtype.

  Example:
    >>> lora(rank=4)
    (adapt.lora(rank=4),)

  Reference:
    Hu et al., 2021, arXiv:2106.09685.
  """
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(f"adapt.lora: rank={rank!r} must be an integer of 1 or more, such as 8")
  if not 0 < alpha < math.inf:
    raise ValueError(f"adapt.lora: alpha={alpha!r} must be a positive number, such as 16.0")
  if dtype not in DTYPES:
    raise ValueError(f"adapt.lora: dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  hyper = {"rank": rank, "scale": peft_config.scaling(rank, alpha, rslora=rslora), "dtype": dtype}
  return lifting.over_leaves(_adapt, hyper=hyper, select=select, random=True, raw=True)


def _adapt(w: Any, *, key: jax.Array, rank: int, scale: float, dtype: str) -> leaves.Sum:
  a, b = factors(key, tuple(w.shape), rank=rank, dtype=dtype)
  return adapters.join(w, leaves.LowRank(a, b, scale))
