# SPDX-License-Identifier: Apache-2.0
"""Read a mergekit configuration: which models, and which transform.

Supported here: the `models` form with the methods `linear`, `task_arithmetic` and `ties`, numeric
parameters for each model or for all, `base_model`, `dtype` and `out_dtype`. As in mergekit, a
model's parameter comes before the global one, `linear` takes no base model, and a base that is also
listed among the models is not merged into itself. Arithmetic is float32 whatever `dtype` says;
`dtype` is what the inputs are cast to first.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from treesurgeon.core import step
from treesurgeon.merge import linear, task_arithmetic, ties

METHODS = ("linear", "task_arithmetic", "ties")
DTYPES = ("float32", "bfloat16", "float16")
_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a configuration asks for.

  Attributes:
    base: directory of the model that is changed.
    transform: the merge; its donors are named in it.
    dtype: dtype the inputs are cast to, or None.
    out_dtype: dtype the output is cast to, or None.
  """

  base: str
  transform: step.Transform
  dtype: str | None = None
  out_dtype: str | None = None


def read(path: str | pathlib.Path) -> Plan:
  """Read a configuration file.

  Args:
    path: YAML file. Model paths in it are relative to the working directory.

  Returns:
    The plan.

  Raises:
    ValueError: if the file is no YAML mapping or asks for what is not supported.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file; expected a mergekit YAML configuration")
  try:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not YAML: {error}") from error
  if not isinstance(config, Mapping):
    raise ValueError(f"{path} is not a mapping; expected a mergekit configuration")
  try:
    return plan(config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def plan(config: Mapping[str, Any]) -> Plan:
  """Turn a parsed configuration into a base model and a transform.

  Args:
    config: the configuration.

  Returns:
    The plan.

  Raises:
    ValueError: for an unknown key, method, model or parameter.

  Example:
    >>> both = [{"model": m, "parameters": {"weight": 1.0}} for m in ("a", "b")]
    >>> plan({"merge_method": "linear", "models": both}).transform
    (merge.linear(models=('b',), weights=(1.0, 1.0)),)
  """
  _known(config, _KEYS, "the configuration")
  method = config.get("merge_method")
  if method not in METHODS:
    raise ValueError(f"merge_method={method!r} is not supported; supported: {', '.join(METHODS)}")
  models = config.get("models")
  if not isinstance(models, list) or not models:
    raise ValueError("'models' must be a list of at least one model")
  for i, item in enumerate(models):
    if not isinstance(item, Mapping) or not isinstance(item.get("model"), str):
      raise ValueError(f"models[{i}] must be a mapping with a 'model'")
    _known(item, ("model", "parameters"), f"models[{i}]")
  build = _linear if method == "linear" else _task_vectors
  base, transform = build(method, config, models)
  return Plan(base, transform, _dtype(config, "dtype"), _dtype(config, "out_dtype"))


def _linear(method: str, config: Mapping[str, Any], models: list) -> tuple[str, step.Transform]:
  del method
  if config.get("base_model"):
    raise ValueError("merge_method 'linear' takes no base_model; list it among the models")
  weights = _each(config, models, "weight", None, allowed=("weight",), shared=("normalize",))
  names = [m["model"] for m in models]
  normalize = _flag(config, "normalize", True)
  given = {} if normalize else {"normalize": False}
  return names[0], linear.linear(models=names[1:], weights=weights, **given)


def _task_vectors(
  method: str, config: Mapping[str, Any], models: list
) -> tuple[str, step.Transform]:
  base = config.get("base_model")
  if not isinstance(base, str):
    raise ValueError(f"merge_method {method!r} needs a base_model")
  models = [m for m in models if m["model"] != base]
  if not models:
    raise ValueError("no model besides base_model is listed")
  shared = ("normalize", "lambda", "int8_mask")
  own = ("weight", "density") if method == "ties" else ("weight",)
  weights = _each(config, models, "weight", None, allowed=own, shared=shared)
  given: dict[str, Any] = {
    "models": [m["model"] for m in models],
    "weights": weights,
    "lam": _number((config.get("parameters") or {}).get("lambda", 1.0), "lambda"),
    "normalize": _flag(config, "normalize", method == "ties"),
  }
  if method == "ties":
    given["density"] = _each(config, models, "density", 1.0, allowed=own, shared=shared)
    return base, ties.ties(**given)
  return base, task_arithmetic.task_arithmetic(**given)


def _each(
  config: Mapping[str, Any],
  models: list,
  name: str,
  default: float | None,
  *,
  allowed: tuple[str, ...],
  shared: tuple[str, ...],
) -> tuple[float, ...]:
  """Look one parameter up for every model: its own first, then the global one."""
  common = config.get("parameters") or {}
  _known(common, allowed + shared, "parameters")
  out = []
  for i, item in enumerate(models):
    own = item.get("parameters") or {}
    _known(own, allowed, f"models[{i}].parameters")
    value = own.get(name, common.get(name, default))
    if value is None:
      raise ValueError(f"models[{i}] ({item['model']}) lacks the parameter {name!r}")
    out.append(_number(value, f"{name} of models[{i}]"))
  return tuple(out)


def _number(value: Any, what: str) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f"{what} is {value!r}; supported: a number (no gradient, no filter)")
  return float(value)


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
  value = (config.get("parameters") or {}).get(name, default)
  if not isinstance(value, bool | int):
    raise ValueError(f"{name} is {value!r}; it must be true or false")
  return bool(value)


def _dtype(config: Mapping[str, Any], key: str) -> str | None:
  value = config.get(key)
  if value is not None and value not in DTYPES:
    raise ValueError(f"{key}={value!r} is not supported; supported: {', '.join(DTYPES)}")
  return value


def _known(mapping: Any, keys: tuple[str, ...], where: str) -> None:
  if not isinstance(mapping, Mapping):
    raise ValueError(f"{where} must be a mapping, not {mapping!r}")
  for key in mapping:
    if key not in keys:
      raise ValueError(f"{where}: {key!r} is not supported; supported: {', '.join(keys)}")
