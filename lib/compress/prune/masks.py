# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep, given a score: exact counts, deterministic ties.

Between equal scores the one that comes first is kept.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treesurgeon.core import leaves, packing, trim


def unstructured(
  score: Float[Array, "*batch rows cols"], *, sparsity: float, per: str
) -> Bool[Array, "*batch rows cols"]:
  """Keep all but the `int(sparsity * n)` lowest scores of every column or matrix.

  Args:
    score: importance of each weight, not negative.
    sparsity: fraction to prune, 0 to 1.
    per: "column" (an output) or "matrix": what has its weights compared.

  Returns:
    True where the weight is kept.

  Example:
    >>> unstructured(jnp.array([[3.0], [1.0]]), sparsity=0.5, per="column")[:, 0].tolist()
    [True, False]
  """
  *batch, rows, cols = score.shape
  if per == "column":
    return top(score, rows - int(sparsity * rows))
  count = rows * cols - int(sparsity * rows * cols)
  flat = score.reshape(-1, rows, cols)
  return jax.vmap(lambda s: largest((s,), count)[0])(flat).reshape(score.shape)


def top(
  score: Float[Array, "*batch rows cols"], count: int | Int[Array, ""]
) -> Bool[Array, "*batch rows cols"]:
  """Keep the highest scores of every column.

  Args:
    score: importance of each weight, not negative.
    count: how many to keep, 0 to all; may be traced.

  Returns:
    True where the weight is kept.

  Example:
    >>> top(jnp.array([[1.0], [2.0], [1.0]]), 2)[:, 0].tolist()
    [True, True, False]
  """
  # Floats that are not negative are ordered as their bit patterns, so counting finds the threshold.
  bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
  shape = (*bits.shape[:-2], 1, bits.shape[-1])

  def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = ends
    middle = low + (high - low) // 2
    enough = (bits >= middle).sum(axis=-2, keepdims=True, dtype=jnp.int32) >= count
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  ends = jnp.zeros(shape, jnp.int32), jnp.full(shape, 2**31 - 1, jnp.int32)
  least, _ = jax.lax.fori_loop(0, 31, halve, ends)
  above, tied = bits > least, bits == least
  left = count - above.sum(axis=-2, keepdims=True, dtype=jnp.int32)
  return above | (tied & (jnp.cumsum(tied, axis=-2, dtype=jnp.int32) <= left))


def largest(scores: tuple[Float[Array, "..."], ...], count: int) -> tuple[Bool[Array, "..."], ...]:
  """Keep the highest scores of several arrays, compared as one.

  Args:
    scores: importance of each weight, not negative.
    count: how many to keep, 0 to all.

  Returns:
    For each array, True where the weight is kept.

  Example:
    >>> [k.tolist() for k in largest((jnp.array([3.0, 1.0]), jnp.array([2.0])), 2)]
    [[True, False], [True]]
  """
  if not 0 < count < sum(s.size for s in scores):
    return tuple(jnp.full(s.shape, bool(count)) for s in scores)
  threshold, ties = trim.cut(scores, count)
  return tuple(trim.kept(s, threshold, t) for s, t in zip(scores, ties, strict=True))


def n_of_m(
  score: Float[Array, "*batch rows cols"], *, n: int | Int[Array, ""], m: int
) -> Bool[Array, "*batch rows cols"]:
  """Keep the n highest scores of every m consecutive input rows of every column.

  Args:
    score: importance of each weight.
    n: how many are kept, may be traced,
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
  mine, other = runs[..., :, None, :], runs[..., None, :, :]
  before = jnp.tri(m, k=-1, dtype=bool)  # [i, j]: j comes before i
  before = before.reshape((1,) * (len(batch) + 1) + (m, m, 1))
  rank = ((other > mine) | ((other == mine) & before)).sum(axis=-2)
  return (rank < n).reshape(score.shape)


def check_rows(rows: int, pattern: tuple[int, int] | None) -> None:
  """Refuse a kernel that a pattern does not fit.

  Args:
    rows: its input dimension.
    pattern: (n, m), or None, which fits any.

  Raises:
    ValueError: if the rows are not a multiple of m.

  Example:
    >>> check_rows(8, (2, 4))
  """
  if pattern is not None:
    n, m = pattern
    jax.eval_shape(lambda: n_of_m(jnp.zeros((rows, 1)), n=n, m=m))


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


def pack_nonzero(w: Float[Array, "*batch rows cols"], pattern: tuple[int, int]) -> Any:
  """Store a kernel that is pruned to a pattern already.

  Args:
    w: weights, of which at most n of every m rows are not zero.
    pattern: (n, m).

  Returns:
    The leaf.

  Example:
    >>> pack_nonzero(jnp.array([[0.0], [1.0]]), (1, 2)).values.tolist()
    [[1.0]]
  """
  n, m = pattern
  return pack_n_of_m(w, n_of_m((w != 0).astype(jnp.float32), n=n, m=m), n=n, m=m)


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
