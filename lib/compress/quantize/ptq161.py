# SPDX-License-Identifier: Apache-2.0
"""PTQ1.61: four bits for the most active inputs, signs with learned scales for the others.

A fifth of the inputs, those of the largest activations, keep 4-bit integers with a range for each
output; which they are costs a bit an input. A weight of the others becomes
r2_i r1_j (alpha_j sign(w_ij - m_j) + m_j), with m_j the mean of its output's weights, alpha_j at
first their mean magnitude, and r1 and r2 at first 1. Scales of a block's kernels are then learned
together: the output is drawn, by the mean square of the difference and by -log of the cosine, to
what the block should give and to what it gave, as it was, on the inputs it now gets.

In exact arithmetic the binary part is signs times a product of rank one, plus another one, which is
how it is stored. At width 4096 that makes 1.6 bits a weight.

Where we differ from the published code: what learning found best is kept; the preprocessing, which
trains adapters on the whole model so that it can be quantized and starts again, is not part of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn, tune
from treesurgeon.core import leaves, lifting, needs, packing, step

BITS = 4


def start(
  w: Float[Array, "rows cols"], activations: Float[Array, " rows"], *, salient: float = 0.2
) -> tuple[dict[str, jax.Array], Callable[..., Any]]:
  """Quantize a matrix with the scales that need no learning.

  Args:
    w: weights, input dimension first.
    activations: largest magnitude of each input.
    salient: fraction of the inputs that keep four bits.

  Returns:
    (the scales, float32: alpha and r1 of the outputs, r2 of the binary inputs; what makes the leaf
    of any scales).

  Example:
    >>> w = jnp.array([[1.0, -3.0], [-1.0, 3.0], [7.0, 7.5]])
    >>> scales, make = start(w, jnp.array([1.0, 1.0, 9.0]), salient=0.4)
    >>> make(scales).dense().round(4).tolist()
    [[1.0, -3.0], [-1.0, 3.0], [7.0, 7.5]]
  """
  rows, cols = w.shape
  few = _count(salient, rows)
  order = jnp.argsort(-activations, stable=True)
  kept, binary = jnp.sort(order[:few]), jnp.sort(order[few:])
  rest = w.astype(jnp.float32)[binary]
  mean = rest.mean(axis=0, keepdims=True)
  signs = packing.pack((rest >= mean).astype(jnp.uint8), bits=1)
  first = None
  if few:
    form: dict[str, Any] = {"bits": BITS, "group_size": few}
    codes, grid = rtn.quantize(w[kept], **form, symmetric=False)
    first = grids.tensor(codes, grid, **form, store=w.dtype)
  mask = packing.pack(jnp.zeros((rows, 1), jnp.uint8).at[kept].set(1), bits=1)
  alpha = jnp.abs(rest).mean(axis=0, keepdims=True)

  def make(scales: Mapping[str, jax.Array], *, dtype: Any = w.dtype) -> Any:
    column, across = scales["r2"], scales["r1"]
    a, b, shift = (x.astype(dtype) for x in (column, across * scales["alpha"], across * mean))
    body = leaves.Sum(
      (leaves.SignedLowRank(signs, a, b, store=w.dtype.name), leaves.LowRank(a, shift))
    )
    return leaves.SplitRows(first, body, mask) if few else body

  scales = {"alpha": alpha, "r1": jnp.ones((1, cols)), "r2": jnp.ones((rows - few, 1))}
  return scales, make


@step.method("compress.quantize.ptq161")
def ptq161(
  *,
  salient: float = 0.2,
  epochs: int = 20,
  scale_rate: float = 5e-4,
  rate: float = 1e-3,
  batch: int = 1,
  select: str | None = None,
) -> step.Step:
  """Binarize kernels but for their most active inputs, with scales learned over blocks.

  Args:
    salient: fraction of the inputs, rounded down, that keep four bits.
    epochs: times that the calibration data is gone through; 0 keeps the analytic scales.
    scale_rate: Adam's step size for alpha.
    rate: its step size for r1 and r2.
    batch: rows of the calibration data a step.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> ptq161(epochs=10)
    (compress.quantize.ptq161(epochs=10),)

  Reference:
    Zhao et al., PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization
    Methods for Large Language Models, 2025, arXiv:2502.13179.
  """
  if not 0 <= salient < 1:
    raise ValueError(f"salient={salient}: valid is 0 to below 1, a fraction of the inputs")
  if epochs < 0:
    raise ValueError(f"epochs={epochs}: valid is 0 (analytic scales) or more")
  if batch < 1:
    raise ValueError(f"batch={batch}: a step needs 1 row of the calibration data or more")
  hyper = {
    "salient": salient, "epochs": epochs, "scale_rate": scale_rate, "rate": rate, "batch": batch
  }  # fmt: skip
  wants = {"activations": needs.Statistic("absmax")}
  return lifting.over_blocks(_block, hyper=hyper, wants=wants, select=select, raw=True)


def _block(
  w: Mapping[str, Any],
  *,
  inputs: jax.Array,
  targets: jax.Array,
  forward: Any,
  activations: Mapping[str, Any],
  salient: float,
  epochs: int,
  scale_rate: float,
  rate: float,
  batch: int,
) -> dict[str, Any]:
  begun = {
    n: start(leaves.dense(x), activations[n].value, salient=salient)
    for n, x in w.items()
    if not _done(x, salient)
  }
  if not begun:
    return dict(w)
  before = jax.lax.map(lambda row: forward({}, row[None])[0], inputs) if epochs else targets

  def loss(out: jax.Array, at: jax.Array) -> jax.Array:
    both = [t[at].astype(jnp.float32) for t in (targets, before)]
    return sum((_distance(out, t) for t in both), jnp.zeros(at.shape))

  names = {n: {"alpha": "alpha", "r1": "r", "r2": "r"} for n in begun}
  optimizer = optax.multi_transform({"alpha": optax.adam(scale_rate), "r": optax.adam(rate)}, names)
  best = tune.block(
    lambda x: {n: begun[n][1](s, dtype=jnp.float32) for n, s in x.items()},
    {n: scales for n, (scales, _) in begun.items()}, inputs=inputs, targets=targets,
    forward=forward, optimizer=optimizer, epochs=epochs, batch=batch, loss=loss,
  )  # fmt: skip
  return {**w, **{n: make(best[n]) for n, (_, make) in begun.items()}}


def _distance(out: jax.Array, target: jax.Array) -> jax.Array:
  """Add the mean square of the difference and -log of the mean cosine, row by row."""
  axes = tuple(range(1, out.ndim))
  lengths = jnp.linalg.norm(out, axis=-1) * jnp.linalg.norm(target, axis=-1)
  cosine = (out * target).sum(axis=-1) / jnp.maximum(lengths, 1e-8)
  turned = -jnp.log(jnp.maximum(jnp.abs(cosine.mean(axis=axes[:-1])), 1e-8))
  return jnp.square(out - target).mean(axis=axes) + turned


def _count(salient: float, rows: int) -> int:
  return min(int(salient * rows), rows - 1)


def _done(leaf: Any, salient: float) -> bool:
  few = leaf.first.shape[-2] if isinstance(leaf, leaves.SplitRows) else 0
  body = leaf.rest if few else leaf
  kinds = [type(p) for p in body.parts] if isinstance(body, leaves.Sum) else []
  alike = kinds == [leaves.SignedLowRank, leaves.LowRank]
  return alike and few == _count(salient, leaf.shape[-2])
