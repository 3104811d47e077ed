# SPDX-License-Identifier: Apache-2.0
"""Edit requests: what to change, and what the change is judged by.

Records are read as CounterFact writes them (Meng et al. 2022, arXiv:2202.05262), with three keys
more for what that benchmark does not test.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from treesurgeon.edit import tokens

ESSENCE = ("{} is a",)


@dataclasses.dataclass(frozen=True)
class EditRequest:
  """Ask that a prompt about a subject be answered by another object.

  Attributes:
    prompt: text with one `{}` for the subject, up to where the object begins.
    subject: what stands for `{}`.
    target_new: the object wanted.
    target_true: the object so far, for evaluation.
    paraphrases: prompts that should now give the new object.
    neighbours: prompts about other subjects that should still give `target_true`.
    others: (prompt, answer) about the same subject that should stay.
    shared: (prompt, answer) about subjects that share a part of the name.
    essence: prompts with `{}` whose distribution the edit tries to keep.
  """

  prompt: str
  subject: str
  target_new: str
  target_true: str = ""
  paraphrases: tuple[str, ...] = ()
  neighbours: tuple[str, ...] = ()
  others: tuple[tuple[str, str], ...] = ()
  shared: tuple[tuple[str, str], ...] = ()
  essence: tuple[str, ...] = ESSENCE

  def __post_init__(self):
    if self.prompt.count("{}") != 1:
      raise ValueError(f"prompt {self.prompt!r} must hold '{{}}' once, where the subject stands")
    for name in ("subject", "target_new"):
      if not getattr(self, name).strip():
        raise ValueError(f"the request {self.prompt!r} has an empty {name}")
    for essence in self.essence:
      if essence.count("{}") != 1:
        raise ValueError(f"essence prompt {essence!r} must hold '{{}}' once")

  @property
  def text(self) -> str:
    """The prompt with its subject."""
    return self.prompt.format(self.subject)


def read(
  path: str | pathlib.Path, tokenizer: Any, *, separator: str = "."
) -> list[tokens.Tokenized]:
  """Read and tokenize a JSON file of requests.

  Args:
    path: a JSON list of records, see `from_record`.
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.
    separator: text between a random context and a prompt; "" for none.

  Returns:
    The requests in order.

  Raises:
    ValueError: naming the file, the record's number and what is wrong with it.

  Example:
    >>> read("missing.json", None)
    Traceback (most recent call last):
      ...
    ValueError: missing.json: cannot read edit requests: No such file or directory
  """
  try:
    records = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(f"{path}: cannot read edit requests: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{path}: edit requests are not JSON: {error}") from error
  if not isinstance(records, list):
    raise ValueError(f"{path}: edit requests must be a JSON list, not {type(records).__name__}")
  out = []
  for i, record in enumerate(records):
    try:
      out.append(tokenize(from_record(record), tokenizer, separator=separator))
    except ValueError as error:
      raise ValueError(f"{path}: request {i}: {error}") from error
  return out


def from_record(record: Any) -> EditRequest:
  """Read one request, in CounterFact's nesting or flat.

  Args:
    record: `requested_rewrite` with `prompt`, `subject`, `target_new` and `target_true` (texts, or
      {"str": text}), `paraphrase_prompts`, `neighborhood_prompts`, and beyond CounterFact
      `other_prompts` and `shared_name_prompts` ({"prompt", "answer"} each) and `essence_prompts`;
      or the four texts directly.

  Returns:
    The request.

  Raises:
    ValueError: for a record without prompt, subject or target_new.

  Example:
    >>> from_record({"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "France"}}).text
    'Rome is in'
  """
  if not isinstance(record, Mapping):
    raise ValueError(f"a request must be an object, not {type(record).__name__}")
  inner = record.get("requested_rewrite", record)
  missing = [k for k in ("prompt", "subject", "target_new") if k not in inner]
  if missing:
    raise ValueError(f"lacks {missing[0]!r}; a request has prompt, subject and target_new")

  def text(name: str) -> str:
    value = inner.get(name, "")
    return value.get("str", "") if isinstance(value, Mapping) else value

  def pairs(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((p["prompt"], p["answer"]) for p in record.get(name, ()))

  return EditRequest(
    prompt=inner["prompt"],
    subject=inner["subject"],
    target_new=text("target_new").strip(),
    target_true=text("target_true").strip(),
    paraphrases=tuple(record.get("paraphrase_prompts", ())),
    neighbours=tuple(record.get("neighborhood_prompts", ())),
    others=pairs("other_prompts"),
    shared=pairs("shared_name_prompts"),
    essence=tuple(record.get("essence_prompts", ESSENCE)),
  )


def tokenize(request: EditRequest, tokenizer: Any, *, separator: str = ".") -> tokens.Tokenized:
  """Turn a request into ids.

  Args:
    request: the request.
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.
    separator: text between a random context and the prompt; "" for none.

  Returns:
    The ids, with the subject's last token located.

  Raises:
    ValueError: for a word outside the vocabulary, or a prompt and object that share a token.

  Example:
    >>> import tokenizers
    >>> words = {"[UNK]": 0, "Ann": 1, "is": 2, "a": 3, "in": 4, "Rome": 5, ".": 6}
    >>> t = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    >>> t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> tokenize(EditRequest("{} is in", "Ann", "Rome"), t).prompt.ids
    (1, 2, 4)
  """
  prompt, new = tokens.continuation(tokenizer, request.text, request.target_new)
  essence = []
  for template in request.essence:
    ids = tokens.encode(tokenizer, template.format(request.subject))
    essence.append(tokens.Prompt(ids, *tokens.locate(tokenizer, template, request.subject)))
  return tokens.Tokenized(
    lead=tokens.lead(tokenizer),
    prompt=tokens.Prompt(prompt, *tokens.locate(tokenizer, request.prompt, request.subject)),
    new=new,
    essence=tuple(essence),
    separator=tokens.encode(tokenizer, separator) if separator else (),
    label=f"{request.text} -> {request.target_new}",
  )
