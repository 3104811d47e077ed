# SPDX-License-Identifier: Apache-2.0
"""Token ids of prompts and what follows them, in arrays of one fixed shape.

The subject's last token, where rank-one edits read their key, is found through character offsets,
so that merged, prefixed or byte-level tokens do not matter.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers


class Prompt(NamedTuple):
  """Hold a prompt's ids and the places of its subject's first and last token."""

  ids: tuple[int, ...]
  first: int
  subject: int


@dataclasses.dataclass(frozen=True)
class Tokenized:
  """Hold a request's tokens, ready for an edit without a tokenizer.

  Attributes:
    lead: special tokens before every text, such as a beginning-of-sequence token.
    prompt: the prompt to answer anew.
    new: ids of the new object.
    essence: prompts whose distribution is to be kept.
    separator: ids between a random context and the prompt.
    label: what to call the request in reports.
  """

  lead: tuple[int, ...]
  prompt: Prompt
  new: tuple[int, ...]
  essence: tuple[Prompt, ...] = ()
  separator: tuple[int, ...] = ()
  label: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statements:
  """Hold prompts and their continuations as arrays of one shape, padded on the right.

  Attributes:
    ids: [n, length]; causal attention never looks at the padding.
    labels: [n, length] the id to predict at a place, -1 where nothing is asked.
    first: [n] place of the subject's first token.
    subject: [n] place of the subject's last token.
    last: [n] place of the prompt's last token.
  """

  ids: Any
  labels: Any
  first: Any
  subject: Any
  last: Any


def locate(tokenizer: Any, prompt: str, subject: str) -> tuple[int, int]:
  """Find the subject's tokens in a prompt.

  Args:
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.
    prompt: text with one `{}`.
    subject: the subject.

  Returns:
    (place of its first token, place of its last), special tokens not counted.

  Raises:
    ValueError: if no token covers the subject's last character.

  Example:
    >>> t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    >>> t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> locate(t, "the {} is", "old man")
    (1, 2)
  """
  start = prompt.index("{}")
  end = start + len(subject.rstrip())
  _, spans = _pieces(tokenizer, prompt.format(subject))
  covering = [i for i, (a, b) in enumerate(spans) if a < end <= b]
  if not covering:
    raise ValueError(f"the subject {subject!r} is not in the tokens of {prompt.format(subject)!r}")
  first = [i for i, (_, b) in enumerate(spans) if b > start]
  return first[0], covering[-1]


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
  """Encode a text without special tokens and refuse what the vocabulary lacks.

  Args:
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.
    text: not empty.

  Returns:
    The ids.

  Raises:
    ValueError: for an empty text or a word outside the vocabulary.

  Example:
    >>> t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    >>> encode(t, "b")
    Traceback (most recent call last):
      ...
    ValueError: 'b' in 'b' is not in the vocabulary
  """
  ids, spans = _pieces(tokenizer, text)
  unknown = _unknown(tokenizer)
  for i, (start, stop) in zip(ids, spans, strict=True):
    if i == unknown:
      raise ValueError(f"{text[start:stop]!r} in {text!r} is not in the vocabulary")
  if not ids:
    raise ValueError(f"{text!r} has no tokens")
  return tuple(ids)


def continuation(
  tokenizer: Any, prompt: str, target: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Encode a prompt and what follows it, together, so that spaces fall where they belong.

  Args:
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.
    prompt: text.
    target: what follows after a space.

  Returns:
    (ids of the prompt, ids of the target).

  Raises:
    ValueError: for an empty target, unknown words, or a token that spans the boundary.

  Example:
    >>> t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    >>> t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> continuation(t, "b b", "b")
    ((1, 1), (1,))
  """
  if not target.strip():
    raise ValueError(f"the target of {prompt!r} is empty")
  prompt = prompt.rstrip()
  before = encode(tokenizer, prompt)
  both = encode(tokenizer, f"{prompt} {target.strip()}")
  if both[: len(before)] != before or len(both) == len(before):
    raise ValueError(f"{target!r} shares a token with {prompt!r}; end the prompt at a word")
  return before, both[len(before) :]


def statements(
  rows: Sequence[tuple[Prompt, Sequence[int]]],
  *,
  before: Sequence[int] = (),
  length: int | None = None,
) -> Statements:
  """Lay out prompts and continuations in arrays.

  Args:
    rows: (prompt, ids that follow) each.
    before: ids put before every prompt.
    length: tokens a row; None takes the longest, rounded up to a multiple of 8.

  Returns:
    numpy arrays; a label stands one place before the token it names.

  Raises:
    ValueError: if a row does not fit.

  Example:
    >>> statements([(Prompt((5, 6), 0, 0), (7, 8))]).labels.tolist()
    [[-1, 7, 8, -1, -1, -1, -1, -1]]
  """
  fed = [(*before, *p.ids, *t[:-1]) for p, t in rows]
  longest = max(map(len, fed))
  length = -(-longest // 8) * 8 if length is None else length
  if longest > length:
    raise ValueError(f"a statement of {longest} tokens does not fit into {length}")
  ids = np.zeros((len(rows), length), np.int32)
  labels = np.full((len(rows), length), -1, np.int32)
  for i, (row, (prompt, target)) in enumerate(zip(fed, rows, strict=True)):
    ids[i, : len(row)] = row
    end = len(before) + len(prompt.ids) - 1
    labels[i, end : end + len(target)] = target
  places = [[p.first, p.subject, len(p.ids) - 1] for p, _ in rows]
  first, subject, last = (np.array(places, np.int32) + len(before)).T
  return Statements(ids, labels, first, subject, last)


def lead(tokenizer: Any) -> tuple[int, ...]:
  """Find the special tokens that a tokenizer puts first.

  Args:
    tokenizer: the model's, of `io.tokenizer` or of the tokenizers library.

  Returns:
    Their ids, often none or one.

  Example:
    >>> lead(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")))
    ()
  """
  inner = getattr(tokenizer, "inner", tokenizer)
  if not isinstance(inner, tokenizers.Tokenizer):
    return ()
  whole = inner.encode("a", add_special_tokens=True)
  marks = whole.special_tokens_mask
  count = marks.index(0) if 0 in marks else 0
  return tuple(whole.ids[:count])


def _pieces(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
  """Encode a text; return ids and the characters each stands for."""
  inner = getattr(tokenizer, "inner", tokenizer)
  if isinstance(inner, tokenizers.Tokenizer):
    encoding = inner.encode(text, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)
  spans = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]
  return [int(i) for i in tokenizer.encode(text)], spans  # bytes


def _unknown(tokenizer: Any) -> int | None:
  inner = getattr(tokenizer, "inner", tokenizer)
  token = getattr(getattr(inner, "model", None), "unk_token", None)
  return None if token is None else inner.token_to_id(token)
