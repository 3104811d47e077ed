# SPDX-License-Identifier: Apache-2.0
"""Which of our methods each `merge_method` of mergekit is, and what its parameters are called here.

`compat` says whose granularity a configuration means where mergekit and the paper differ: mergekit
trims and rescales every tensor by itself, and rescales to the same L1 norm. The differences are
explicit arguments of our methods; this table only picks them.
"""

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from treesurgeon.core import literals, step
from treesurgeon.merge.mergekit import config as config_lib
from treesurgeon.merge.mergekit import parameters

COMPATS = ("mergekit", "paper")
Factory = Callable[..., step.Transform]
Lookup = Callable[[str], Factory]
REQUIRED = object()
_RULES = ((".*", 1.0),)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter of a configuration.

  Attributes:
    argument: what the factory calls it; None if it has no effect on the outcome.
    read: checks and converts a scalar.
    default: as mergekit's; `REQUIRED` for none.
    of: "merge" for one value a merge, "inputs" for one a model, "others" for one a model other
      than the base.
    convert: turns the value into the argument's, given `compat`.
  """

  argument: str | None
  read: Callable[[Any], Any] = parameters.number
  default: Any = REQUIRED
  of: Literal["merge", "inputs", "others"] = "merge"
  convert: Callable[[Any, str], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
  """One method.

  Attributes:
    name: in our registry.
    base: whether a base model is "required", "optional", or an input like any other ("ignored").
    inputs: fewest and most models, the base included.
    others: fewest and most models besides the base.
    parameters: by the configuration's name.
    fixed: for each `compat`, further arguments.
    deltas: an argument that is set where an optional base is given.
  """

  name: str
  base: Literal["required", "optional", "ignored"] = "required"
  inputs: tuple[int, float] = (1, math.inf)
  others: tuple[int, float] = (0, math.inf)
  parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
  fixed: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  deltas: str | None = None


def _flag(argument: str | None, default: bool) -> Parameter:
  return Parameter(argument, parameters.flag, default)


def _rescale(paper: str) -> Parameter:
  def convert(value: bool, compat: str) -> str:
    return ("l1" if compat == "mergekit" else paper) if value else "none"

  return Parameter("rescale", parameters.flag, True, convert=convert)


def _tasks(
  name: str,
  *,
  normalize: bool = False,
  rescale: Parameter | None = None,
  density: str | None = "density",
  fixed: Mapping[str, Mapping[str, Any]] | None = None,
  **more: Parameter,
) -> Method:
  """Describe a method that adds sparse task vectors."""
  return Method(
    name,
    parameters={
      "weight": Parameter("weights", of="others"),
      "density": Parameter(density, default=1.0, of="others"),
      "lambda": Parameter("lam", default=1.0),
      "normalize": _flag("normalize", normalize),
      "rescale": rescale or _flag(None, False),
      "int8_mask": _flag(None, False),
      **more,
    },
    fixed=fixed or {},
  )


_ROWS = {"mergekit": {"granularity": "tensor"}, "paper": {"granularity": "row"}}
_GAMMA = Parameter("gamma", default=0.01, of="others")
_EPSILON = Parameter("epsilon", default=0.15, of="others")

METHODS: dict[str, Method] = {
  "arcee_fusion": Method("merge.arcee_fusion", inputs=(2, 2)),
  "breadcrumbs": _tasks("merge.breadcrumbs", fixed=_ROWS, gamma=_GAMMA),
  "breadcrumbs_ties": _tasks("merge.breadcrumbs_ties", fixed=_ROWS, gamma=_GAMMA),
  "dare_linear": _tasks("merge.dare_linear", rescale=_rescale("expected")),
  "dare_ties": _tasks("merge.dare_ties", rescale=_rescale("expected")),
  "della": _tasks("merge.della", normalize=True, rescale=_rescale("each"), epsilon=_EPSILON),
  "della_linear": _tasks("merge.della_linear", rescale=_rescale("each"), epsilon=_EPSILON),
  "karcher": Method(
    "merge.karcher",
    base="ignored",
    parameters={
      "max_iter": Parameter("max_iter", parameters.integer, 10),
      "tol": Parameter("tol", default=1e-5),
    },
  ),
  "linear": Method(
    "merge.linear",
    base="ignored",
    parameters={"weight": Parameter("weights", of="inputs"), "normalize": _flag("normalize", True)},
  ),
  "model_stock": Method(
    "merge.model_stock",
    inputs=(3, math.inf),
    parameters={"filter_wise": _flag("filter_wise", False)},
  ),
  "multislerp": Method(
    "merge.multislerp",
    base="optional",
    others=(1, math.inf),
    parameters={
      "weight": Parameter("weights", of="others"),
      "normalize_weights": _flag("normalize_weights", True),
      "eps": Parameter("eps", default=1e-8),
    },
    deltas="deltas",
  ),
  "nearswap": Method("merge.nearswap", inputs=(2, 2), parameters={"t": Parameter("t")}),
  "nuslerp": Method(
    "merge.nuslerp",
    base="optional",
    others=(2, 2),
    parameters={
      "weight": Parameter("weights", of="others"),
      "nuslerp_row_wise": _flag("row_wise", False),
      "nuslerp_flatten": _flag("flatten", True),
    },
    deltas="deltas",
  ),
  "passthrough": Method(
    "merge.passthrough",
    base="ignored",
    inputs=(1, 1),
    parameters={"scale": Parameter("scale", default=1.0, of="inputs")},
  ),
  "ram": Method("merge.ram", parameters={"epsilon": Parameter("epsilon", default=1e-5)}),
  "ramplus_tl": Method(
    "merge.ramplus_tl",
    parameters={
      "r": Parameter("r", default=0.1),
      "alpha": Parameter("alpha", default=0.2),
      "epsilon": Parameter("epsilon", default=1e-5),
    },
  ),
  "sce": Method(
    "merge.sce",
    parameters={
      "select_topk": Parameter("select_topk", default=1.0),
      "int8_mask": _flag(None, False),
    },
  ),
  "slerp": Method("merge.slerp", inputs=(2, 2), parameters={"t": Parameter("t")}),
  "task_arithmetic": _tasks("merge.task_arithmetic", density=None),
  "ties": _tasks(
    "merge.ties",
    normalize=True,
    fixed={"mergekit": {}, "paper": {"granularity": "global"}},
  ),
}


def find(name: str, lookup: Lookup) -> tuple[Method, Factory]:
  """Find a method by mergekit's name, or one of ours by the name in the registry.

  Args:
    name: what the configuration says.
    lookup: the registry: finds a factory by name, or raises ValueError.

  Returns:
    The method and its factory.

  Raises:
    ValueError: for an unknown name; the nearest are named.

  Example:
    >>> from treesurgeon import registry
    >>> find("ties", registry.load)[0].base, sorted(find("linear", registry.load)[0].parameters)
    ('required', ['normalize', 'weight'])
  """
  name = name.removeprefix("merge.")
  full = f"merge.{name}"
  try:
    factory = lookup(METHODS[name].name if name in METHODS else full)
  except ValueError as error:
    near = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(METHODS)}"
    raise ValueError(f"merge_method={name!r} is not known; {hint}") from error
  return METHODS.get(name) or _ours(full, factory), factory


def check_inputs(piece: config_lib.Slice, config: config_lib.Config, method: Method) -> None:
  """Refuse a slice whose models are not what the method merges.

  Args:
    piece: the slice.
    config: the merge.
    method: its method.

  Raises:
    ValueError: naming the slice and what it lacks or has too much of.
  """
  models = [i.model for i in piece.inputs]
  base = piece.base or config.base
  where, name = piece.where, config.method
  twice = [m for k, m in enumerate(models) if m in models[:k]]
  if twice:
    raise ValueError(f"{where}: {twice[0]} is listed twice")
  if method.base == "required" and base is None:
    raise ValueError(f"merge_method {name!r} needs a base_model")
  if method.base != "ignored" and base is not None and base not in models:
    raise ValueError(f"{where}: the base_model {base} must be among the sources of the slice")
  has_base = method.base != "ignored" and base is not None
  for count, (low, high), what in (
    (len(models), method.inputs, "models"),
    (len(models) - has_base, method.others, "models besides the base"),
  ):
    if not low <= count <= high:
      wanted = str(low) if low == high else f"at least {low}"
      if low < high < math.inf or (count > high and low != high):
        wanted = f"at most {high}"
      hint = f" ({', '.join(models)})" if models else ""
      raise ValueError(f"{where}: merge_method {name!r} takes {wanted} {what}, not {count}{hint}")


def varies(factory: Factory, argument: str) -> bool:
  """Tell whether an argument may be rules over addresses.

  Args:
    factory: a method's factory.
    argument: of the factory.

  Returns:
    Whether its annotation takes rules, alone or as one of several.

  Example:
    >>> from treesurgeon.merge import linear
    >>> varies(linear.linear, "weights"), varies(linear.linear, "normalize")
    (True, False)
  """
  hint = typing.get_type_hints(factory)[argument]
  return literals.fits(_RULES, hint) or literals.fits((_RULES,), hint)


def _ours(name: str, factory: Factory) -> Method:
  """Describe a method that mergekit lacks by the arguments of its factory."""
  hints = typing.get_type_hints(factory)
  found: dict[str, Parameter] = {}
  for argument, given in inspect.signature(factory).parameters.items():
    if argument in ("models", "select"):
      continue
    default = REQUIRED if given.default is inspect.Parameter.empty else given.default
    if argument == "weights":
      found["weight"] = Parameter(argument, default=default, of="others")
      continue
    hint = hints[argument]
    readers = (
      (True, parameters.flag), (1, parameters.integer), (1.5, parameters.number),
      ("", parameters.text),
    )  # fmt: skip
    fitting = [read for probe, read in readers if literals.fits(probe, hint)]
    if not fitting:
      continue
    # A float's annotation takes an int too, a number is read as what is general enough for it.
    read = parameters.number if parameters.number in fitting else fitting[0]
    found[argument] = Parameter(argument, read, default)
  return Method(name, parameters=found)
