# SPDX-License-Identifier: Apache-2.0
"""Minifloat or integer: for each kernel the split of the bits that serves it best.

Of b bits one is the sign; the others may be spent on exponents or on mantissas. Every split from
e1 to e(b-1), and the integers, rounds the kernel to nearest; the one with the smallest error is
kept: of the weights, without data, or of the outputs, tr(dW' H dW) with H the second moment of the
inputs. Floats are finite in all codes, as in the paper, and have subnormals.

The paper (Aggarwal et al., arXiv 2311.12359) compares formats for a whole model;
`experiments/minifloat_study.py` does that. The choice for each kernel is ours. A tie goes to the
integers, then to fewer exponent bits. Fixed point: kernels of that width in any of the formats.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, lifting, needs, step

BY = ("weights", "outputs")


def formats(bits: int) -> tuple[str, ...]:
  """List the integers and all splits of a width.

  Args:
    bits: width of a code, 3 to 8.

  Returns:
    Names of formats.

  Example:
    >>> formats(4)
    ('int', 'e1m2', 'e2m1', 'e3m0')
  """
  return ("int", *(f"e{e}m{bits - 1 - e}" for e in range(1, bits)))


def choose(
  w: Float[Array, "*batch rows cols"],
  h: Float[Array, "*batch rows rows"] | None = None,
  *,
  names: Sequence[str],
  bits: int,
  group_size: int,
  mse: bool = False,
) -> Int32[Array, ""]:
  """Find the format of the smallest error.

  Args:
    w: weights, input dimension first.
    h: second moment of the inputs; None weighs all weights alike.
    names: formats to choose from.
    bits: width of a code.
    group_size: rows that share a scale.
    mse: search for ranges too, see `grid.fit`.

  Returns:
    Index into `names`.

  Example:
    >>> spread = 2.0 ** -jnp.arange(8.0)[:, None]
    >>> even = jnp.arange(-4.0, 4.0)[:, None]
    >>> [formats(4)[int(choose(w, names=formats(4), bits=4, group_size=8))] for w in (spread, even)]
    ['e3m0', 'int']
  """
  form: dict[str, Any] = {"bits": bits, "group_size": group_size}
  exact = w.astype(jnp.float32)
  errors = []
  for name in names:
    codes, grid = rtn.quantize(w, **form, mse=mse, format=name)
    wide = grids.spread(grid, group_size=group_size, rows=w.shape[-2])
    wrong = grids.dequantize(codes, wide, bits=bits, format=name) - exact
    felt = wrong if h is None else jnp.matmul(h.astype(jnp.float32), wrong, precision="highest")
    errors.append((felt * wrong).sum())
  return jnp.argmin(jnp.stack(errors)).astype(jnp.int32)


@step.method("compress.quantize.minifloat")
def minifloat(
  *,
  bits: int = 4,
  group_size: int = -1,
  by: str = "weights",
  mse: bool = False,
  select: str | None = None,
) -> step.Step:
  """Quantize each kernel to the minifloats or integers of a width that lose least.

  Args:
    bits: width of a code, 3 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    by: which error is compared, "weights" or "outputs", which needs calibration.
    mse: search for the ranges that minimise the rounding error.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result. Shapes alone do not tell the format:
    `jax.eval_shape` takes integers, whose size is the same.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> minifloat(bits=6, by="outputs")
    (compress.quantize.minifloat(bits=6, by='outputs'),)

  Reference:
    Aggarwal et al., Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs,
    2023, arXiv:2311.12359.
  """
  grids.check(bits=bits, group_size=group_size)
  if bits < 3:
    raise ValueError(f"bits={bits}: minifloats have 3 to 8")
  if by not in BY:
    raise ValueError(f"by={by!r}: valid are {', '.join(BY)}")
  seen = by == "outputs"
  return lifting.over_leaves(
    _leaf, hyper={"bits": bits, "group_size": group_size, "mse": mse}, select=select, raw=True,
    wants={"hessian": needs.Statistic("second_moment")} if seen else {},
    options=[{"format": f} for f in formats(bits)], choose=_choose,
    scope="block" if seen else "leaf",
  )  # fmt: skip


def _choose(
  w: Any, hessian: Any = None, *, options: Any, bits: int, group_size: int, mse: bool
) -> jax.Array:
  names = [dict(o)["format"] for o in options]
  size = grids.clamp_group(group_size, w.shape[-2])
  h = None if hessian is None else hessian.moment
  return choose(leaves.dense(w), h, names=names, bits=bits, group_size=size, mse=mse)


def _leaf(
  w: Any, hessian: Any = None, *, bits: int, group_size: int, mse: bool, format: str
) -> Any:
  del hessian
  form: dict[str, Any] = {"bits": bits, "group_size": group_size}
  if any(grids.already(w, **form, symmetric=True, format=f) for f in formats(bits)):
    return w
  w = leaves.dense(w)
  form = {**form, "group_size": grids.clamp_group(group_size, w.shape[-2]), "format": format}
  codes, grid = rtn.quantize(w, **form, mse=mse)
  return grids.tensor(codes, grid, **form, store=jnp.dtype(w.dtype))
