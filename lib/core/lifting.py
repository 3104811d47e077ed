# SPDX-License-Identifier: Apache-2.0
"""Lifting array functions to steps: over each leaf, over leaves that belong together, over blocks.

A lift compiles the function, picks its evidence, and puts what it returns in place; the function
knows neither addresses nor models.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import numpy as np

from treesurgeon.core import leaves, model, paths, pieces, programs, step, varied
from treesurgeon.core import needs as needs_lib


def over_leaves(
  fn: Callable[..., Any],
  *,
  hyper: Mapping[str, Any],
  knobs: Mapping[str, Any] | None = None,
  check: Callable[..., None] | None = None,
  select: str | None = None,
  default: str = step.BLOCK_KERNELS,
  domain: str = step.KERNELS,
  wants: Mapping[str, needs_lib.Need] | None = None,
  random: bool = False,
  raw: bool = False,
  split: bool | Callable[..., Sequence[Mapping[str, Any]]] = False,
  shared: str = "",
  options: Sequence[Mapping[str, Any]] = (),
  choose: Callable[..., Any] | None = None,
  scope: Literal["leaf", "block"] = "leaf",
) -> step.Step:
  """Lift an array function to a step that changes every selected leaf by itself.

  The function is compiled once for each shape and set of hyper-parameters, and wrapped so
  that it need not know about meshes. Values of `knobs` are data to the compiled program, so that a
  sweep or a gradient over layers compiles once; shapes must not depend on them. In both, rules
  of `varied` are looked up for each leaf.

  Args:
    fn: `fn(w, **evidence, **hyper)` -> array or compressed leaf; the evidence is this leaf's. With
      `random` it also receives `key`, which depends on the address alone. Defined at the top of
      a module, for programs are kept by it.
    hyper: keyword arguments of `fn`, hashable.
    knobs: further keyword arguments, numbers or tuples of numbers; None stays None.
    check: called with the number of donors and all of a leaf's hyper-parameters as plain Python
      before its program runs; raises ValueError for what `fn` cannot see in traced values.
    select: which addresses, a regular expression; None means `default`.
    default: the selection when the user names none.
    domain: what the method can work on at all, whatever the selection.
    wants: evidence by name.
    random: whether `fn` takes a key.
    raw: whether `fn` takes compressed leaves as they are; otherwise they come dense.
    split: whether `fn` treats entries independently, so that a large host array may go through in
      pieces of rows (`core.pieces`); or a function that makes it so: `split(w, donors, bounds,
      **hyper)` -> further evidence for every piece.
    shared: one of `wants`. Leaves for which it is one object, as for all kernels that the same
      inputs feed, go through `fn` together, a tuple in and a tuple out, so that what is computed
      from it is computed once. Other evidence comes as tuples; without `knobs`, `random`, `split`.
    options: further keyword arguments of `fn` to choose from for each leaf, where what is stored
      depends on the weights. Under `jax.eval_shape`, which sees none, the first ones hold.
    choose: `choose(w, options=options, **evidence, **hyper)` -> the index of a leaf's option;
      options come as tuples of pairs.
    scope: "block" if a driver should recompute inputs between blocks.

  Returns:
    The step.

  Example:
    >>> double = over_leaves(lambda w, by: w * by, hyper={"by": 2.0}, select="w", domain=".*")
    >>> m = model.Model(None, {"w": jax.numpy.ones(2)})
    >>> double.apply(m, {}, jax.random.key(0)).leaf("w").tolist()
    [2.0, 2.0]
  """
  chosen = default if select is None else select
  pattern = step.both(chosen, domain)
  wants = dict(wants or {})
  knobs = dict(knobs or {})
  donors = next((n for n, need in wants.items() if isinstance(need, needs_lib.Donors)), None)

  def apply(m: model.Model, evidence: needs_lib.Evidence, key: jax.Array) -> model.Model:
    changes = {}
    chosen = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    if shared:
      for some in _alike(chosen, evidence[shared], hyper):
        w = tuple(m.leaf(a) for a in some)
        given = {name: tuple(evidence[name][a] for a in some) for name in wants}
        given[shared] = given[shared][0]
        if not raw:
          w, given = leaves.map_leaves(leaves.dense, (w, given))
        static = {name: varied.at(v, some[0]) for name, v in hyper.items()}
        call = programs.compiled(fn, tuple(sorted(static.items())))
        changes.update(zip(some, _naming(some[0], call, w, given), strict=True))
      return m.update(changes)
    for address in chosen:
      w = m.leaf(address)
      given = {name: evidence[name][address] for name in wants}
      static = {name: varied.at(v, address) for name, v in hyper.items()}
      turned = {name: varied.at(v, address) for name, v in knobs.items()}
      for name, need in wants.items():
        if isinstance(need, needs_lib.Donors):
          step.check_donors(address, w, given[name])
      if check is not None:
        check(_donor_count(wants, given), **static, **turned)
      if not raw:
        w, given = leaves.map_leaves(leaves.dense, (w, given))
      if random:
        given["key"] = step.leaf_key(key, address)
      given.update(jax.tree.map(np.float32, turned))
      if choose is not None:
        static |= options[_chosen(choose, w, given, static, options)]
      call = programs.compiled(fn, tuple(sorted(static.items())))
      others = given[donors] if donors else ()
      where = pieces.bounds(w, others) if split else None
      if where is None:
        changes[address] = _naming(address, call, w, given)
      else:
        more = split(w, others, where, **static) if callable(split) else None
        made = pieces.through(call, w, given, donors, where, more)
        changes[address] = made if getattr(m, "late", False) else np.asarray(made)
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    possible = [n for n in names if re.fullmatch(domain, n)]
    return [(n,) for n in paths.select(possible, chosen)]

  def reselect(narrower: str) -> step.Step:
    return over_leaves(
      fn, hyper=hyper, knobs=knobs, check=check,
      select=narrower if select is None else step.both(select, narrower),
      default=default, domain=domain, wants=wants, random=random, raw=raw, split=split,
      shared=shared, options=options, choose=choose, scope=scope,
    )  # fmt: skip

  return step.Step(_aim(wants, pattern), apply, scope, {}, units, reselect)


def over_groups(
  fn: Callable[..., Mapping[str, Any]],
  *,
  groups: str,
  hyper: Mapping[str, Any],
  knobs: Mapping[str, Any] | None = None,
  wants: Mapping[str, needs_lib.Need] | None = None,
  select: str = ".*",
  random: bool = False,
  scope: Literal["leaf", "block"] = "leaf",
) -> step.Step:
  r"""Lift a function of several leaves that belong together, such as a layer's q, k and v.

  Args:
    fn: `fn({role: w}, **evidence, **hyper)` -> {role: leaf}; each evidence is {role: value}.
    groups: regular expression over addresses with the named groups `group` and `role`; the
      addresses that agree in `group` are handed over together.
    hyper: keyword arguments of `fn`, hashable.
    knobs: further keyword arguments, numbers or tuples of numbers, data to the compiled program.
    wants: evidence by name.
    select: regular expression; a group is changed if it matches all the group's addresses, and
      must not match some of them only.
    random: whether `fn` takes a key, which depends on the group's name alone.
    scope: as in `over_leaves`.

  Returns:
    The step.

  Example:
    >>> both = "(?P<group>.*)/(?P<role>a|b)"
    >>> add = over_groups(lambda w: {k: w["a"] + w["b"] for k in w}, groups=both, hyper={})
    >>> m = model.Model(None, {"x": {"a": jax.numpy.ones(()), "b": jax.numpy.ones(())}})
    >>> add.apply(m, {}, jax.random.key(0)).leaf("x/a").item()
    2.0
  """
  call = programs.compiled(fn, tuple(sorted(hyper.items())))
  wants = dict(wants or {})
  turned = jax.tree.map(np.float32, dict(knobs or {}))

  def gather(names: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name in names:
      match = re.fullmatch(groups, name)
      if match:
        found.setdefault(match["group"], {})[match["role"]] = name
    inside = {g: [bool(re.fullmatch(select, a)) for a in r.values()] for g, r in found.items()}
    torn = [g for g, hits in inside.items() if any(hits) and not all(hits)]
    if torn:
      raise ValueError(
        "the selection tears a group apart; these change together: "
        f"{', '.join(found[torn[0]].values())}"
      )
    return {g: roles for g, roles in found.items() if all(inside[g])}

  def apply(m: model.Model, evidence: needs_lib.Evidence, key: jax.Array) -> model.Model:
    changes = {}
    for group, roles in gather(m.addresses()).items():
      w = {r: m.leaf(a) for r, a in roles.items()}
      given = {n: {r: evidence[n][a] for r, a in roles.items()} for n in wants}
      for n, need in wants.items():
        for r, a in roles.items() if isinstance(need, needs_lib.Donors) else ():
          step.check_donors(a, w[r], given[n][r])
      w, given = leaves.map_leaves(leaves.dense, (w, given))
      if random:
        given["key"] = step.leaf_key(key, group)
      out = call(w, {**given, **turned})
      changes.update({roles[r]: leaf for r, leaf in out.items()})
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    possible = paths.select(names, groups)
    paths.select(possible, select)
    return [tuple(roles.values()) for roles in gather(names).values()]

  def reselect(narrower: str) -> step.Step:
    return over_groups(
      fn, groups=groups, hyper=hyper, knobs=knobs, wants=wants, select=step.both(select, narrower),
      random=random, scope=scope,
    )  # fmt: skip

  return step.Step(_aim(wants, step.both(groups, select)), apply, scope, {}, units, reselect)


def over_blocks(
  fn: Callable[..., Mapping[str, Any]],
  *,
  hyper: Mapping[str, Any],
  knobs: Mapping[str, Any] | None = None,
  wants: Mapping[str, needs_lib.Need] | None = None,
  select: str | None = None,
  default: str = step.BLOCK_KERNELS,
  domain: str = step.KERNELS,
  random: bool = False,
  raw: bool = False,
) -> step.Step:
  """Lift a function that tunes the selected leaves of a block together, to keep its output.

  Compiled once for all blocks of equal structure: what differs between them is data.

  Args:
    fn: `fn(w, *, inputs, targets, forward, **evidence, **hyper)` -> {relative address: leaf}. `w`
      holds the selected leaves by relative address, "mlp/up/kernel"; inputs and targets are those
      of `needs.Block`, and `forward(changes, h)` is the block's output with some leaves replaced,
      so `forward({}, inputs)` is what the block as it was gives on the changed inputs. Evidence
      is {relative address: value}. Defined at the top of a module, as for `over_leaves`.
    hyper: keyword arguments of `fn`, hashable.
    knobs: further keyword arguments, numbers or tuples of numbers, data to the compiled program.
    wants: evidence by name, besides the block itself.
    select: which addresses, a regular expression; None means `default`.
    default: the selection when the user names none.
    domain: what the method can work on at all; what lies outside the layers is left out.
    random: whether `fn` takes a key, which depends on the block's name alone.
    raw: whether `fn` takes compressed leaves as they are; otherwise they come dense.

  Returns:
    The step.

  Example:
    >>> half = over_blocks(lambda w, inputs, targets, forward: {a: x / 2 for a, x in w.items()},
    ...   hyper={})
    >>> list(half.needs), half.scope
    (['block'], 'block')
    >>> half.units(["layers/0/up/kernel", "layers/0/norm/scale", "layers/1/up/kernel"])
    [('layers/0/up/kernel',), ('layers/1/up/kernel',)]
  """
  chosen = default if select is None else select
  domain = step.both(domain, r"layers/\d+/.*")
  pattern = step.both(chosen, domain)
  others = dict(wants or {})
  turned = jax.tree.map(np.float32, dict(knobs or {}))
  call = programs.compiled(_tuned, (("fn", fn), ("hyper", tuple(sorted(hyper.items())))))

  def gather(names: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name in names:
      if re.fullmatch(pattern, name):
        _, layer, relative = name.split("/", 2)
        found.setdefault(f"layers/{layer}", {})[relative] = name
    return found

  def apply(m: model.Model, evidence: needs_lib.Evidence, key: jax.Array) -> model.Model:
    changes = {}
    for name, held in gather(m.addresses()).items():
      w = {r: m.leaf(a) for r, a in held.items()}
      given: dict[str, Any] = {n: {r: evidence[n][a] for r, a in held.items()} for n in others}
      if not raw:
        w, given = leaves.map_leaves(leaves.dense, (w, given))
      if random:
        given["key"] = step.leaf_key(key, name)
      out = _naming(name, call, w, {"block": evidence["block"][name], "more": {**given, **turned}})
      changes.update({held[r]: x for r, x in out.items()})
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    paths.select([n for n in names if re.fullmatch(domain, n)], chosen)
    return [tuple(held.values()) for held in gather(names).values()]

  def reselect(narrower: str) -> step.Step:
    return over_blocks(
      fn, hyper=hyper, knobs=knobs, wants=wants, default=default, domain=domain, random=random,
      raw=raw, select=narrower if select is None else step.both(select, narrower),
    )  # fmt: skip

  all_wants = {"block": needs_lib.Blocks(), **others}
  return step.Step(_aim(all_wants, pattern), apply, "block", {}, units, reselect)


def _naming(address: str, call: Callable[[Any, Any], Any], w: Any, given: Any) -> Any:
  """Call a method on a leaf; what it says of shapes shall tell whose."""
  try:
    return call(w, given)
  except ValueError as error:
    raise ValueError(f"{address}: {error}") from error


def _chosen(
  choose: Callable[..., Any],
  w: Any,
  given: Mapping[str, Any],
  static: Mapping[str, Any],
  options: Sequence[Mapping[str, Any]],
) -> int:
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((w, given))):
    return 0
  listed = tuple(tuple(sorted(o.items())) for o in options)
  call = programs.compiled(choose, tuple(sorted({**static, "options": listed}.items())))
  return int(call(w, given))


def _donor_count(wants: Mapping[str, needs_lib.Need], given: Mapping[str, Any]) -> int:
  return sum(len(given[n]) for n, need in wants.items() if isinstance(need, needs_lib.Donors))


def _alike(
  addresses: Sequence[str], evidence: Mapping[str, Any], hyper: Mapping[str, Any]
) -> list[list[str]]:
  """Sort addresses into lists that agree in their evidence, as an object, and hyper-parameters."""
  held = {a: evidence[a] for a in addresses}  # alive together, else two might share an id
  found: dict[Any, list[str]] = {}
  for a, value in held.items():
    key = id(value), tuple(varied.at(v, a) for v in hyper.values())
    found.setdefault(key, []).append(a)
  return list(found.values())


def _aim(wants: Mapping[str, needs_lib.Need], pattern: str) -> dict[str, needs_lib.Need]:
  """Point statistics without a selection of their own at the step's."""
  return {
    name: dataclasses.replace(need, select=pattern)
    if isinstance(need, needs_lib.Statistic | needs_lib.Blocks) and need.select is None
    else need
    for name, need in wants.items()
  }


def _tuned(
  w: Any,
  block: needs_lib.Block,
  more: Mapping[str, Any],
  *,
  fn: Callable[..., Any],
  hyper: tuple[tuple[str, Any], ...],
) -> Mapping[str, Any]:
  """Take a block's evidence apart, inside the compiled program."""
  told = {"inputs": block.inputs, "targets": block.targets, "forward": block.forward}
  return fn(w, **told, **more, **dict(hyper))
