# SPDX-License-Identifier: Apache-2.0
"""GQSA: whole groups of weights pruned, what is left quantized group by group.

A group is a run of `group` inputs of one output. Its saliency is the sum of w² / [H⁻¹]_ii, for the
second moment H of the inputs; of each output the same number of groups is kept, the most salient.
Kept groups share a symmetric scale each. The first codes come from rows in turn (`rounding`), so
that kept weights make up for pruned ones. Then a block's weights and scales are tuned together by
its output, rounding passing gradients straight through and the mask fixed (the paper's BQPO). Its
second stage, which trains the scales alone through the whole network, is `tune_scales`.

What differs from the paper: groups are counted for each output, which keeps the arrays rectangular
and the work even, where block-sparse rows may differ in length; corrections in the first codes; the
mask takes a bit a group. Its code is not public: step sizes are ours, of weights in units of their
scale and of scales relative to themselves.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from treesurgeon.compress.prune import masks
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rounding, tune
from treesurgeon.core import leaves, lifting, linalg, needs, packing, step


class Pruned(NamedTuple):
  """Groups that are kept, before their codes are final.

  Attributes:
    units: weights over scales, of kept groups, in row order of each output.
    scales: one a kept group.
    mask: which groups are kept.
  """

  units: Float[Array, "kept cols"]
  scales: Float[Array, "groups cols"]
  mask: Bool[Array, "all_groups cols"]


def prune(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int = 4,
  group: int = 16,
  sparsity: float = 0.5,
  damping: float = 0.01,
) -> Pruned:
  """Choose groups, and weights for them that make up for pruning and rounding.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    bits: width of a code.
    group: rows in a group; the last one may be shorter.
    sparsity: fraction of each output's groups to prune, rounded down.
    damping: added to the diagonal of h, relative to its mean.

  Returns:
    The kept groups.

  Example:
    >>> w = jnp.array([[7.5, 0.1], [3.0, 0.2], [0.1, 7.5], [0.2, -3.0]])
    >>> found = prune(w, jnp.eye(4), group=2)
    >>> found.mask.astype(int).tolist(), found.units.round().tolist()
    ([[1, 0], [0, 1]], [[8.0, 8.0], [3.0, -3.0]])
  """
  rows, cols = w.shape
  w, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  upper, _ = linalg.inverse_factor(h, damping)
  saliency = jnp.square(w) / jnp.square(upper).sum(axis=0)[:, None]
  groups = -(-rows // group)
  runs = jnp.pad(saliency, [(0, groups * group - rows), (0, 0)]).reshape(groups, group, cols)
  kept = groups - int(sparsity * groups)
  mask = masks.top(runs.sum(axis=1), kept)
  grid = grids.fit(w, bits=bits, group_size=group, symmetric=True, scale_dtype="float32")

  def rule(row: jax.Array, wanted: jax.Array, grid: Any) -> tuple[jax.Array, jax.Array]:
    own = jax.tree.map(lambda a: a[row // group], grid)
    codes = grids.round_to(wanted, own, bits=bits)
    value = jnp.where(mask[row // group], grids.dequantize(codes, own, bits=bits), 0.0)
    return wanted / own.scales, value

  units, _, _ = rounding.in_turn(w, rounding.ratios(h, damping), grid, rule)
  units = jnp.pad(units, [(0, groups * group - rows), (0, 0)]).reshape(groups, group, cols)
  order = jnp.argsort(~mask, axis=0, stable=True)[:kept]
  scales = jnp.take_along_axis(grid.scales, order, axis=0)
  units = jnp.take_along_axis(units, order[:, None, :], axis=0)
  return Pruned(units.reshape(kept * group, cols), scales, mask)


@step.method("compress.quantize.gqsa")
def gqsa(
  *,
  bits: int = 4,
  group: int = 16,
  sparsity: float = 0.5,
  damping: float = 0.01,
  epochs: int = 5,
  rate: float = 0.01,
  scale_rate: float = 1e-3,
  batch: int = 4,
  select: str | None = None,
) -> step.Step:
  """Prune groups of kernels and quantize the others, tuned over blocks.

  Args:
    bits: width of a code, 2 to 8.
    group: inputs in a group; the last one may be shorter.
    sparsity: fraction of each output's groups to prune, rounded down.
    damping: added to the diagonal of the second moment, relative to its mean.
    epochs: times that the calibration data is gone through; 0 does not tune.
    rate: Adam's step size for weights, in units of their scale.
    scale_rate: its step size for scales, relative.
    batch: rows of the calibration data a step.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> gqsa(sparsity=0.4)
    (compress.quantize.gqsa(sparsity=0.4),)

  Reference:
    Zeng et al., GQSA: Group Quantization and Sparsity for Accelerating Large Language Model
    Inference, 2024, arXiv:2412.17560.
  """
  grids.check(bits=bits, group_size=group)
  if group < 1:
    raise ValueError(f"group={group}: groups have 1 row or more")
  if not 0 <= sparsity < 1:
    raise ValueError(f"sparsity={sparsity}: valid is 0 to below 1, a fraction of the groups")
  if epochs < 0 or batch < 1:
    raise ValueError(f"epochs={epochs}, batch={batch}: valid are 0 or more, and 1 or more")
  how = {"bits": bits, "group": group, "sparsity": sparsity, "damping": damping}
  wants = {"hessian": needs.Statistic("second_moment")}
  if not epochs:
    return lifting.over_leaves(
      _kernel, hyper=how, select=select, wants=wants, raw=True, scope="block"
    )
  hyper = {**how, "epochs": epochs, "rate": rate, "scale_rate": scale_rate, "batch": batch}
  return lifting.over_blocks(_block, hyper=hyper, wants=wants, select=select, raw=True)


def _kernel(w: Any, hessian: Any, **how: Any) -> Any:
  if _done(w, how["bits"], how["group"]):
    return w
  dense = leaves.dense(w)
  found = prune(dense, hessian.moment, **how)
  return _leaf(found, how["bits"], how["group"], dense)


def _block(
  w: Mapping[str, Any],
  *,
  inputs: jax.Array,
  targets: jax.Array,
  forward: Callable[..., jax.Array],
  hessian: Mapping[str, Any],
  bits: int,
  group: int,
  epochs: int,
  rate: float,
  scale_rate: float,
  batch: int,
  **how: Any,
) -> dict[str, Any]:
  dense = {n: leaves.dense(x) for n, x in w.items() if not _done(x, bits, group)}
  if not dense:
    return dict(w)
  form = {"bits": bits, "group": group}
  found = {n: prune(x, hessian[n].moment, **form, **how) for n, x in dense.items()}
  start = {n: {"units": p.units, "growth": jnp.zeros_like(p.scales)} for n, p in found.items()}

  def pruned(n: str, x: Mapping[str, jax.Array]) -> Pruned:
    return Pruned(x["units"], found[n].scales * jnp.exp(x["growth"]), found[n].mask)

  def build(x: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _soft(pruned(n, p), bits, group, dense[n]) for n, p in x.items()}

  names = {n: {"units": "units", "growth": "growth"} for n in start}
  optimizer = optax.multi_transform(
    {"units": optax.adam(rate), "growth": optax.adam(scale_rate)}, names
  )
  best = tune.block(
    build, start, inputs=inputs, targets=targets, forward=forward, optimizer=optimizer,
    epochs=epochs, batch=batch,
  )  # fmt: skip
  made = {n: _leaf(pruned(n, p), bits, group, dense[n]) for n, p in best.items()}
  return {**w, **made}


def _soft(found: Pruned, bits: int, group: int, w: jax.Array) -> leaves.GroupSparse:
  """Make a leaf of rounded values, gradients passing through the rounding within the range."""
  half = 2.0 ** (bits - 1)
  inside = jnp.clip(found.units, -half, half - 1)
  rounded = inside + jax.lax.stop_gradient(jnp.round(inside) - inside)
  scales = jnp.repeat(found.scales.astype(w.dtype).astype(jnp.float32), group, axis=0)
  mask = packing.pack(found.mask.astype(jnp.uint8), bits=1)
  return leaves.GroupSparse((rounded * scales).astype(w.dtype), mask, w.shape[0], group)


def _leaf(found: Pruned, bits: int, group: int, w: jax.Array) -> leaves.GroupSparse:
  half = 2 ** (bits - 1)
  codes = jnp.clip(jnp.round(found.units) + half, 0, 2 * half - 1).astype(jnp.uint8)
  scales = jnp.where(jnp.isfinite(found.units).all(), found.scales, jnp.nan)
  kept = grids.tensor(
    codes, grids.Grid(scales.astype(w.dtype), None), bits=bits, group_size=group, store=w.dtype
  )
  mask = packing.pack(found.mask.astype(jnp.uint8), bits=1)
  return leaves.GroupSparse(kept, mask, w.shape[0], group)


def _done(leaf: Any, bits: int, group: int) -> bool:
  if not isinstance(leaf, leaves.GroupSparse) or leaf.group != group:
    return False
  return grids.already(leaf.kept, bits=bits, group_size=group, symmetric=True)
