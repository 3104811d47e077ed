# SPDX-License-Identifier: Apache-2.0
"""Lifts for methods that move scales between what writes channels and what reads them.

They work layer by layer: what writes a channel and what reads it lie in one layer (`feeds`). A step
made here may change everything in a layer with a selected kernel, and cannot be aimed by `by_path`,
for a pattern may tear apart what changes together; its `select` says which kernels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.compress import feeds as feeds_lib
from treesurgeon.core import leaves as leaves_lib
from treesurgeon.core import model, needs, paths, programs, step

SNAP = 1e-4  # scales so near to 1 are 1: what is scaled already stays as it is, to the bit


def over_feeds(
  fn: Callable[..., jax.Array],
  *,
  hyper: Mapping[str, Any],
  wants: Mapping[str, str],
  kinds: Callable[[feeds_lib.Feed], bool],
  select: str | None,
) -> step.Step:
  """Lift a function that finds scales to a step that folds them, and so changes no output.

  Args:
    fn: `fn(reads, writes, feed, **evidence, **hyper)` -> scales, one a channel; the leaves are
      {name: array} and the evidence is one value a channel, the largest where inputs share it.
    hyper: keyword arguments of `fn`, hashable.
    wants: name to fold of statistics of the inputs, `stats.PerFeature`.
    kinds: which feeds.
    select: which kernels, a regular expression; None is every kernel inside the layers.

  Returns:
    The step. A feed's kernels must be selected together.
  """
  bound = {"fn": fn, "hyper": tuple(sorted(hyper.items()))}
  return over_layers(_scaled, hyper=bound, wants=wants, kinds=kinds, select=select)


def over_layers(
  fn: Callable[..., Mapping[str, Any]],
  *,
  hyper: Mapping[str, Any],
  wants: Mapping[str, str],
  select: str | None,
  kinds: Callable[[feeds_lib.Feed], bool] = lambda feed: True,
  done: Callable[[Any], bool] = lambda leaf: False,
) -> step.Step:
  """Lift a function of one layer and its feeds to a step.

  Args:
    fn: `fn(leaves, feeds, todo, plus_one, **evidence, **hyper)` -> changed leaves. The leaves, by
      name without "layers/<i>/", are the selected kernels, their biases, and what writes their
      inputs; `feeds` are those whose kernels are all to be changed; `todo` the kernels. Evidence is
      {kernel: state} for the first kernel of each feed and those of none. Defined at the top of a
      module, for it is compiled once for all layers alike.
    hyper: keyword arguments of `fn`, hashable.
    wants: name to fold of statistics of the inputs.
    select: which kernels, a regular expression; None is every kernel inside the layers.
    kinds: which feeds.
    done: whether a kernel is to be left as it is.

  Returns:
    The step. A feed's kernels must be selected together.
  """
  pattern = step.both(select or step.BLOCK_KERNELS, step.BLOCK_KERNELS)

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    del key
    changes: dict[str, Any] = {}
    held = m.addresses()
    for layer in feeds_lib.layers_of([a for a in held if re.fullmatch(pattern, a)]):
      at = f"layers/{layer}/"
      own = {a.removeprefix(at): m.leaf(a) for a in held if a.startswith(at)}
      todo = [n for n, x in own.items() if re.fullmatch(pattern, at + n) and not done(x)]
      free = {n for n, x in own.items() if n in todo or not leaves_lib.is_leaf(x)}
      feeds = [
        f
        for f in feeds_lib.of_layer(m.spec, layer)
        if kinds(f)
        and feeds_lib.selected(f, at, pattern)
        and set(f.reads) <= set(todo)
        and free.issuperset(f.writes)
      ]
      if not todo:
        continue
      fed = {n for f in feeds for n in f.reads}
      firsts = [*(f.reads[0] for f in feeds), *(n for n in todo if n not in fed)]
      given = {k: {n: evidence[k][at + n] for n in firsts} for k in wants}
      biases = [n.removesuffix("kernel") + "bias" for n in todo]
      used = dict.fromkeys([*todo, *biases, *(n for f in feeds for n in f.writes)])
      static = {"feeds": tuple(feeds), "todo": tuple(todo), **hyper}
      static["plus_one"] = bool(getattr(m.spec, "norm_plus_one", False))
      call = programs.compiled(fn, tuple(sorted(static.items())))
      changes |= {at + n: x for n, x in call({n: own[n] for n in used if n in own}, given).items()}
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    chosen = feeds_lib.layers_of(paths.select([n for n in names if n.endswith("kernel")], pattern))
    return [tuple(n for n in names if n.startswith(f"layers/{i}/")) for i in chosen]

  asked = {n: needs.Statistic(fold, select=pattern) for n, fold in wants.items()}
  return step.Step(asked, apply, "block", {}, units)


def _scaled(
  leaves: Mapping[str, Any],
  *,
  fn: Callable[..., jax.Array],
  feeds: tuple[feeds_lib.Feed, ...],
  todo: tuple[str, ...],
  plus_one: bool,
  hyper: tuple[tuple[str, Any], ...],
  **evidence: Mapping[str, Any],
) -> dict[str, jax.Array]:
  if not feeds:
    raise ValueError(f"no scale can be folded before {', '.join(todo)}; see `compress.feeds`")
  now, changed = dict(leaves), {}
  for feed in feeds:
    names = (*feed.reads, *feed.writes)
    packed = [n for n in names if leaves_lib.is_leaf(now[n])]
    if packed:
      raise ValueError(f"{packed[0]} is compressed; fold scales before compressing")
    own = [{n: now[n].astype(jnp.float32) for n in some} for some in (feed.reads, feed.writes)]
    given = {n: feeds_lib.pool(feed, x[feed.reads[0]].value) for n, x in evidence.items()}
    s = fn(*own, feed=feed, **given, **dict(hyper))
    s = jnp.where((jnp.abs(s - 1) < SNAP) | ~jnp.isfinite(s) | (s <= 0), 1.0, s)
    new = feeds_lib.fold(feed, now, s, plus_one=plus_one)
    now |= new
    changed |= new
  return changed
