# SPDX-License-Identifier: Apache-2.0
"""Keep the k entries of largest magnitude, exactly, without sorting.

The magnitudes of IEEE floats are ordered like their bit patterns, so the k-th largest is found by a
search over the 31 magnitude bits in which every pass only counts. A strided sample gives the first
two guesses, interpolation between counts the next ones, bisection bounds the number of passes
whatever the data; about nine passes are typical, twenty where many magnitudes are equal. Counting
needs one all-reduce a pass on a mesh, and works over several arrays at once (a threshold for a
whole model).

A host array that streams from a file goes through in pieces instead, once: a sample brackets the
threshold within about a hundredth of the entries, which are set aside while everything above them
is counted, and the exact place is found among those.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from treesurgeon.core import pieces

_TOP = 2**31 - 1  # one above every magnitude, NaN included, but for NaN of full payload
_SAMPLE = 1 << 16
_LIMB = 16
_PATIENCE = 10  # passes before every third one bisects


def cut(
  deltas: Sequence[Float[Array, "..."]], k: int
) -> tuple[Int32[Array, ""], tuple[Int32[Array, ""], ...]]:
  """Find where the k entries of largest magnitude end.

  Args:
    deltas: one or more float32 arrays, taken together as one vector.
    k: how many entries to keep, 1 to the number of all entries; static.

  Returns:
    (threshold, ties): a bit pattern, and for each array how many of its entries of exactly that
    magnitude to keep, lowest index first. `kept` applies them.

  Raises:
    ValueError: for k out of range, or an array of 2**31 entries or more.

  Example:
    >>> x = jnp.array([3.0, -1.0, 1.0, 2.0, 1.0])
    >>> threshold, ties = cut([x], 3)
    >>> kept(x, threshold, ties[0]).tolist()
    [True, True, False, True, False]
  """
  total = sum(d.size for d in deltas)
  if not 1 <= k <= total:
    raise ValueError(f"k={k} entries cannot be kept of {total}; valid: 1 to {total}")
  if max(d.size for d in deltas) > _TOP:
    raise ValueError(f"an array has {max(d.size for d in deltas)} entries; valid: up to {_TOP}")
  bits = [_magnitude_bits(d) for d in deltas]
  sample = [_thin(b, total) for b in bits]
  share = max(1, k * sum(s.size for s in sample) // total)
  guess, _, _ = _search(sample, share, None)
  low, above, at_least = _search(bits, k, guess)
  clean = _equal(at_least, _split(k))  # nothing ties, or all ties are kept
  left = jnp.where(clean, _TOP, _difference(_split(k), above))
  ties = []
  for b in bits:
    ties.append(left)
    here = jnp.sum(b == low, dtype=jnp.int32)
    left = jnp.where(clean, _TOP, jnp.maximum(left - here, 0))
  return low, tuple(ties)


def cut_pieces(
  w: np.ndarray, donor: np.ndarray, where: pieces.Bounds, k: int
) -> tuple[np.int32, list[np.int32]]:
  """Find where the k largest changes of a host array end, in one pass over pieces of it.

  Args:
    w: the base's array.
    donor: the donor's array.
    where: rows of each piece.
    k: how many entries to keep, 1 to all.

  Returns:
    (threshold, ties of each piece), as `cut` gives for the pieces' float32 differences.

  Example:
    >>> w, donor = np.zeros((2, 2), np.float32), np.array([[3, -1], [1, 2]], np.float32)
    >>> threshold, ties = cut_pieces(w, donor, [(0, 1), (1, 2)], 2)
    >>> threshold.view(np.float32).item(), [int(t) == 2**31 - 1 for t in ties]
    (2.0, [True, True])
  """
  stride = max(1, w.size // _SAMPLE)
  thin = [x.reshape(-1)[::stride] for x in (w, donor)]
  sample = np.sort(np.asarray(_change_bits(*thin)))[::-1]
  place = k / w.size * len(sample)
  slack = 8 * (place * (1 - k / w.size) + 1) ** 0.5
  high = sample[int(place - slack)] if place > slack else np.int32(_TOP)
  low = sample[int(place + slack)] if place + slack < len(sample) else np.int32(0)

  def look(i: int) -> tuple[int, Any]:
    a, b = where[i]
    bits = np.asarray(_change_bits(w[a:b], donor[a:b])).reshape(-1)
    reach = bits >= low
    over = bits > high
    above = int(np.count_nonzero(over))
    reach ^= over
    # Where all the rest has one value, as unchanged entries do, its number is enough.
    return above, int(np.count_nonzero(reach)) if low == high else bits[reach]

  found = list(pieces.each(look, range(len(where))))
  left = k - sum(above for above, _ in found)
  counts = [n if low == high else len(n) for _, n in found]
  if not 1 <= left <= sum(counts):  # the sample misled
    whole = [_change_bits(w[a:b], donor[a:b]) for a, b in where]
    deltas = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in whole]
    at, ties = jax.jit(cut, static_argnums=1)(deltas, k)
    return np.int32(at), [np.int32(t) for t in ties]
  threshold = np.int32(low)
  if low != high:
    inside = np.concatenate([x for _, x in found])
    threshold = np.partition(inside, len(inside) - left)[len(inside) - left]
    left -= int(np.count_nonzero(inside > threshold))
    counts = [int(np.count_nonzero(x == threshold)) for _, x in found]
  if left == sum(counts):
    return threshold, [np.int32(_TOP)] * len(where)
  before = np.cumsum([0, *counts[:-1]])
  return threshold, [np.int32(max(left - n, 0)) for n in before]


@jax.jit
def _change_bits(w: jax.Array, donor: jax.Array) -> jax.Array:
  return _magnitude_bits(donor.astype(jnp.float32) - w.astype(jnp.float32))


def kept(
  delta: Float[Array, "*shape"], threshold: Int32[Array, ""], ties: Int32[Array, ""]
) -> Bool[Array, "*shape"]:
  """Mark the entries that a `cut` keeps.

  Args:
    delta: float32 array.
    threshold: magnitude bits at which the cut falls.
    ties: how many entries of exactly that magnitude to keep, lowest index first.

  Returns:
    The mask.

  Example:
    >>> x = jnp.array([[1.0, -4.0], [2.0, 0.5]])
    >>> kept(x, *(t if i == 0 else t[0] for i, t in enumerate(cut([x], 2)))).tolist()
    [[False, True], [True, False]]
  """
  bits = _magnitude_bits(delta)
  equal = bits == threshold
  some = jax.lax.cond(ties == _TOP, lambda e: e, lambda e: _first(e, ties), equal)
  return (bits > threshold) | some


def _magnitude_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _thin(bits: jax.Array, total: int) -> jax.Array:
  """Take every s-th entry along each axis, about `_SAMPLE` of `total`; no reshape, so it shards."""
  if bits.ndim == 0 or total <= _SAMPLE:
    return bits
  stride = max(1, round((total / _SAMPLE) ** (1 / bits.ndim)))
  strides = [min(stride, n) for n in bits.shape]
  return jax.lax.slice(bits, (0,) * bits.ndim, bits.shape, strides)


def _search(bits: Sequence[jax.Array], k: int, guess: jax.Array | None) -> tuple:
  """Find the largest pattern that at least k entries reach, or any that exactly k reach.

  Returns (pattern, entries above it, entries at or above it); counts are in limbs.
  """
  want = _split(k)

  def unfinished(state: tuple) -> jax.Array:
    low, high, at_low, _, _ = state
    return (high - low > 1) & ~_equal(at_low, want)

  def narrow(state: tuple) -> tuple:
    low, high, at_low, at_high, i = state
    pivot = low + (high - low) // 2
    if guess is not None:
      # Aim a little to both sides of the answer in turn, so that both ends of the interval move.
      inside = _float(at_low) - _float(at_high)
      offset = jnp.where(i % 2 == 0, 0.25, -0.25) * jnp.sqrt(inside)
      part = jnp.clip((_float(at_low) - float(k) + offset) / inside, 0.0, 1.0)
      aimed = low + (part * (high - low).astype(jnp.float32)).astype(jnp.int32)
      pivot = jnp.where((i >= _PATIENCE) & (i % 3 == 0), pivot, aimed)
      margin = guess >> 13  # about a hundredth of the magnitude
      pivot = jnp.where(i == 0, guess - margin, jnp.where(i == 1, guess + margin, pivot))
    pivot = jnp.clip(pivot, low + 1, high - 1)
    found = _count(bits, pivot)
    enough = ~_less(found, want)
    return (
      jnp.where(enough, pivot, low),
      jnp.where(enough, high, pivot),
      _choose(enough, found, at_low),
      _choose(enough, at_high, found),
      i + 1,
    )

  everything = _split(sum(b.size for b in bits))
  start = (jnp.int32(0), jnp.int32(_TOP), everything, _split(0), jnp.int32(0))
  low, _, at_low, at_high, _ = jax.lax.while_loop(unfinished, narrow, start)
  return low, at_high, at_low


def _first(mask: jax.Array, count: jax.Array) -> jax.Array:
  """Keep the first `count` true entries in row-major order."""
  if mask.ndim == 0:
    return mask & (count > 0)
  if mask.ndim == 1:
    return mask & (jnp.cumsum(mask, dtype=jnp.int32) <= count)
  per_row = jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)
  through = jnp.cumsum(per_row)
  row = jnp.minimum(jnp.sum(through < count, dtype=jnp.int32), mask.shape[0] - 1)
  inside = _first(mask[row], count - (through[row] - per_row[row]))
  index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0)
  return mask & ((index < row) | ((index == row) & inside[None]))


# Counts are pairs of 16-bit limbs: a whole model has more entries than an int32 can count.


def _split(n: int) -> tuple[jax.Array, jax.Array]:
  return jnp.int32(n >> _LIMB), jnp.int32(n & ((1 << _LIMB) - 1))


def _count(bits: Sequence[jax.Array], pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
  each = [jnp.sum(b >= pivot, dtype=jnp.int32) for b in bits]
  high = sum((c >> _LIMB for c in each), jnp.int32(0))
  low = sum((c & ((1 << _LIMB) - 1) for c in each), jnp.int32(0))
  return high + (low >> _LIMB), low & ((1 << _LIMB) - 1)


def _less(a: tuple, b: tuple) -> jax.Array:
  return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _equal(a: tuple, b: tuple) -> jax.Array:
  return (a[0] == b[0]) & (a[1] == b[1])


def _float(a: tuple) -> jax.Array:
  return a[0].astype(jnp.float32) * (1 << _LIMB) + a[1].astype(jnp.float32)


def _difference(a: tuple, b: tuple) -> jax.Array:
  return ((a[0] - b[0]) << _LIMB) + (a[1] - b[1])


def _choose(condition: jax.Array, a: tuple, b: tuple) -> tuple:
  return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])
