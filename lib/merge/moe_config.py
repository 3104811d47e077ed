# SPDX-License-Identifier: Apache-2.0
"""The grammar of mergekit-moe's configurations: every key known, every value of its type."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from treesurgeon.merge import moe_gates
from treesurgeon.merge.mergekit import config as mergekit_config

_TOP = (
  "base_model", "experts", "shared_experts", "gate_mode", "dtype", "experts_per_token",
  "architecture",
)  # fmt: skip
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Expert:
  """One expert.

  Attributes:
    source_model: a directory, or `directory+adapter`.
    positive_prompts: what should go to it.
    negative_prompts: what should not.
    noise_scale: standard deviation of noise added to its weights, or None.
    residual_scale: factor of its output projection, or None.
  """

  source_model: str
  positive_prompts: tuple[str, ...] = ()
  negative_prompts: tuple[str, ...] = ()
  noise_scale: float | None = None
  residual_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  """A mixture.

  Attributes:
    base_model: gives all that is not in an expert.
    experts: what tokens are routed to.
    shared_experts: what every token goes to.
    gate_mode: one of `moe_gates.MODES`.
    experts_per_token: how many experts a token goes to.
    dtype: of the output; None is each tensor's own.
    architecture: the beginning of a layout's name, or None.
    document: the file's content.
  """

  base_model: str
  experts: tuple[Expert, ...]
  shared_experts: tuple[Expert, ...] = ()
  gate_mode: str = "hidden"
  experts_per_token: int = 2
  dtype: str | None = None
  architecture: str | None = None
  document: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def models(self) -> list[str]:
    """List the models, the base first."""
    named = [e.source_model for e in (*self.experts, *self.shared_experts)]
    return list(dict.fromkeys([self.base_model, *named]))


def read(path: str | pathlib.Path, *, allow_same: bool = False) -> Config:
  """Read a configuration file.

  Args:
    path: YAML file. Model paths in it are relative to the working directory.
    allow_same: take experts that are all one model.

  Returns:
    The configuration.

  Raises:
    ValueError: naming the file, the key, the value and what would be valid.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file; expected a mergekit-moe YAML configuration")
  try:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is not YAML: {error}") from error
  try:
    return parse(document, allow_same=allow_same)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def parse(document: Any, *, allow_same: bool = False) -> Config:
  """Check a parsed configuration.

  Args:
    document: what YAML makes of it.
    allow_same: take experts that are all one model.

  Returns:
    The configuration.

  Raises:
    ValueError: for an unknown key or mode, too few experts, or prompts that tell no expert apart.

  Example:
    >>> experts = [{"source_model": m} for m in ("a", "b")]
    >>> parse({"base_model": "a", "experts": experts, "gate_mode": "random"}).models()
    ['a', 'b']
  """
  if not isinstance(document, Mapping):
    raise ValueError(f"the configuration must be a mapping, not {document!r}")
  mergekit_config.known(document, _TOP, "the configuration")
  experts = _experts(document, "experts")
  mode, dtype = document.get("gate_mode", "hidden"), document.get("dtype")
  per, architecture = document.get("experts_per_token", 2), document.get("architecture")
  if mode not in moe_gates.MODES:
    raise ValueError(f"gate_mode={mode!r}: valid are {', '.join(moe_gates.MODES)}")
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} is not supported; supported: {', '.join(DTYPES)}")
  if architecture is not None and not isinstance(architecture, str):
    raise ValueError(f"architecture={architecture!r} must be a name")
  if type(per) is not int or not 1 <= per <= len(experts):
    raise ValueError(f"experts_per_token={per!r} must be 1 to {len(experts)}, the experts")
  config = Config(
    base_model=_text(document, "base_model", "the configuration"),
    experts=experts,
    shared_experts=_experts(document, "shared_experts"),
    gate_mode=mode,
    experts_per_token=per,
    dtype=dtype,
    architecture=architecture,
    document=dict(document),
  )
  _check_prompts(config)
  if not allow_same and len({e.source_model for e in config.experts}) == 1:
    raise ValueError(
      "all experts are the same model, so that every one gives the same output; to train the "
      "mixture afterwards, pass --allow_same_experts"
    )
  return config


def text(config: Config) -> str:
  """Write a configuration as YAML.

  Args:
    config: the configuration.

  Returns:
    The text.

  Example:
    >>> text(Config("a", (), document={"base_model": "a"})).strip()
    'base_model: a'
  """
  return yaml.safe_dump(dict(config.document), sort_keys=False, allow_unicode=True)


def _check_prompts(config: Config) -> None:
  if "random" in config.gate_mode:
    return
  everyone = [("experts", config.experts), ("shared_experts", config.shared_experts)]
  for what, experts in everyone:
    for i, expert in enumerate(experts):
      if not expert.positive_prompts:
        raise ValueError(
          f"{what}[{i}] has no positive_prompts, which gate_mode={config.gate_mode!r} needs; only "
          "random and uniform_random go without"
        )
  prompts = {(e.positive_prompts, e.negative_prompts) for e in config.experts}
  if len(prompts) == 1 < len(config.experts):
    raise ValueError("all experts have the same prompts: no token could be told whose it is")


def _experts(document: Mapping[str, Any], key: str) -> tuple[Expert, ...]:
  entries = document.get(key) or []
  if not isinstance(entries, list) or (key == "experts" and not entries):
    raise ValueError(f"{key} must be a list of at least one expert")
  return tuple(_expert(entry, f"{key}[{i}]") for i, entry in enumerate(entries))


def _expert(entry: Any, where: str) -> Expert:
  if not isinstance(entry, Mapping):
    raise ValueError(f"{where} must be a mapping with a source_model, not {entry!r}")
  mergekit_config.known(entry, _EXPERT, where)
  return Expert(
    _text(entry, "source_model", where),
    _prompts(entry, "positive_prompts", where),
    _prompts(entry, "negative_prompts", where),
    _number(entry, "noise_scale", where),
    _number(entry, "residual_scale", where),
  )


def _prompts(entry: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
  given = entry.get(key) or []
  if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
    raise ValueError(f"{where}.{key} must be a list of texts, not {given!r}")
  return tuple(given)


def _number(entry: Mapping[str, Any], key: str, where: str) -> float | None:
  value = entry.get(key)
  if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
    raise ValueError(f"{where}.{key}={value!r} must be a number")
  return None if value is None else float(value)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
  value = entry.get(key)
  if not isinstance(value, str) or not value:
    raise ValueError(f"{where}: {key} is {value!r}; it must be a directory, or directory+adapter")
  return value
