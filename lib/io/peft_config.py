# SPDX-License-Identifier: Apache-2.0
r"""The `adapter_config.json` of a LoRA adapter: read strictly, written in order.

Patterns are regular expressions over module paths, `(.*\.)?(key)$`; the first that matches gives
the rank or the alpha. A setting that changes what the adapter computes and is not supported here
is refused by name, one that this file does not know is refused unless it is off.
"""

import collections
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SUPPORTED = "plain LoRA and rsLoRA, with rank and alpha patterns"
# Initializations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract something from it, or (MiCA) train under another rule.
INITS = (True, False, "gaussian", "eva", "orthogonal")
# Settings that add to what a plain adapter computes, for callers that can read them.
EXTRAS = ("bias", "lora_bias", "modules_to_save", "use_dora")
# Settings of training or of where the adapter goes, which the tensors in the file have settled.
_SETTLED = frozenset({
  "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
  "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
  "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
  "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
  "task_type", "use_rslora",
})  # fmt: skip


class Config(NamedTuple):
  """What of a config bears on the adapter's value.

  Attributes:
    r, alpha: the defaults.
    rank_pattern, alpha_pattern: regular expression over modules to value.
    rslora: scale by alpha / sqrt(r).
    fan_in_fan_out: whether the weights that carry adapters are kept as (in, out), as GPT-2's are.
    extras: what there is beyond plain LoRA, of `EXTRAS`.
  """

  r: int
  alpha: int | float
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, int | float]
  rslora: bool
  fan_in_fan_out: bool = False
  extras: frozenset[str] = frozenset()

  def ranks(self, module: str) -> tuple[int, ...]:
    """List the ranks a module may have, the likeliest first.

    peft takes the first key that matches, but sorts the keys when it writes them, so of
    overlapping keys any may have been the first; the tensors tell.
    """
    return (*_matches(self.rank_pattern, module), self.r)

  def scale(self, module: str, rank: int) -> float:
    """Return the multiplier of a module's product."""
    alpha = (*_matches(self.alpha_pattern, module), self.alpha)[0]
    return scaling(rank, alpha, rslora=self.rslora)


def read(path: Path, *, extras: Collection[str] = ()) -> Config:
  """Read a config and refuse what is not plain LoRA.

  Args:
    path: `adapter_config.json`.
    extras: settings of `EXTRAS` that the caller knows how to read.

  Returns:
    The config.

  Raises:
    ValueError: naming the setting, its value and what is supported.
  """
  if not path.is_file():
    raise ValueError(f"{path}: no such file; a peft adapter is a directory that has one")
  try:
    table = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(table, dict):
    raise ValueError(f"{path}: expected a JSON object; got {type(table).__name__}")
  if table.get("peft_type") != "LORA":
    raise ValueError(f"{path}: peft_type is {table.get('peft_type')!r}; supported: {SUPPORTED}")
  init = table.get("init_lora_weights", True)
  if init not in INITS:
    raise ValueError(
      f"{path}: init_lora_weights={init!r} adapts a changed base, so it is not plain LoRA on the "
      "model's weights; convert it with peft's path_initial_model_for_weight_conversion"
    )
  for name, value in table.items():
    off = value in (None, False, "none") or value in ([], {}, "")
    if name not in _SETTLED and not off and name not in extras:
      more = "".join(f", {extra}" for extra in sorted(extras))
      raise ValueError(f"{path}: {name}={value!r} is not supported; supported: {SUPPORTED}{more}")
  rank_pattern, alpha_pattern = (table.get(f"{n}_pattern") or {} for n in ("rank", "alpha"))
  config = Config(
    table.get("r", 8),
    table.get("lora_alpha", 8),
    rank_pattern,
    alpha_pattern,
    bool(table.get("use_rslora", False)),
    bool(table.get("fan_in_fan_out", False)),
    frozenset(e for e in extras if table.get(e) not in (None, False, "none", [])),
  )
  _check(path, config)
  return config


def build(
  modules: Mapping[str, tuple[int, float]],
  *,
  every: Collection[str],
  rslora: bool,
  base_model: str,
  conv: bool,
  decoder: bool,
) -> dict[str, Any]:
  """Describe adapters as peft's config does.

  Args:
    modules: module path to (rank, scale).
    every: paths of all the network's modules; they settle whether short names will do.
    rslora: whether alpha is divided by the square root of the rank.
    base_model: where the base model is, or "".
    conv: whether the modules are GPT-2's Conv1D.
    decoder: whether the network is a causal language model.

  Returns:
    A JSON object; lists and patterns are sorted.

  Example:
    >>> config = build({"a.q": (2, 1.0), "a.k": (2, 1.0), "a.v": (4, 1.0)}, every=("a.k", "a.q"),
    ...                rslora=False, base_model="", conv=False, decoder=True)
    >>> config["r"], config["rank_pattern"], config["alpha_pattern"], config["target_modules"]
    (2, {'a.v': 4}, {'a.v': 4}, ['a.k', 'a.q', 'a.v'])
  """
  names = sorted(modules)
  ranks = {m: modules[m][0] for m in names}
  alphas = {m: _alpha(*modules[m], rslora=rslora) for m in names}
  r = collections.Counter(ranks.values()).most_common(1)[0][0]
  short = sorted({m.rpartition(".")[2] for m in names})
  matched = {m for m in every if m.rpartition(".")[2] in short}
  alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
  return {
    "alpha_pattern": {m: v for m, v in alphas.items() if v != alpha},
    "base_model_name_or_path": base_model or None,
    "bias": "none",
    "fan_in_fan_out": conv,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": r,
    "rank_pattern": {m: v for m, v in ranks.items() if v != r},
    "target_modules": short if matched == set(names) else names,
    "task_type": "CAUSAL_LM" if decoder else None,
    "use_dora": False,
    "use_rslora": rslora,
  }


def scaling(rank: int, alpha: int | float, *, rslora: bool = False) -> float:
  """Compute the multiplier of an adapter's product.

  Args:
    rank: inner dimension.
    alpha: numerator.
    rslora: divide by the square root of the rank.

  Returns:
    alpha / rank, or alpha / sqrt(rank).

  Example:
    >>> scaling(4, 16.0), scaling(4, 16.0, rslora=True)
    (4.0, 8.0)
  """
  return float(alpha / (math.sqrt(rank) if rslora else rank))


def _matches(pattern: Mapping[str, Any], module: str) -> list[Any]:
  return [v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]


def _alpha(rank: int, scale: float, *, rslora: bool) -> int | float:
  """Find the alpha, an integer if it can be one, whose scale is this one to the last bit."""
  alpha = scale * (math.sqrt(rank) if rslora else rank)
  near = (round(alpha), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
  return next((x for x in near if scaling(rank, x, rslora=rslora) == scale), alpha)


def _check(path: Path, config: Config) -> None:
  for name, default, pattern, kinds in (
    ("r", config.r, config.rank_pattern, int),
    ("lora_alpha", config.alpha, config.alpha_pattern, int | float),
  ):
    if not isinstance(pattern, dict):
      raise ValueError(f"{path}: the pattern of {name} must be an object; got {pattern!r}")
    for key, value in {name: default, **pattern}.items():
      if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        kind = "integer" if kinds is int else "number"
        raise ValueError(f"{path}: {key}={value!r} must be a positive {kind}")
      try:
        re.compile(key)
      except re.error as error:
        raise ValueError(f"{path}: {key!r} is not a regular expression: {error}") from error
