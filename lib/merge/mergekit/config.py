# SPDX-License-Identifier: Apache-2.0
"""The grammar of a mergekit configuration: every key known, every value of its type.

mergekit's own reader passes over keys that it does not know; here each is an error that names the
nearest valid one, so that a misspelt parameter cannot silently take its default.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
_TOP = (
  "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
  "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
_FORMS = ("models", "slices", "modules")
Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Input:
  """One model in a slice.

  Attributes:
    model: as the file spells it: a directory, `directory+adapter`, or an earlier merge's name.
    layers: (first, one past the last) layer; None for all.
    parameters: its own parameters.
  """

  model: str
  layers: tuple[int, int] | None = None
  parameters: Parameters = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A run of the output's layers.

  Attributes:
    inputs: the models it is merged from.
    base: the base model in this slice; None takes the configuration's.
    parameters: of all its inputs.
    where: its place in the file, for messages.
  """

  inputs: tuple[Input, ...]
  base: str | None = None
  parameters: Parameters = dataclasses.field(default_factory=dict)
  where: str = "models"


@dataclasses.dataclass(frozen=True)
class Module:
  """One tower of the output: its slices in order, and parameters of them all."""

  slices: tuple[Slice, ...]
  parameters: Parameters = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
  """One merge.

  Attributes:
    method: mergekit's name, or one of our registry's.
    modules: module's name to what it is made of; the name "" stands for the whole model.
    form: which of "models", "slices" and "modules" the file uses.
    base: the base model, or None.
    parameters: of all models.
    dtype: what inputs are cast to, or None.
    out_dtype: what the output is cast to, or None.
    tokenizer: mergekit's `tokenizer` mapping; `tokenizer_source: x` is {"source": x}; or None.
    chat_template: as given, or None.
    name: of a merge that later ones refer to, or None.
    document: the file's content, as parsed.
  """

  method: str
  modules: Mapping[str, Module]
  form: str
  base: str | None = None
  parameters: Parameters = dataclasses.field(default_factory=dict)
  dtype: str | None = None
  out_dtype: str | None = None
  tokenizer: Mapping[str, Any] | None = None
  chat_template: str | None = None
  name: str | None = None
  document: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def slices(self) -> list[Slice]:
    """List the slices of all modules."""
    return [s for m in self.modules.values() for s in m.slices]

  def models(self) -> list[str]:
    """List the models, the base first, then in order of appearance."""
    named = [i.model for s in self.slices() for i in s.inputs]
    bases = [b for b in (self.base, *(s.base for s in self.slices())) if b is not None]
    return list(dict.fromkeys([*bases[:1], *named, *bases]))


def parse(document: Any) -> Config:
  """Check one parsed document.

  Args:
    document: what YAML makes of it.

  Returns:
    The merge.

  Raises:
    ValueError: for an unknown key (the nearest is named) or a value of a wrong type.

  Example:
    >>> parse({"merge_method": "linear", "models": [{"model": "a"}]}).models()
    ['a']
  """
  if not isinstance(document, Mapping):
    raise ValueError(f"the configuration must be a mapping, not {_short(document)}")
  known(document, _TOP, "the configuration")
  method = document.get("merge_method")
  if not isinstance(method, str):
    raise ValueError(f"merge_method={method!r} must be the name of a method")
  forms = [key for key in _FORMS if document.get(key)]
  if len(forms) != 1:
    given = " and ".join(map(repr, forms)) or "none"
    raise ValueError(f"exactly one of 'models', 'slices' and 'modules' is needed; {given} is given")
  (form,) = forms
  if form == "modules":
    modules = {
      str(name): _module(item, f"modules.{name}")
      for name, item in _mapping(document[form], form).items()
    }
  else:
    modules = {"": Module(_slices(document, form, ""))}
  if document.get("tokenizer_source") and document.get("tokenizer"):
    raise ValueError("'tokenizer_source' and 'tokenizer' exclude each other; give one")
  tokenizer = document.get("tokenizer")
  if document.get("tokenizer_source"):
    tokenizer = {"source": document["tokenizer_source"]}
  return Config(
    method=method,
    modules=modules,
    form=form,
    base=_model(document["base_model"], "base_model") if document.get("base_model") else None,
    parameters=_parameters(document, ""),
    dtype=_dtype(document, "dtype"),
    out_dtype=_dtype(document, "out_dtype"),
    tokenizer=None if tokenizer is None else _mapping(tokenizer, "tokenizer"),
    chat_template=_text(document, "chat_template"),
    name=_text(document, "name"),
    document=dict(document),
  )


def known(mapping: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
  """Refuse a key that is not among those known.

  Args:
    mapping: what the file says.
    keys: valid keys.
    where: for the message.

  Raises:
    ValueError: naming the key, and the nearest valid one.

  Example:
    >>> known({"model": "a"}, ("model",), "models[0]")
  """
  for key in mapping:
    if key not in keys:
      near = difflib.get_close_matches(str(key), keys, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys) or 'none'}"
      raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _module(item: Any, where: str) -> Module:
  item = _mapping(item, where)
  known(item, ("slices", "models", "parameters"), where)
  forms = [key for key in ("slices", "models") if item.get(key)]
  if len(forms) != 1:
    raise ValueError(f"{where}: exactly one of 'slices' and 'models' is needed")
  return Module(_slices(item, forms[0], f"{where}."), _parameters(item, where))


def _slices(item: Mapping[str, Any], form: str, prefix: str) -> tuple[Slice, ...]:
  where = f"{prefix}{form}"
  entries = item[form]
  if not isinstance(entries, list):
    raise ValueError(f"{where} must be a list, not {_short(entries)}")
  if form == "models":
    inputs = tuple(_input(e, f"{where}[{i}]", ranged=False) for i, e in enumerate(entries))
    return (Slice(inputs, where=where),)
  return tuple(_slice(entry, f"{where}[{i}]") for i, entry in enumerate(entries))


def _slice(entry: Any, where: str) -> Slice:
  entry = _mapping(entry, where)
  known(entry, ("sources", "base_model", "residual_weight", "parameters"), where)
  sources = entry.get("sources")
  if not isinstance(sources, list) or not sources:
    raise ValueError(f"{where}: 'sources' must be a list of at least one model")
  if entry.get("residual_weight") is not None:
    raise ValueError(f"{where}: 'residual_weight' has no effect in mergekit; leave it out")
  inputs = tuple(_input(s, f"{where}.sources[{i}]", ranged=True) for i, s in enumerate(sources))
  lengths = {i.layers[1] - i.layers[0] for i in inputs if i.layers is not None}
  if len(lengths) > 1:
    told = ", ".join(str(list(i.layers or ())) for i in inputs)
    raise ValueError(f"{where}: all sources must have the same number of layers, not {told}")
  base = entry.get("base_model")
  base = _model(base, f"{where}.base_model") if base else None
  return Slice(inputs, base, _parameters(entry, where), where)


def _input(entry: Any, where: str, *, ranged: bool) -> Input:
  entry = _mapping(entry, where)
  if entry.get("model") is None:
    raise ValueError(f"{where} must have a 'model'")
  known(entry, ("model", "parameters", *(("layer_range",) if ranged else ())), where)
  layers = None
  if ranged:
    given = entry.get("layer_range")
    whole = isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given)
    if not whole or not 0 <= given[0] <= given[1]:
      raise ValueError(f"{where}: layer_range={given!r} must be [first, one past the last layer]")
    layers = (given[0], given[1])
  return Input(_model(entry["model"], f"{where}.model"), layers, _parameters(entry, where))


def _model(value: Any, where: str) -> str:
  """Read a model's name; mergekit also takes a mapping with the parts spelt out."""
  if isinstance(value, Mapping):
    known(value, ("model", "lora", "path", "revision"), where)
    if "path" in value:
      revision = value.get("revision")
      return _model(value["path"], where) + (f"@{revision}" if revision else "")
    lora = value.get("lora")
    return _model(value.get("model"), where) + (f"+{_model(lora, where)}" if lora else "")
  if not isinstance(value, str) or not value:
    raise ValueError(f"{where} is {value!r}; it must be a directory, or directory+adapter")
  if value.count("+") > 1:
    raise ValueError(f"{where}={value!r}: at most one adapter can be added, like model+adapter")
  return value


def _parameters(item: Mapping[str, Any], where: str) -> Parameters:
  value = item.get("parameters")
  return {} if value is None else _mapping(value, f"{where}.parameters".lstrip("."))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise ValueError(f"{where} must be a mapping, not {_short(value)}")
  return value


def _text(document: Mapping[str, Any], key: str) -> str | None:
  value = document.get(key)
  if value is not None and not isinstance(value, str):
    raise ValueError(f"{key}={_short(value)} must be text")
  return value


def _dtype(document: Mapping[str, Any], key: str) -> str | None:
  value = document.get(key)
  if value is None:
    return None
  name = value.removeprefix("torch.") if isinstance(value, str) else value
  if name not in DTYPES:
    raise ValueError(f"{key}={value!r} is not supported; supported: {', '.join(DTYPES)}")
  return name


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:57]}..."
