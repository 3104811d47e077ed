# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep, given a score: exact counts, deterministic ties.

Between equal scores the one that comes first is kept.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from treesurgeon.core import leaves, packing


def unstructured(
  score: Float[Array, "*batch rows cols"], *, sparsity: float, per: str
) -> Bool[Array, "*batch rows cols"]:
  """Keep all but the `int(sparsity * n)` lowest scores of every column or matrix.

  Args:
    score: importance of each weight.
    sparsity: fraction to prune, 0 to 1.
    per: "column" (an output) or "matrix": what has its weights compared.

  Returns:
    True where the weight is kept.

  Example:
    >>> unstructured(jnp.array([[3.0], [1.0]]), sparsity=0.5, per="column")[:, 0].tolist()
    [True, False]
  """
  *batch, rows, cols = score.shape
  flat = score if per == "column" else score.reshape(*batch, rows * cols, 1)
  count = flat.shape[-2]
  keep = _rank(flat) < count - int(sparsity * count)
  return keep.reshape(score.shape)


def n_of_m(
  score: Float[Array, "*batch rows cols"], *, n: int, m: int
) -> Bool[Array, "*batch rows cols"]:
  """Keep the n highest scores of every m consecutive input rows of every column.

  Args:
    score: importance of each weight.
    n: how many are kept
    m: of how many.

  Returns:
    True where the weight is kept.

  Raises:
    ValueError: if the rows are not a multiple of m.

  Example:
    >>> n_of_m(jnp.array([[3.0], [1.0], [2.0], [0.0]]), n=1, m=2)[:, 0].tolist()
    [True, False, True, False]
  """
  *batch, rows, cols = score.shape
  if rows % m:
    raise ValueError(f"{n}:{m} sparsity needs a multiple of {m} input rows; the kernel has {rows}")
  runs = score.reshape(*batch, rows // m, m, cols)
  return (_rank(runs) < n).reshape(score.shape)


def pack_n_of_m(
  w: Float[Array, "*batch rows cols"], keep: Bool[Array, "*batch rows cols"], *, n: int, m: int
) -> leaves.SparseTensor:
  """Store only the kept weights and their places.

  Args:
    w: weights.
    keep: n of every m rows are True.
    n: how many are kept
    m: of how many.

  Returns:
    The leaf.

  Example:
    >>> w = jnp.array([[3.0], [1.0]])
    >>> pack_n_of_m(w, jnp.array([[True], [False]]), n=1, m=2).dense().tolist()
    [[3.0], [0.0]]
  """
  *batch, rows, cols = w.shape
  runs = (*batch, rows // m, m, cols)
  # A stable sort of "pruned" brings the kept rows of a run to its front, in order.
  place = jnp.argsort(~keep.reshape(runs), axis=-2, stable=True)[..., :n, :]
  values = jnp.take_along_axis(w.reshape(runs), place, axis=-2)
  flat = (*batch, rows // m * n, cols)
  bits = max(1, (m - 1).bit_length())
  codes = packing.pack(place.astype(jnp.uint8).reshape(flat), bits=bits)
  return leaves.SparseTensor(values.reshape(flat), codes, rows, cols, n, m)


def apply(
  w: Float[Array, "*batch rows cols"],
  score: Float[Array, "*batch rows cols"],
  *,
  sparsity: float,
  pattern: tuple[int, int] | None,
  packed: bool,
  per: str,
) -> Any:
  """Prune the weights of lowest score.

  Args:
    w: weights.
    score: importance of each.
    sparsity: fraction to prune where there is no pattern.
    pattern: (n, m) keeps n of every m input rows.
    packed: store an N:M result as a `SparseTensor`.
    per: as in `unstructured`.

  Returns:
    The pruned weights, in the dtype of `w`.

  Example:
    >>> w = jnp.array([[3.0], [-1.0]])
    >>> apply(w, jnp.abs(w), sparsity=0.5, pattern=None, packed=False, per="matrix").tolist()
    [[3.0], [0.0]]
  """
  if pattern is None:
    return jnp.where(unstructured(score, sparsity=sparsity, per=per), w, 0)
  n, m = pattern
  keep = n_of_m(score, n=n, m=m)
  return pack_n_of_m(w, keep, n=n, m=m) if packed else jnp.where(keep, w, 0)


def read(*, sparsity: float, pattern: str | None, packed: bool) -> tuple[int, int] | None:
  """Check a pruning method's arguments and read its pattern.

  Args:
    sparsity: fraction to prune.
    pattern: like "2:4", or None.
    packed: whether the result is to be stored packed.

  Returns:
    (n, m), or None without a pattern.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> read(sparsity=0.5, pattern="2:4", packed=True)
    (2, 4)
  """
  if not 0 <= sparsity <= 1:
    raise ValueError(f"sparsity={sparsity}: valid is 0 (prune nothing) to 1")
  if pattern is None:
    if packed:
      raise ValueError("packed=True stores N:M sparsity; it needs a pattern, like pattern='2:4'")
    return None
  match = re.fullmatch(r"(\d+):(\d+)", pattern)
  n, m = (int(match[1]), int(match[2])) if match else (0, 0)
  if not 1 <= n <= m <= 256:
    raise ValueError(
      f"pattern={pattern!r}: valid is 'n:m', n of m kept, 1 <= n <= m <= 256, like '2:4'"
    )
  return n, m


def _rank(score: jax.Array) -> jax.Array:
  """Rank along the row axis, 0 the highest, the earlier of equals first."""
  order = jnp.argsort(-score, axis=-2, stable=True)
  return jnp.argsort(order, axis=-2)
