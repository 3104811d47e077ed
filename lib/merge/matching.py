# SPDX-License-Identifier: Apache-2.0
"""Find the permutation of one network that brings its weights nearest to another's.

Weight matching of Ainsworth, Hayase and Srinivasa, "Git Re-Basin: merging models modulo permutation
symmetries", 2022 (arXiv 2209.04836), section 3.2: maximise <A, P(B)> over the network's
permutations by coordinate ascent. With all groups but one fixed the best renumbering of that one is
a linear assignment problem; groups are visited in random order until a sweep gains nothing.

Where we differ: groups may nest (heads, and dimensions within them), and an outer group's problem
has no signal while the inner ones are in disorder. So whole heads are also matched by their
circuits, V O and Q K^T, which do not depend on the order within, and the move is kept if, with the
inner groups matched after it, it gains. The gain is held against a threshold relative to the
problem's scale, as float32 sums round. A leaf both of whose axes belong to one group makes the
problem quadratic; it follows, but has no say.

Products run on the device that holds the arrays; the assignments are solved on the host. Given
numpy arrays, everything is numpy, which is what a host callback inside a trace needs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Float

from treesurgeon.core import programs
from treesurgeon.merge import units

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Match:
  """What weight matching found.

  Attributes:
    index: the permutation, see `units.apply`.
    sweeps: over all groups, the last one without a gain included.
    gain: by how much <A, P(B)> grew.
  """

  index: units.Index
  sweeps: int
  gain: float


def assign(score: Float[np.ndarray, "n n"]) -> np.ndarray:
  """Solve the linear assignment problem: the permutation of greatest total score.

  Args:
    score: of putting unit j at place i.

  Returns:
    For each place its unit, int32; on the host.

  Example:
    >>> assign(np.array([[0.0, 1.0], [1.0, 0.0]])).tolist()
    [1, 0]
  """
  return scipy.optimize.linear_sum_assignment(score, maximize=True)[1].astype(np.int32)


def match(
  groups: Sequence[units.Group],
  a: Tree,
  b: Tree,
  index: units.Index,
  *,
  rng: np.random.Generator,
  sweeps: int = 100,
  threshold: float = 1e-12,
) -> Match:
  """Permute one network towards another by weight matching.

  Args:
    groups: from `permutations.groups`, or some of them.
    a: address to array, of the network that stays.
    b: the network to permute.
    index: where to start, such as `permutations.identity`.
    rng: of the groups' order.
    sweeps: at most so many.
    threshold: gain of a group, relative to its total score, below which it stays.

  Returns:
    The match; its index is relative to `b` as given.

  Example:
    >>> w = np.arange(6.0).reshape(2, 3)
    >>> hidden = units.Group("h", 3, (units.Member("w", 1),))
    >>> start = {"w": {1: np.arange(3)}}
    >>> rng = np.random.default_rng(0)
    >>> match([hidden], {"w": w}, {"w": w[:, [2, 0, 1]]}, start, rng=rng).index["w"][1].tolist()
    [1, 2, 0]
  """
  names = {g.name: g for g in groups}
  state = _State(a, units.apply(b, index), index)
  total, done, progress = 0.0, 0, True
  while progress and done < sweeps:
    progress, done = False, done + 1
    for i in rng.permutation(len(groups)):
      group = groups[i]
      gains = [_match_circuits(group, names, state)] if group.circuits else []
      gains.append(_match_units(group, state, threshold))
      total += sum(gains)
      progress |= any(g > 0 for g in gains)
  return Match(state.index, done, total)


def similarity(
  group: units.Group, a: Tree, b: Tree
) -> Float[np.ndarray, "{group.size} {group.size}"]:
  """Compute the inner products of all pairs of a group's units, summed over its leaves.

  Args:
    group: whose units.
    a: address to array.
    b: address to array.

  Returns:
    Rows are units of `a`, columns of `b`; float64, on the host.

  Example:
    >>> one = units.Group("g", 2, (units.Member("w", 0),))
    >>> similarity(one, {"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 4.0])}).tolist()
    [[3.0, 4.0], [6.0, 8.0]]
  """
  axes: dict[str, set[int]] = {}
  for m in group.members:
    axes.setdefault(m.address, set()).add(m.axis)
  total: Any = np.zeros((group.size, group.size))
  for m in group.members:
    if len(axes[m.address]) == 1:
      at = m.places(group.size)
      total = total + _call(_gram, a[m.address], b=b[m.address], at=at, axis=m.axis)
  return np.asarray(total, np.float64)


class _State:
  """The network that stays, the other as permuted so far, and how."""

  def __init__(self, a: Tree, b: Mapping[str, Any], index: units.Index):
    self.a, self.b, self.index = a, dict(b), index

  def renumber(self, group: units.Group, order: np.ndarray) -> None:
    self.index = units.compose(self.index, group, order)
    for m in group.members:
      x = self.b[m.address]
      entries = units.entries(m, group.size, order, x.shape[m.axis])
      self.b[m.address] = _call(_take, x, entries=entries, axis=m.axis)

  def score(self, addresses: set[str]) -> float:
    return sum(float(_call(_dot, self.a[n], b=self.b[n])) for n in sorted(addresses))


def _match_units(group: units.Group, state: _State, threshold: float) -> float:
  score = similarity(group, state.a, state.b)
  order = assign(score)
  old, new = np.trace(score), score[np.arange(group.size), order].sum()
  gain = float(new - old)
  if gain <= threshold * max(abs(old), abs(new)):
    return 0.0
  state.renumber(group, order)
  return gain


def _match_circuits(group: units.Group, names: Mapping[str, units.Group], state: _State) -> float:
  """Match whole heads, then what is within them; undone unless that gains."""
  order = assign(_circuits(group, state))
  if (order == np.arange(group.size)).all():
    return 0.0
  inner = [names[n] for n in group.inner if n in names]
  addresses = {m.address for g in (group, *inner) for m in g.members}
  kept, before = (dict(state.b), state.index), state.score(addresses)
  state.renumber(group, order)
  for one in inner:
    if one.circuits:
      state.renumber(one, assign(_circuits(one, state)))
    else:
      _match_units(one, state, 0.0)
  after = state.score(addresses)
  if after - before <= 1e-6 * max(abs(before), abs(after)):
    state.b, state.index = kept
    return 0.0
  return after - before


def _circuits(group: units.Group, state: _State) -> np.ndarray:
  total: Any = np.zeros((group.size, group.size))
  for left, m, right, n in group.circuits:
    given = {"b": state.b[left.address], "c": state.a[right.address], "d": state.b[right.address]}
    at, to = left.places(m), right.places(n)
    total = total + _call(
      _circuit, state.a[left.address], **given, at=at, to=to,
      axis=left.axis, across=right.axis, dims=group.dims,
    )  # fmt: skip
  return np.asarray(total, np.float64)


def _call(fn: Any, w: Any, *, axis: int = 0, across: int = 0, dims: int = 0, **given: Any) -> Any:
  """Run on the host or the device, where the arrays are."""
  hyper = {"axis": axis, "across": across, "dims": dims}
  if isinstance(w, np.ndarray):
    return fn(w, **given, **hyper)
  with jax.default_matmul_precision("highest"):
    return programs.compiled(fn, tuple(sorted(hyper.items())))(w, given)


def _rows(w: Any, at: Any, axis: int) -> Any:
  """Bring a member's entries (repeat, size, block) to the front: (size, repeat * block, rest)."""
  size = at.shape[1]
  x = w.reshape(-1, 1) if w.ndim == 1 else w if axis == 0 else w.T
  return (
    x.take(at.swapaxes(0, 1).reshape(-1), axis=0).astype(np.float32).reshape(size, -1, x.shape[1])
  )


def _gram(w: Any, *, b: Any, at: Any, axis: int, **unused: int) -> Any:
  del unused
  x, y = (_rows(v, at, axis).reshape(at.shape[1], -1) for v in (w, b))
  return x @ y.T


def _circuit(
  w: Any, *, b: Any, c: Any, d: Any, at: Any, to: Any, axis: int, across: int, dims: int
) -> Any:
  """Compute <X_i Y_i, X'_j Y'_j> for all i, j, from X_i' X'_j and Y_i Y'_j', elementwise."""
  heads = [_heads(v, at, axis, dims) for v in (w, b)] + [
    _heads(v, to, across, dims) for v in (c, d)
  ]
  x, y, u, v = heads
  np_ = np if isinstance(w, np.ndarray) else jnp
  inner = np_.einsum("iar,jbr->ijab", x, y) * np_.einsum("iar,jbr->ijab", u, v)
  return inner.sum(axis=(2, 3))


def _heads(w: Any, at: Any, axis: int, dims: int) -> Any:
  """Return (units, dims, rest), query heads that share a unit summed."""
  x = _rows(w, at, axis)
  return x.reshape(x.shape[0], -1, dims, x.shape[2]).sum(axis=1)


def _take(w: Any, *, entries: Any, axis: int, **unused: int) -> Any:
  del unused
  return w.take(entries, axis=axis)


def _dot(w: Any, *, b: Any, **unused: int) -> Any:
  del unused
  return (w.astype(np.float32) * b.astype(np.float32)).sum()
