# SPDX-License-Identifier: Apache-2.0
"""One vocabulary for several models: mergekit's `tokenizer_source` and `tokenizer`.

`plan` decides on the tokens of the output, where every model finds each of them, and the output's
tokenizer files; `remapped.remap` brings the models' embeddings and heads into that order.

Follows mergekit 0.1.5. Differences: the ids of new tokens do not vary from run to run, and a token
beyond a model's embedding counts as missing there, where mergekit fails.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from treesurgeon.io import chat_templates, tokenizer_files

_TOKEN_KEYS, _SOURCE_KEYS = ("source", "force"), ("kind", "model", "token", "token_id")


@dataclasses.dataclass(frozen=True)
class Token:
  """Where the row of one token comes from.

  Attributes:
    model: donor; "" for a row of zeros.
    row: the donor's id; None is the id of the token itself.
    force: also replace the rows of models that have the token.
  """

  model: str = ""
  row: int | None = None
  force: bool = False


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """One vocabulary for several models.

  Attributes:
    ids: output token to id.
    size: rows of the output's embedding, padding included.
    rows: model to the id that each output id has there, -1 for none.
    tokens: what the configuration says of single tokens.
    files: tokenizer files of the output by name; all it needs.
    notes: what the user ought to know.
  """

  ids: Mapping[str, int]
  size: int
  rows: Mapping[str, np.ndarray]
  tokens: Mapping[str, Token]
  files: Mapping[str, str]
  notes: tuple[str, ...] = ()


def plan(
  directories: Mapping[str, str | Path],
  *,
  base: str | None = None,
  source: str = "union",
  tokens: Mapping[str, Any] | None = None,
  pad_to_multiple_of: int | None = None,
  chat_template: str | None = None,
) -> Vocabulary:
  """Decide on one vocabulary for several models.

  Args:
    directories: each model's name in the configuration to its directory (with tokenizer.json).
    base: the base model's name; None takes the first.
    source: "union", "base", or a model: one of the names, or a directory.
    tokens: token to {"source", "force"}, as mergekit's `tokenizer.tokens`.
    pad_to_multiple_of: round the number of rows up to a multiple of this.
    chat_template: as `chat_templates.resolve` takes it; None keeps that of the tokenizer.

  Returns:
    The vocabulary.

  Raises:
    ValueError: for a base without a tokenizer, an unknown key or model, or a bad value.
  """
  base = next(iter(directories)) if base is None else base
  if pad_to_multiple_of is not None and (
    not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1
  ):
    raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r} must be an integer of 1 or more")
  read = {name: tokenizer_files.read(d) for name, d in directories.items()}
  first = read.get(base)
  if first is None:
    raise ValueError(f"{directories[base]}: no tokenizer.json; a tokenizer is made from the base's")
  lacking = [name for name, words in read.items() if words is None]
  notes = tuple(f"{name} has no tokenizer.json: taken to have that of {base}" for name in lacking)
  words = {name: found or first for name, found in read.items()}
  others = [w for name, w in words.items() if name != base and name not in lacking]
  home = first.directory
  if source == "union":
    out = tokenizer_files.join(first, others)
  elif source == "base":
    out = tokenizer_files.stripped(first)
  else:
    home = Path(directories.get(source, source))
    given = words.get(source) or (tokenizer_files.read(home) if home.is_dir() else None)
    if given is None:
      raise ValueError(
        f"tokenizer source {source!r} has no tokenizer.json; valid are union, base, or a model: "
        f"{', '.join(directories)}"
      )
    out = given.tokenizer
  settings = {t: _token(t, v, words) for t, v in (tokens or {}).items()}
  known = out.get_vocab(with_added_tokens=True)
  out.add_tokens([tokenizers.AddedToken(t, special=False) for t in settings if t not in known])
  ids = dict(sorted(out.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))
  size = max(ids.values()) + 1
  rows = {name: _rows(ids, w) for name, w in words.items()}
  nowhere = [
    t for t, i in ids.items() if t not in settings and all(r[i] < 0 for r in rows.values())
  ]
  if nowhere:
    notes += (f"{len(nowhere)} tokens such as {nowhere[0]!r} are in no model: their rows are zero",)
  step = pad_to_multiple_of or 1
  template = chat_template
  if template is not None:
    held = [
      tokenizer_files.template(Path(directories[n])) for n in dict.fromkeys((base, *directories))
    ]
    template = chat_templates.resolve(template, held)
  return Vocabulary(
    ids=ids,
    size=-(-size // step) * step,
    rows=rows,
    tokens=settings,
    files=tokenizer_files.files(home, out, template),
    notes=notes,
  )


def _rows(ids: Mapping[str, int], words: tokenizer_files.Words) -> np.ndarray:
  """Find a model's id for every output id."""
  out = np.full(max(ids.values()) + 1, -1, np.int64)
  for token, i in ids.items():
    row = words.ids.get(token, -1)
    out[i] = row if words.holds(row) else -1
  return out


def _token(token: str, value: Any, models: Mapping[str, tokenizer_files.Words]) -> Token:
  """Read one entry of `tokenizer.tokens`."""
  where = f"tokenizer.tokens[{token!r}]"
  _check_keys(where, value, _TOKEN_KEYS)
  source, force = value.get("source"), value.get("force", False)
  if not isinstance(force, bool):
    raise ValueError(f"{where}.force is {force!r}; it must be true or false")
  if isinstance(source, str):
    return Token(_member(where, source, models), force=force)
  _check_keys(f"{where}.source", source, _SOURCE_KEYS)
  if source.get("kind") == "zero":
    return Token(force=force)
  if source.get("kind") != "model_token":
    raise ValueError(f"{where}.source.kind is {source.get('kind')!r}; valid: zero, model_token")
  model = _member(where, source.get("model"), models)
  word, row = source.get("token"), source.get("token_id")
  if (word is None) == (row is None):
    raise ValueError(f"{where}.source must give either token or token_id")
  if word is not None and word not in models[model].ids:
    near = ", ".join(difflib.get_close_matches(word, models[model].ids, n=3))
    raise ValueError(
      f"{where}: {model} has no token {word!r}" + (f"; it has {near}" if near else "")
    )
  row = models[model].ids[word] if word is not None else row
  if isinstance(row, bool) or not isinstance(row, int) or row < 0:
    raise ValueError(f"{where}.source.token_id is {row!r}; it must be an integer of 0 or more")
  return Token(model, row, force)


def _member(where: str, name: Any, models: Mapping[str, Any]) -> str:
  if name not in models:
    raise ValueError(f"{where}: {name!r} is not a model of this merge: {', '.join(models)}")
  return name


def _check_keys(where: str, value: Any, keys: tuple[str, ...]) -> None:
  if not isinstance(value, Mapping):
    raise ValueError(f"{where} must be a mapping with {', '.join(keys)}; got {value!r}")
  for key in value:
    if key not in keys:
      raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(keys)}")
