# SPDX-License-Identifier: Apache-2.0
"""Steps and transforms: what a method is to the drivers.

A method is an array function lifted by `core.lifting`, or a function of a whole model wrapped in a
`Step`. A transform is a tuple of steps, so `chain(a, b) == a + b`. The canonical spelling of a
transform is what its `repr` prints, a config holds, and the command line takes.
"""

import functools
import inspect
import re
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from treesurgeon.core import literals, model, paths
from treesurgeon.core import needs as needs_lib

Units = list[tuple[str, ...]]
KERNELS = r"(?:.*/)?kernel"
BLOCK_KERNELS = r"layers/(?!.*/router/).*/kernel"  # a router decides, which errors turn over
Scope = Literal["leaf", "block", "model"]
_SCOPES: tuple[Scope, ...] = ("leaf", "block", "model")


class Step(NamedTuple):
  """One operation on a model.

  Attributes:
    needs: what evidence it reads, by name; static and data-free.
    apply: (model, evidence, key) -> model; pure.
    scope: what a driver may cut it into: "leaf", "block" or "model".
    info: {"name": registered name, "arguments": as bound, "given": those not at their default}.
    units: all addresses of a model -> groups of addresses that change together; raises
      ValueError where the step would change nothing. Given a part of a model, which holds whole
      units, `apply` changes those and must do to them what it does in the whole.
    reselect: regex -> the same step on other addresses; None if the step takes the whole model.
  """

  needs: Mapping[str, needs_lib.Need]
  apply: Callable[[model.Model, needs_lib.Evidence, jax.Array], model.Model]
  scope: Scope
  info: Mapping[str, Any]
  units: Callable[[Sequence[str]], Units]
  reselect: Callable[[str], "Step"] | None = None

  def __repr__(self) -> str:
    return spell((self,))


Transform = tuple[Step, ...]


def chain(*transforms: Transform) -> Transform:
  """Apply transforms one after another.

  Args:
    *transforms: transforms, first applied first.

  Returns:
    Their concatenation.

  Example:
    >>> chain() == ()
    True
  """
  return sum(transforms, ())


def spell(transform: Transform) -> str:
  """Write a transform in its canonical one-line spelling, which `registry.parse` reads.

  Args:
    transform: steps that registered factories returned.

  Returns:
    Calls joined by " + "; `chain()` for no step at all.

  Example:
    >>> from treesurgeon import registry
    >>> spell(registry.parse("compress.quantize.rtn(bits=3, group_size=128)"))
    'compress.quantize.rtn(bits=3)'
  """
  calls = []
  for step in transform:
    if "spelling" in step.info:
      calls.append(step.info["spelling"])
      continue
    given = ", ".join(f"{k}={literals.write(v)}" for k, v in step.info["given"].items())
    calls.append(f"{step.info['name']}({given})")
  return " + ".join(calls) or "chain()"


def method(name: str) -> Callable[[Callable[..., Step]], Callable[..., Transform]]:
  """Make a factory's step carry its name and bound arguments, and check the arguments.

  Args:
    name: the name under which the registry lists the factory.

  Returns:
    A decorator for keyword-only functions that return one `Step`; the result returns a
    `Transform`, and raises ValueError for an argument of an unknown name or a wrong type.

  Example:
    >>> @method("demo.nothing")
    ... def nothing(*, times: int = 1):
    ...   return Step({}, lambda m, e, k: m, "model", {}, lambda names: [tuple(names)])
    >>> nothing(times=2)
    (demo.nothing(times=2),)
  """

  def decorate(factory: Callable[..., Step]) -> Callable[..., Transform]:
    signature = inspect.signature(factory)
    hints = typing.get_type_hints(factory)

    @functools.wraps(factory)
    def build(**arguments: Any) -> Transform:
      unknown = [a for a in arguments if a not in signature.parameters]
      if unknown:
        raise ValueError(
          f"{name} has no argument {unknown[0]!r}; it takes {', '.join(signature.parameters)}"
        )
      missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is inspect.Parameter.empty and p.name not in arguments
      ]
      if missing:
        raise ValueError(f"{name} needs the argument {missing[0]!r}")
      arguments = {k: literals.freeze(v) for k, v in arguments.items()}
      odd = [k for k, v in arguments.items() if not literals.fits(v, hints.get(k, Any))]
      try:
        made = factory(**arguments)  # what it says of an argument is better than we can
      except TypeError:
        if not odd:
          raise
      if odd:
        raise ValueError(
          f"{name}: {odd[0]}={arguments[odd[0]]!r} must be {literals.name(hints[odd[0]])}"
        )
      bound = signature.bind(**arguments)
      bound.apply_defaults()
      defaults = {p.name: p.default for p in signature.parameters.values()}
      given = {
        k: v for k, v in bound.arguments.items() if (type(v), v) != (type(defaults[k]), defaults[k])
      }
      info = {"name": name, "arguments": dict(bound.arguments), "given": given}
      return (named(made, info),)

    return build

  return decorate


def named(step: Step, info: Mapping[str, Any]) -> Step:
  """Give a step its name and arguments, kept when it is pointed at other addresses.

  Args:
    step: any step.
    info: see `Step.info`.

  Returns:
    The step with `info`.

  Example:
    >>> step = Step({}, lambda m, e, k: m, "model", {}, lambda names: [tuple(names)])
    >>> named(step, {"name": "demo", "given": {}})
    demo()
  """
  again = step.reselect
  if again is not None:
    return step._replace(info=info, reselect=lambda select: named(again(select), info))
  return step._replace(info=info)


def by_path(rules: Sequence[tuple[str, Transform]]) -> Transform:
  """Treat different leaves differently: the first rule whose regex matches an address wins.

  The evidence of all rules is gathered in one pass before any of them changes the model.

  Args:
    rules: (regular expression over addresses, transform of leaf steps); they may nest.

  Returns:
    A transform of one step.

  Raises:
    ValueError: without rules, for a pattern that does not compile or a step that takes the whole
      model, and, when applied, for a rule that matches nothing.

  Example:
    >>> from treesurgeon import registry
    >>> eight = registry.parse("compress.quantize.rtn(bits=8)")
    >>> by_path([("layers/0/.*", eight)])
    (by_path([('layers/0/.*', compress.quantize.rtn(bits=8))]),)
  """
  if not rules:
    raise ValueError("by_path needs at least one (regex, transform) pair")
  taken: list[str] = []
  narrowed: list[Step] = []
  aims: list[str] = []
  for pattern, transform in rules:
    _compile(pattern)
    earlier = "".join(rf"(?!(?:{p})\Z)" for p in taken)
    for step in transform:
      if step.reselect is None:
        raise ValueError(
          f"by_path: {step!r} works on whole models, so it cannot be aimed at {pattern!r}"
        )
      narrowed.append(step.reselect(f"{earlier}(?:{pattern})"))
      aims.append(pattern)
    taken.append(pattern)

  def apply(m: model.Model, evidence: needs_lib.Evidence, key: jax.Array) -> model.Model:
    for i, step in enumerate(narrowed):
      mine = {n: evidence[f"{i}.{n}"] for n in step.needs}
      m = step.apply(m, mine, jax.random.fold_in(key, i))
    return m

  def units(names: Sequence[str]) -> Units:
    out: Units = []
    for pattern, step in zip(aims, narrowed, strict=True):
      try:
        out += step.units(names)
      except paths.NoMatch as error:
        raise paths.NoMatch(
          f"by_path: no address matches {pattern!r} that {step!r} can change and no earlier rule "
          f"takes; nearest: {paths.nearest(pattern, names)}"
        ) from error
    return out

  def reselect(narrower: str) -> Step:
    return by_path([(both(narrower, p), t) for p, t in rules])[0]

  wants = {f"{i}.{n}": need for i, step in enumerate(narrowed) for n, need in step.needs.items()}
  scope = _SCOPES[max((_SCOPES.index(s.scope) for s in narrowed), default=0)]
  rules_spelled = ", ".join(f"({p!r}, {spell(t)})" for p, t in rules)
  info = {
    "name": "by_path",
    "arguments": {"rules": [[p, spell(t)] for p, t in rules]},
    "spelling": f"by_path([{rules_spelled}])",
  }
  return (Step(wants, apply, scope, info, units, reselect),)


def leaf_key(key: jax.Array, address: str) -> jax.Array:
  """Derive a leaf's random key from its address, whatever the order or sharding.

  Args:
    key: the step's key.
    address: the leaf's address.

  Returns:
    A key.

  Example:
    >>> a = leaf_key(jax.random.key(0), "layers/0/mlp/up/kernel")
    >>> bool(a == leaf_key(jax.random.key(0), "layers/0/mlp/up/kernel"))
    True
  """
  return jax.random.fold_in(key, zlib.crc32(address.encode()))


def check_donors(address: str, w: Any, donors: Sequence[Any], *, first: int = 0) -> None:
  """Refuse donors whose leaf differs in shape from the base's.

  Args:
    address: the leaf's address, for the message.
    w: the base's leaf.
    donors: the donors' leaves.
    first: which donor the first of them belongs to.

  Raises:
    ValueError: naming the address and both shapes.
  """
  for i, d in enumerate(donors, first):
    if tuple(d.shape) != tuple(w.shape):
      raise ValueError(
        f"{address}: donor {i} has shape {tuple(d.shape)}, the base has {tuple(w.shape)}; "
        "merged models must have equal shapes"
      )


def both(a: str, b: str) -> str:
  """Write the regular expression that matches in full what two others match in full.

  Args:
    a: regular expression.
    b: regular expression.

  Returns:
    Their conjunction.

  Example:
    >>> bool(re.fullmatch(both("a.*", ".*b"), "ab")), bool(re.fullmatch(both("a.*", ".*b"), "a"))
    (True, False)
  """
  return a if a == b else rf"(?=(?:{a})\Z)(?:{b})"


def _compile(pattern: str) -> None:
  try:
    re.compile(f"(?:{pattern})")
  except re.error as error:
    raise ValueError(f"by_path: {pattern!r} is not a regular expression: {error}") from error
