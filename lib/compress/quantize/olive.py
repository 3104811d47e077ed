# SPDX-License-Identifier: Apache-2.0
"""OliVe: a large weight takes its neighbour's place, so that every pair has the same few bits.

Weights are few that are large, and rarely two in a row, while the one next to a large one matters
no more than others. So the neighbour, the victim, becomes zero, and its code says so; the outlier
then has a format of its own, floats beyond the range of normal values. Scales are searched for
about the largest of |mean +- 3 deviations| of every output, by squared error. Four-bit normal
values are integers or flint numbers, whichever is better for the matrix.

After the paper's published code, which rounds and zeroes but stores no codes. Pairs run along the
inputs; of two outliers in one pair the first stays. An odd last input has no neighbour to lose.
Codes are sign and magnitude here, the identifier minus zero in both formats; the paper's integers
are two's complement with the identifier -8, which is the same bit pattern.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from treesurgeon.core import leaves, lifting, packing, step
from treesurgeon.core.leaves import outlier_victim

SIGMAS = 3.0
LOWEST, HIGHEST, STRIDE = 75, 250, 2  # the search, in percent, as the published scripts call it


def encode(
  units: Float[Array, "*batch rows cols"], *, bits: int, flint: bool = False
) -> UInt8[Array, "*batch even cols"]:
  """Round to outlier-victim pairs.

  Args:
    units: weights over their scales.
    bits: width of a code, 4 or 8.
    flint: whether normal values are flint numbers.

  Returns:
    Codes; an odd number of rows is filled up by one.

  Example:
    >>> encode(jnp.array([[4.0], [9.0], [90.0], [9.0]]), bits=4)[:, 0].tolist()
    [1, 2, 3, 8]
  """
  half = 2 ** (bits - 1)
  *batch, rows, cols = units.shape
  x = jnp.pad(units.astype(jnp.float32), [(0, 0)] * len(batch) + [(0, rows % 2), (0, 0)])
  sizes = np.append(outlier_victim.normals(bits, flint=flint), outlier_victim.outliers(bits))
  middles = jnp.asarray((sizes[1:] + sizes[:-1]) / 2)
  at = jnp.searchsorted(middles, jnp.abs(x), method="scan_unrolled")
  far = at >= half
  magnitude = jnp.where(far, at - half + 1, at)
  codes = magnitude + half * ((x < 0) & (magnitude > 0))
  first, second = far[..., ::2, :], far[..., 1::2, :]
  victims = jnp.stack([second & ~first, first], axis=-2).reshape(x.shape)
  return jnp.where(victims, half, codes).astype(jnp.uint8)


def quantize(
  w: Float[Array, "*batch rows cols"], *, bits: int = 4
) -> tuple[UInt8[Array, "*batch even cols"], jax.Array, jax.Array | None]:
  """Search for the scales of a matrix and round it, in float32.

  Args:
    w: weights, input dimension first.
    bits: width of a code, 4 or 8.

  Returns:
    (codes, scales (..., 1, cols) in the dtype of `w`, whether normal values are flint numbers
    (..., 1, 1)); the last is None for 8 bits, which have integers only.

  Example:
    >>> codes, scales, flint = quantize(jnp.array([[7.0], [-2.0], [0.1], [90.0]]))
    >>> codes.shape, scales.shape, flint.shape
    ((4, 1), (1, 1), (1, 1))
  """
  found = [_search(w, bits, flint) for flint in ((False, True) if bits == 4 else (False,))]
  made = [(encode(_over(w, s), bits=bits, flint=i == 1), s) for i, (s, _) in enumerate(found)]
  if bits != 4:
    return *made[0], None
  total = [error.sum(axis=-1, keepdims=True) for _, error in found]
  flint = total[1] < total[0]
  codes, scales = (jnp.where(flint, b, a) for a, b in zip(*made, strict=True))
  return codes, scales, flint


@step.method("compress.quantize.olive")
def olive(*, bits: int = 4, select: str | None = None) -> step.Step:
  """Quantize kernels to outlier-victim pairs, no data needed.

  Args:
    bits: width of a code, 4 or 8.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for another width.

  Example:
    >>> olive()
    (compress.quantize.olive(),)

  Reference:
    Guo et al., OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair
    Quantization, ISCA 2023, arXiv:2304.07493.
  """
  if bits not in (4, 8):
    raise ValueError(f"bits={bits}: outlier-victim pairs have codes of 4 or 8 bits")
  return lifting.over_leaves(_leaf, hyper={"bits": bits}, select=select, raw=True)


def _leaf(w: Any, *, bits: int) -> Any:
  if isinstance(w, leaves.OutlierVictim) and w.bits == bits:
    return w
  w = leaves.dense(w)
  codes, scales, flint = quantize(w, bits=bits)
  *_, rows, cols = w.shape
  return leaves.OutlierVictim(
    packing.pack(codes, bits=bits), scales, None if flint is None else flint.astype(jnp.uint8),
    rows=rows, cols=cols, bits=bits, store=jnp.dtype(w.dtype).name,
  )  # fmt: skip


def _over(w: jax.Array, scales: jax.Array) -> jax.Array:
  return w.astype(jnp.float32) / scales.astype(jnp.float32)


def _search(w: jax.Array, bits: int, flint: bool) -> tuple[jax.Array, jax.Array]:
  """Find the scale of every column, in the dtype it is stored in, and its squared error."""
  x = w.astype(jnp.float32)
  *batch, rows, cols = x.shape
  middle = x.mean(axis=-2, keepdims=True)
  spread = SIGMAS * x.std(axis=-2, keepdims=True, ddof=min(1, rows - 1))
  base = jnp.maximum(jnp.abs(middle + spread), jnp.abs(middle - spread))
  base = base / outlier_victim.normals(bits, flint=flint)[-1]

  def at(percent: jax.Array) -> jax.Array:
    stored = (base * (percent * 0.01)).astype(w.dtype)
    return jnp.where(stored == 0, jnp.ones((), w.dtype), stored)

  def error(scales: jax.Array) -> jax.Array:
    codes = encode(_over(x, scales), bits=bits, flint=flint)
    kind = jnp.ones((*batch, 1, 1), jnp.uint8) if flint else None
    packed = packing.pack(codes, bits=bits)
    leaf = leaves.OutlierVictim(packed, scales, kind, rows=rows, cols=cols, bits=bits)
    return ((leaf.dense() - x) ** 2).sum(axis=-2, keepdims=True)

  def better(i: jax.Array, state: tuple) -> tuple:
    scales = at(LOWEST + STRIDE * i)
    wrong = error(scales)
    pick = wrong < state[1]
    return jnp.where(pick, scales, state[0]), jnp.where(pick, wrong, state[1])

  start = at(jnp.asarray(LOWEST))
  count = len(range(LOWEST, HIGHEST, STRIDE))
  return jax.lax.fori_loop(1, count, better, (start, error(start)))
