# SPDX-License-Identifier: Apache-2.0
"""decoupleQ: integers and the numbers that scale them, minimising the output error in turn.

A kernel's weights become s c + z, c integers, s and z floating-point, of every group. The output
error tr(dW' H dW) is a quadratic in s and z while c stays, and they are solved for exactly; while s
and z stay, GPTQ finds c. This goes on in turn, outputs (columns) keeping the best of what they have
seen. It begins with the range of each group, and then with ranges of each column shrunk, by up to
80 %, to where rounding to nearest loses least. H is damped as for GPTQ, in the error too. At last
the s and z of a block are tuned together, by Adam on the change in what comes out of it.

As in the published code (bytedance/decoupleQ, its W2 setting): GPTQ in activation order, four
rounds, four epochs at a rate of 1e-5. Where we differ: s and z are solved for in the first round
too; a singular system is damped by 1e-6 of its diagonal, not solved in float64; norms are not
tuned. Everything is computed in float32, errors with s and z as they are stored. Fixed point: its
own result is left alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rounding
from treesurgeon.compress.quantize import tune as tuning
from treesurgeon.core import leaves, lifting, needs, step

GRID, SHRINK = 200, 0.8  # ranges 1, 1 - 1/200, ... are tried down to 1 - 0.8
RIDGE = 1e-6
BATCH = 1 << 22  # entries of H times columns that are held at once


class Found(NamedTuple):
  """Codes and grids, and what each column loses by them.

  Attributes:
    codes: as floats.
    grid: scales and zero points, one row a group, in the dtype they are stored in.
    error: of each column.
  """

  codes: Float[Array, "rows cols"]
  grid: grids.Grid
  error: Float[Array, " cols"]


def quantize(
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  bits: int,
  group_size: int,
  rounds: int = 4,
  damping: float = 0.01,
  scale_dtype: str | None = None,
) -> tuple[UInt8[Array, "rows cols"], grids.Grid, Float[Array, " cols"]]:
  """Quantize a matrix, its codes and grids in turn.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs, up to a factor.
    bits: width of a code, 1 to 8.
    group_size: rows that share a scale; the last group may be shorter.
    rounds: how often codes and grids are solved for; 0 rounds to nearest on the range.
    damping: added to the diagonal of h, relative to its mean.
    scale_dtype: dtype of scales and zero points; None is that of `w`.

  Returns:
    (codes, grid, error of each column with h damped).

  Example:
    >>> w = jnp.array([[0.5], [1.5], [3.5]])
    >>> codes, grid, error = quantize(w, jnp.eye(3), bits=2, group_size=3)
    >>> codes[:, 0].tolist(), grid.scales.round(3).tolist(), grid.zeros.round(3).tolist()
    ([0, 1, 3], [[1.0]], [[-0.5]])
  """
  store = jnp.dtype(scale_dtype or w.dtype)
  exact, h = rounding.without_dead(w.astype(jnp.float32), h.astype(jnp.float32))
  order = jnp.argsort(-jnp.diag(h), stable=True)
  ratios = rounding.ratios(h[order[:, None], order[None]], damping)
  h = h + damping * jnp.diag(h).mean() * jnp.eye(len(h))
  rule = rounding.by_groups(order // group_size, {"bits": bits})

  def lost(codes: jax.Array, grid: grids.Grid) -> jax.Array:
    wrong = _values(codes, grid, group_size) - exact
    return (jnp.matmul(h, wrong, precision="highest") * wrong).sum(axis=0)

  def nearest(grid: grids.Grid) -> Found:
    wide = grids.spread(grid, group_size=group_size, rows=len(w))
    codes = grids.round_to(exact, wide, bits=bits).astype(jnp.float32)
    return Found(codes, grid, lost(codes, grid))

  def better(a: Found, b: Found) -> Found:
    take = b.error < a.error  # never where b is not finite
    return jax.tree.map(lambda x, y: jnp.where(take if x.ndim == 1 else take[None], y, x), a, b)

  def turn(i: jax.Array, state: tuple[Found, grids.Grid]) -> tuple[Found, grids.Grid]:
    best, first = state
    grid = jax.tree.map(lambda a, b: jnp.where(i == 1, a, b), searched, best.grid)
    grid = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), first, grid)
    codes, _, _ = rounding.in_turn(exact[order], ratios, grid, rule)
    codes = codes[jnp.argsort(order)].astype(jnp.float32)
    best = better(best, Found(codes, grid, lost(codes, grid)))
    solved = solve(best.codes, exact, h, group_size=group_size, store=store)
    return better(best, Found(best.codes, solved, lost(best.codes, solved))), first

  top, bottom = (_extreme(exact, group_size, largest) for largest in (True, False))

  def shrunk(i: jax.Array, best: Found) -> Found:
    part = 1 - i / GRID
    return better(best, nearest(_from_range(bottom * part, top * part, bits, store)))

  start = nearest(_from_range(bottom, top, bits, store))
  narrow = jax.lax.fori_loop(1, int(GRID * SHRINK), shrunk, start)
  solved = solve(narrow.codes, exact, h, group_size=group_size, store=store)
  searched = better(narrow, Found(narrow.codes, solved, lost(narrow.codes, solved))).grid
  best, _ = jax.lax.fori_loop(0, rounds, turn, (start, start.grid))
  grid = grids.poisoned(best.grid, ~jnp.isfinite(ratios).all())
  return best.codes.astype(jnp.uint8), grid, best.error


def solve(
  codes: Float[Array, "rows cols"],
  w: Float[Array, "rows cols"],
  h: Float[Array, "rows rows"],
  *,
  group_size: int,
  store: Any,
) -> grids.Grid:
  """Find the scales and zero points that minimise the output error of given codes.

  Args:
    codes: of every weight.
    w: weights, input dimension first, float32.
    h: second moment of the inputs, positive definite.
    group_size: rows that share a scale.
    store: dtype of the grid.

  Returns:
    The grid; not finite where a column's system could not be solved.

  Example:
    >>> codes = jnp.array([[0.0], [1.0], [3.0]])
    >>> grid = solve(codes, 2 * codes - 1, jnp.eye(3), group_size=3, store="float32")
    >>> grid.scales.round(3).tolist(), grid.zeros.round(3).tolist()
    ([[2.0]], [[0.5]])
  """
  rows, cols = w.shape
  more = -rows % group_size
  codes, w = (jnp.pad(x, [(0, more), (0, 0)]) for x in (codes, w))
  h = jnp.pad(h, [(0, more), (0, more)])
  groups = (rows + more) // group_size
  by_group = functools.partial(jnp.reshape, shape=(groups, group_size, -1))
  # A column is [its codes in each group, ones in each group] times [s, z]: the normal equations.
  h_ones = h.reshape(rows + more, groups, group_size).sum(axis=-1)
  ones = by_group(h_ones).sum(axis=1)
  cross = jnp.einsum("gsc,gsk->cgk", by_group(codes), by_group(h_ones), precision="highest")

  def square(column: jax.Array) -> jax.Array:
    half = (h * column[None, :]).reshape(rows + more, groups, group_size).sum(axis=-1)
    return by_group(column[:, None] * half).sum(axis=1)

  own = jax.lax.map(square, codes.T, batch_size=max(1, BATCH // h.size))
  top = jnp.concatenate([own, cross], axis=2)
  ones = jnp.broadcast_to(ones, (cols, groups, groups))
  system = jnp.concatenate([top, jnp.concatenate([jnp.swapaxes(cross, 1, 2), ones], 2)], axis=1)
  diag = jnp.diagonal(system, axis1=1, axis2=2)
  damped = RIDGE * diag + jnp.finfo(jnp.float32).tiny
  system = system + damped[:, :, None] * jnp.eye(2 * groups)[None]
  h_w = by_group(jnp.matmul(h, w, precision="highest"))
  right = jnp.concatenate([(by_group(codes) * h_w).sum(axis=1), h_w.sum(axis=1)], axis=0).T
  found = jnp.linalg.solve(system, right[..., None])[..., 0].T
  return _stored(found[:groups], found[groups:], store)


@step.method("compress.quantize.decoupleq")
def decoupleq(
  *,
  bits: int = 2,
  group_size: int = -1,
  rounds: int = 4,
  damping: float = 0.01,
  epochs: int = 4,
  rate: float = 1e-5,
  batch: int = 8,
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels, solving for integers and for what scales them in turn.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    rounds: how often codes and grids are solved for.
    damping: added to the diagonal of the second moment, relative to its mean.
    epochs: times that the calibration data is gone through to tune a block; 0 does not.
    rate: Adam's step size then.
    batch: rows of the calibration data a step.
    scale_dtype: float32, bfloat16 or float16, of zero points too; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> decoupleq(group_size=64)
    (compress.quantize.decoupleq(group_size=64),)

  Reference:
    Guo et al., decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling
    Parameters into Integer and Floating Points, 2024, arXiv:2404.12759.
  """
  grids.check(bits=bits, group_size=group_size, symmetric=False)
  grids.check_float(scale_dtype)
  if rounds < 0 or epochs < 0 or batch < 1:
    raise ValueError(
      f"rounds={rounds}, epochs={epochs}, batch={batch}: rounds and epochs are not negative, a "
      "batch has a row or more"
    )
  if not 0 < damping < 1:
    raise ValueError(f"damping={damping}: valid is above 0 to below 1, usually 0.01")
  how = {
    "bits": bits, "group_size": group_size, "rounds": rounds, "damping": damping,
    "scale_dtype": scale_dtype,
  }  # fmt: skip
  wants = {"hessian": needs.Statistic("second_moment")}
  if not epochs:
    return lifting.over_leaves(
      _kernel, hyper=how, select=select, wants=wants, raw=True, scope="block"
    )
  hyper = {**how, "epochs": epochs, "rate": rate, "batch": batch}
  return lifting.over_blocks(_block, hyper=hyper, wants=wants, select=select, raw=True)


def _kernel(w: Any, hessian: Any, *, group_size: int, bits: int, **how: Any) -> Any:
  if _done(w, bits, group_size):
    return w
  w = leaves.dense(w)
  form: dict[str, Any] = {"bits": bits, "group_size": grids.clamp_group(group_size, w.shape[0])}
  codes, grid, _ = quantize(w, hessian.moment, **form, **how)
  return grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))


def _block(
  w: Mapping[str, Any],
  *,
  inputs: jax.Array,
  targets: jax.Array,
  forward: Any,
  hessian: Mapping[str, Any],
  epochs: int,
  rate: float,
  batch: int,
  **how: Any,
) -> dict[str, Any]:
  fresh = [n for n, x in w.items() if not _done(x, how["bits"], how["group_size"])]
  made = {n: _kernel(x, hessian[n], **how) for n, x in w.items()}
  if not fresh:
    return made
  # Tuned are s and z, which count alike, and not the zero points -z / s.
  grid = {n: [x.astype(jnp.float32) for x in (made[n].scales, made[n].zeros)] for n in fresh}
  start = {n: [s, -zero * s] for n, (s, zero) in grid.items()}

  def build(numbers: Mapping[str, list[jax.Array]]) -> dict[str, Any]:
    out = dict(made)
    for n, (s, z) in numbers.items():
      scales, zeros = _stored(s, z, made[n].scales.dtype)
      out[n] = dataclasses.replace(made[n], scales=scales, zeros=zeros)
    return out

  best = tuning.block(
    build, start, inputs=inputs, targets=targets, forward=forward,
    optimizer=optax.adam(rate, b1=0.9, b2=0.99, eps=2e-5), epochs=epochs, batch=batch,
  )  # fmt: skip
  return build(best)


def _done(leaf: Any, bits: int, group_size: int) -> bool:
  done = grids.already(leaf, bits=bits, group_size=group_size, symmetric=False)
  return done and jnp.issubdtype(leaf.zeros.dtype, jnp.floating)


def _stored(s: jax.Array, z: jax.Array, store: Any) -> grids.Grid:
  """Make the grid of s c + z = s (c - zero); s is kept off zero."""
  s = jnp.where(jnp.abs(s) < 1e-12, 1e-12, s)
  return grids.Grid(s.astype(store), (-z / s).astype(store))


def _values(codes: jax.Array, grid: grids.Grid, group_size: int) -> jax.Array:
  wide = grids.spread(grid, group_size=group_size, rows=len(codes))
  return (codes - wide.zeros.astype(jnp.float32)) * wide.scales.astype(jnp.float32)  # pyright: ignore[reportOptionalMemberAccess]


def _extreme(w: jax.Array, group_size: int, largest: bool) -> jax.Array:
  """Find the largest or smallest weight of each group, or 0."""
  parts = jnp.pad(w, [(0, -len(w) % group_size), (0, 0)]).reshape(-1, group_size, w.shape[1])
  return jnp.maximum(parts.max(axis=1), 0) if largest else jnp.minimum(parts.min(axis=1), 0)


def _from_range(bottom: jax.Array, top: jax.Array, bits: int, store: Any) -> grids.Grid:
  scales = (top - bottom) / (2**bits - 1)
  return _stored(jnp.where(scales > 0, scales, 1.0), bottom, store)
