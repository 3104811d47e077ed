# SPDX-License-Identifier: Apache-2.0
"""The tokenizer files of several models: read, joined, written.

Works on tokenizer.json and tokenizer_config.json through the `tokenizers` library, without
`transformers`. Of a joined tokenizer the base keeps its ids, its splitting and its templates; what
the others add comes after, in the order of the models and of their ids (mergekit takes the others'
tokens in the order of a hash table, so that its ids differ from run to run).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from treesurgeon.io import checkpoint, tokenizer

CONFIG, TEMPLATE, SPECIAL = (
  "tokenizer_config.json",
  "chat_template.jinja",
  "special_tokens_map.json",
)
# Every file that a tokenizer may be spread over; a joined one is written anew.
PATTERNS = (
  "tokenizer*", "vocab.*", "merges.txt", SPECIAL, "added_tokens.json", "chat_template*",
  "spiece.model",
)  # fmt: skip


class Words(NamedTuple):
  """A model's vocabulary.

  Attributes:
    directory: the model.
    ids: token to id, those of added tokens included.
    added: the tokens that were added to the trained vocabulary, by id.
    rows: rows of the model's embedding, as config.json says; None if it does not.
  """

  directory: Path
  ids: Mapping[str, int]
  added: Mapping[int, tokenizers.AddedToken]
  rows: int | None

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """Read the tokenizer itself, every token included."""
    return tokenizers.Tokenizer.from_file(str(self.directory / tokenizer.FILE))

  def holds(self, i: int) -> bool:
    """Tell whether the model has an embedding for an id."""
    return self.rows is None or i < self.rows


def read(directory: str | Path) -> Words | None:
  """Read a model's vocabulary.

  Args:
    directory: holds tokenizer.json and config.json.

  Returns:
    The vocabulary, or None if there is no tokenizer at all.

  Raises:
    ValueError: for a damaged file, or a tokenizer that only its own library reads.
  """
  loaded = tokenizer.load(directory)
  if not isinstance(loaded, tokenizer.JsonTokenizer):
    return None
  inner, path = loaded.inner, Path(directory)
  ids = inner.get_vocab(with_added_tokens=True)
  rows = None
  if (path / checkpoint.CONFIG).is_file():
    rows = vocab_size(checkpoint.read_json(path / checkpoint.CONFIG))
  ids = dict(sorted(ids.items(), key=lambda item: item[1]))
  return Words(path, ids, inner.get_added_tokens_decoder(), rows)


def vocab_size(config: Mapping[str, Any]) -> int | None:
  """Find the number of embedding rows in a config.json.

  Args:
    config: its content.

  Returns:
    `vocab_size`, that of `text_config` in models of several modules, or None.

  Example:
    >>> vocab_size({"text_config": {"vocab_size": 7}})
    7
  """
  inner = config.get("text_config")
  holders = [config, inner] if isinstance(inner, Mapping) else [config]
  return next((h["vocab_size"] for h in holders if isinstance(h.get("vocab_size"), int)), None)


def with_vocab_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
  """Put a number of embedding rows where a config.json has it.

  Args:
    config: its content.
    rows: the new number.

  Returns:
    A changed copy.

  Example:
    >>> with_vocab_size({"vocab_size": 5, "hidden_size": 8}, 7)
    {'vocab_size': 7, 'hidden_size': 8}
  """
  inner = config.get("text_config")
  if "vocab_size" not in config and isinstance(inner, Mapping):
    return {**config, "text_config": {**inner, "vocab_size": rows}}
  return {**config, "vocab_size": rows}


def stripped(words: Words) -> tokenizers.Tokenizer:
  """Read a tokenizer without the tokens for which the model has no embedding.

  Args:
    words: the model's vocabulary.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if tokens must go from a tokenizer that is not byte-pair encoding.
  """
  text = (words.directory / tokenizer.FILE).read_text(encoding="utf-8")
  extra = {t for t, i in words.ids.items() if not words.holds(i)}
  if extra:
    table = json.loads(text)
    inner = table["model"]
    if inner.get("type") != "BPE":
      raise ValueError(
        f"{words.directory}: the tokenizer knows {len(extra)} tokens more than the model's "
        f"{words.rows} rows, and only a BPE tokenizer can lose them; it is {inner.get('type')!r}"
      )
    table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] not in extra]
    inner["vocab"] = {t: i for t, i in inner["vocab"].items() if t not in extra}
    pairs = ((m, m.split(" ") if isinstance(m, str) else m) for m in inner["merges"])
    inner["merges"] = [m for m, (a, b) in pairs if not {a, b, a + b} & extra]
    text = json.dumps(table)
  return tokenizers.Tokenizer.from_str(text)


def join(base: Words, others: Iterable[Words]) -> tokenizers.Tokenizer:
  """Give a base's tokenizer every token that the others know.

  Args:
    base: whose ids are kept.
    others: the other models' vocabularies.

  Returns:
    A tokenizer; what is new in it is added tokens, matched before the text is split.
  """
  others = list(others)
  out = stripped(base)
  known = set(out.get_vocab(with_added_tokens=True))
  added: dict[str, tokenizers.AddedToken] = {}
  for words in (base, *others):
    for i, token in words.added.items():
      if words.holds(i):
        added.setdefault(token.content, token)
  plain = dict.fromkeys(t for w in others for t, i in w.ids.items() if w.holds(i))
  new = [tokenizers.AddedToken(t, special=False) for t in plain if t not in added]
  out.add_tokens([t for t in (*new, *added.values()) if t.content not in known])
  return out


def template(directory: Path) -> str | None:
  """Read a model's chat template.

  Args:
    directory: the model.

  Returns:
    The default template, or None.
  """
  if (directory / TEMPLATE).is_file():
    return (directory / TEMPLATE).read_text(encoding="utf-8")
  if not (directory / CONFIG).is_file():
    return None
  held = checkpoint.read_json(directory / CONFIG).get("chat_template")
  if isinstance(held, list):
    named = {t.get("name"): t.get("template") for t in held if isinstance(t, Mapping)}
    held = named.get("default")
  return held if isinstance(held, str) else None


def special(directory: Path, role: str) -> str:
  """Find a special token.

  Args:
    directory: the model.
    role: "bos_token" or another role of tokenizer_config.json.

  Returns:
    The token, or "".
  """
  for name in (CONFIG, SPECIAL):
    held = checkpoint.read_json(directory / name) if (directory / name).is_file() else {}
    token = held.get(role)
    token = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(token, str):
      return token
  return ""


def files(
  directory: Path, out: tokenizers.Tokenizer | None, chat_template: str | None
) -> dict[str, str]:
  """Write the text files of a tokenizer.

  Args:
    directory: the model whose settings and special tokens hold.
    out: the tokenizer; None leaves that of the directory, and only a template is put in.
    chat_template: the template; None keeps the directory's.

  Returns:
    File name to content.
  """
  found: dict[str, str] = {}
  held = checkpoint.read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
  if out is not None:
    found[tokenizer.FILE] = out.to_str(pretty=True)
    if (directory / SPECIAL).is_file():
      found[SPECIAL] = (directory / SPECIAL).read_text(encoding="utf-8")
    if "added_tokens_decoder" in held:
      decoder = out.get_added_tokens_decoder()
      held["added_tokens_decoder"] = {str(i): _settings(decoder[i]) for i in sorted(decoder)}
  shown = chat_template if chat_template is not None else template(directory)
  if shown is not None:
    found[TEMPLATE] = shown
  if chat_template is not None:
    held["chat_template"] = chat_template
  if held and (out is not None or chat_template is not None):
    found[CONFIG] = json.dumps(held, indent=2, ensure_ascii=False) + "\n"
  return found


def _settings(token: tokenizers.AddedToken) -> dict[str, Any]:
  names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
  return {name: getattr(token, name) for name in names}
