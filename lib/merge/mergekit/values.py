# SPDX-License-Identifier: Apache-2.0
"""A configuration's parameters as arguments of our methods.

Every parameter is looked up for every tensor of the output as mergekit does: in a model's own
parameters, the slice's, the module's, the configuration's. Tensors that agree in what a method
must be compiled for share one step, and what varies among them becomes rules.
"""

import difflib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from treesurgeon.core import step
from treesurgeon.merge import passthrough
from treesurgeon.merge.mergekit import assembly, methods, parameters
from treesurgeon.merge.mergekit import config as config_lib

_CONSENSUS = ("ties", "dare_ties", "della", "breadcrumbs_ties")


class Roles(NamedTuple):
  """Which of an entry's inputs a method takes for what: the array it changes, and the donors."""

  first: int
  donors: tuple[int, ...]
  has_base: bool


def roles(entry: assembly.Entry, config: config_lib.Config, method: methods.Method) -> Roles:
  """Tell which of an entry's inputs is the model at hand, and which are its donors.

  Args:
    entry: a tensor of the output.
    config: the merge.
    method: its method.

  Returns:
    Indices of inputs.
  """
  models = [i.model for i in entry.piece.inputs]
  base = entry.piece.base or config.base
  has_base = method.base != "ignored" and base is not None
  first = models.index(base) if has_base and base in models else 0
  return Roles(first, tuple(k for k in range(len(models)) if k != first), has_base)


class Values:
  """Look parameters up.

  Args:
    config: the merge.
    method: its method.
    factory: of the method.
    compat: whose granularities are meant.

  Attributes:
    notes: what a reader should be told, a sentence each.

  Raises:
    ValueError: for a parameter that no method has; the nearest is named.
  """

  def __init__(
    self,
    config: config_lib.Config,
    method: methods.Method,
    factory: methods.Factory,
    compat: str,
  ):
    if compat not in methods.COMPATS:
      raise ValueError(f"compat={compat!r}; valid: {', '.join(methods.COMPATS)}")
    self._config, self._method, self._factory, self._compat = config, method, factory, compat
    self.notes: list[str] = []
    self._varies = {
      p.argument: methods.varies(factory, p.argument)
      for p in method.parameters.values()
      if p.argument is not None
    }
    self._check_keys()
    self._stepped = False
    self._constants: dict[Any, Any] = {}

  def of(self, entry: assembly.Entry) -> dict[str, Any]:
    """Look up every parameter of one tensor: name to a value, or to a tuple with one a model."""
    role = roles(entry, self._config, self._method)
    out = {}
    for name, parameter in self._method.parameters.items():
      if parameter.of == "merge":
        out[name] = self._find(name, parameter, entry, None)
        continue
      chosen = role.donors if role.has_base else (role.first, *role.donors)
      out[name] = tuple(self._find(name, parameter, entry, k) for k in chosen)
    self._check_values(entry, out)
    return out

  def transform(
    self,
    entries: Sequence[assembly.Entry],
    donors: Sequence[str],
    names: parameters.Names,
  ) -> step.Transform:
    """Build the steps.

    Args:
      entries: tensors to merge.
      donors: names under which steps ask for donors, in order.
      names: of all the output's tensors.

    Returns:
      One step, or several joined by path.
    """
    groups: dict[Hashable, list[tuple[assembly.Entry, dict[str, Any]]]] = {}
    for entry in entries:
      found = self.of(entry)
      role = roles(entry, self._config, self._method)
      fixed = [(n, v) for n, v in found.items() if not self._may_vary(n)]
      key = (len(role.donors), role.has_base, tuple(fixed))
      groups.setdefault(key, []).append((entry, found))
    rules = []
    for (count, has_base, _), members in groups.items():  # pyright: ignore[reportGeneralTypeIssues]
      pattern = names.pattern(e.name for e, _ in members)
      alone = None if len(groups) > 1 or pattern == ".*" else pattern
      built = self._build(members, donors[:count], has_base, names, select=alone)
      if built:
        rules.append((pattern, built))
    if len(rules) == len(groups) == 1:
      return rules[0][1]
    return step.by_path(rules) if rules else passthrough.passthrough()

  def _may_vary(self, name: str) -> bool:
    argument = self._method.parameters[name].argument
    return argument is None or self._varies[argument]

  def _build(
    self,
    members: Sequence[tuple[assembly.Entry, dict[str, Any]]],
    donors: Sequence[str],
    has_base: bool,
    names: parameters.Names,
    *,
    select: str | None,
  ) -> step.Transform:
    """Call the factory for tensors that share all that is compiled for."""
    method = self._method
    takes_models = method.name != "merge.passthrough"
    if takes_models and not donors and method.base != "ignored":
      return ()  # nothing is added to the base
    arguments = dict(method.fixed.get(self._compat, {}))
    for name, parameter in method.parameters.items():
      if parameter.argument is None:
        continue
      columns = {e.name: found[name] for e, found in members}
      if parameter.of == "merge":
        value = names.rules(columns)
      else:
        given = {v is None for column in columns.values() for v in column}
        if len(given) > 1:
          raise ValueError(f"{name!r} is given for some models or tensors, not for all")
        if True in given:  # a method of ours that can do without
          continue
        width = len(next(iter(columns.values())))
        value = tuple(names.rules({n: v[k] for n, v in columns.items()}) for k in range(width))
        if not takes_models:
          (value,) = value
      if parameter.convert is not None:
        value = parameter.convert(value, self._compat)
      arguments[parameter.argument] = value
    if takes_models:
      arguments["models"] = tuple(donors)
    if select is not None:
      arguments["select"] = select
    if method.deltas is not None and has_base:
      arguments[method.deltas] = True
    return self._factory(**arguments)

  def _find(
    self, name: str, parameter: methods.Parameter, entry: assembly.Entry, index: int | None
  ) -> Any:
    """Look one parameter up, for the whole merge or for one input."""
    key = (name, id(entry.piece), id(entry.module), index)
    if key in self._constants:
      return self._constants[key]
    constant, value = True, None
    for where, scope in self._scopes(entry, index):
      if name in scope:
        setting = scope[name]
        constant = constant and not isinstance(setting, list | Mapping)
        if isinstance(setting, list):
          self._stepped |= _has_gradient(setting)
        spelled = entry.name if index is None else entry.names[index]
        try:
          value = parameters.evaluate(setting, spelled, entry.t, parameter.read)
        except ValueError as error:
          raise ValueError(f"{where}: {name}: {error}") from error
        if value is not None:
          break
    if value is None:
      if parameter.default is methods.REQUIRED:
        whom = "" if index is None else f" ({entry.piece.inputs[index].model})"
        raise ValueError(f"{entry.piece.where}{whom} lacks the parameter {name!r}")
      value = parameter.default
    if constant:
      self._constants[key] = value
    return value

  def _scopes(self, entry: assembly.Entry, index: int | None) -> list[tuple[str, Mapping]]:
    piece = entry.piece
    found = []
    if index is not None:
      found.append((f"{piece.where}: {piece.inputs[index].model}", piece.inputs[index].parameters))
    found.append((piece.where, piece.parameters))
    found.append(("modules", entry.module.parameters))
    found.append(("parameters", self._config.parameters))
    return found

  def _check_keys(self) -> None:
    valid = self._method.parameters
    everywhere = {n for m in methods.METHODS.values() for n in m.parameters}
    scopes: list[tuple[str, Mapping[str, Any], bool]] = [
      ("parameters", self._config.parameters, False)
    ]
    for module, made in self._config.modules.items():
      scopes.append((f"modules.{module}.parameters", made.parameters, False))
      for piece in made.slices:
        scopes.append((f"{piece.where}.parameters", piece.parameters, False))
        scopes += [(f"{piece.where}: {i.model}", i.parameters, True) for i in piece.inputs]
    method = self._config.method
    for where, scope, own in scopes:
      for name in scope:
        if name not in valid and name not in everywhere:
          near = difflib.get_close_matches(str(name), valid, n=1)
          hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(valid) or 'none'}"
          raise ValueError(f"{where}: {method} has no parameter {name!r}; {hint}")
        if name not in valid:
          self._note(f"{where}: {name!r} has no effect on {method}, as in mergekit")
        elif own and valid[name].of == "merge":
          self._note(
            f"{where}: {name!r} of one model has no effect, as in mergekit; give it to all"
          )

  def _check_values(self, entry: assembly.Entry, found: Mapping[str, Any]) -> None:
    """Say what is easily misunderstood, and refuse weights that cannot be normalized."""
    weights, normalize = found.get("weight"), found.get("normalize")
    if not weights or not normalize or any(w is None for w in weights):
      return
    if self._config.method == "linear" and abs(math.fsum(weights)) < 1e-8:
      raise ValueError(
        f"{entry.name}: the weights {', '.join(map(str, weights))} sum to zero, so they cannot be "
        "normalized; set normalize: false"
      )
    if self._config.method in _CONSENSUS and min(weights) < 0:
      self._note(
        f"a negative weight of {self._config.method} cancels itself under normalize, as in mergekit"
      )

  def stepped(self) -> bool:
    """Tell whether a gradient was met."""
    return self._stepped

  def _note(self, text: str) -> None:
    if text not in self.notes:
      self.notes.append(text)


def _has_gradient(setting: Sequence[Any]) -> bool:
  inner = [s.get("value") if isinstance(s, Mapping) else s for s in setting]
  if any(isinstance(s, Mapping) for s in setting):
    return any(isinstance(v, list) and len(set(map(str, v))) > 1 for v in inner)
  return len(set(map(str, inner))) > 1
