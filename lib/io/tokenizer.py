# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: a directory's `tokenizer.json`, or bytes where there is none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers

from treesurgeon.io import checkpoint, safetensors

FILE = "tokenizer.json"
_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


@runtime_checkable  # tests check types as they run
class Tokenizer(Protocol):
  """What the rest of the package asks of a tokenizer."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    ...

  @property
  def eos_id(self) -> int | None:
    """The id that ends a text, if there is one."""
    ...

  def encode(self, text: str) -> np.ndarray:
    """Turn text into int32 ids, without special tokens."""
    ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Turn ids into text."""
    ...

  def save(self, directory: str | Path) -> None:
    """Write what `load` reads."""
    ...


class ByteTokenizer:
  """Map a text to its UTF-8 bytes; id 256 ends a text.

  Example:
    >>> ByteTokenizer().decode(ByteTokenizer().encode("héllo"))
    'héllo'
  """

  vocab_size = 257
  eos_id = 256

  def encode(self, text: str) -> np.ndarray:
    """Turn text into int32 ids.

    Args:
      text: any text.

    Returns:
      One id a UTF-8 byte.
    """
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Turn ids into text.

    Args:
      ids: ids below 257; the end of text is left out.

    Returns:
      The text, broken bytes replaced.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    check_ids(ids, self.vocab_size)
    return bytes(ids[ids < 256].astype(np.uint8)).decode(errors="replace")

  def save(self, directory: str | Path) -> None:
    """Write nothing: a directory without tokenizer.json is read as bytes."""
    del directory


class JsonTokenizer:
  """Use a `tokenizer.json` through the tokenizers library.

  Args:
    path: the file.
    eos: the token that ends a text; None looks for the usual ones.

  Raises:
    ValueError: if the file is not a tokenizer, or lacks `eos`.
  """

  def __init__(self, path: str | Path, *, eos: str | None = None):
    path = Path(path)
    try:
      self._inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
    vocabulary = self._inner.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise ValueError(f"{path}: the vocabulary is empty")
    self.vocab_size = max(vocabulary.values()) + 1
    if eos is not None and eos not in vocabulary:
      raise ValueError(f"{path}: the end-of-text token {eos!r} is not in the vocabulary")
    names = (eos,) if eos is not None else _EOS
    self.eos_id = next((vocabulary[t] for t in names if t in vocabulary), None)

  @property
  def inner(self) -> tokenizers.Tokenizer:
    """The library's tokenizer, for who needs the characters behind a token."""
    return self._inner

  def encode(self, text: str) -> np.ndarray:
    """Turn text into int32 ids, without special tokens.

    Args:
      text: any text.

    Returns:
      Token ids.
    """
    return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Turn ids into text.

    Args:
      ids: token ids.

    Returns:
      The text, special tokens left out.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    check_ids(ids, self.vocab_size)
    return self._inner.decode(ids.tolist())

  def save(self, directory: str | Path) -> None:
    """Write tokenizer.json.

    Args:
      directory: an existing directory.
    """
    self._inner.save(str(Path(directory) / FILE))


def load(directory: str | Path) -> Tokenizer:
  """Load a directory's tokenizer; without a `tokenizer.json`, bytes.

  Args:
    directory: a model directory.

  Returns:
    The tokenizer.

  Raises:
    ValueError: for a damaged file, or a tokenizer in a format that only its own library reads.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   load(root).vocab_size
    257
  """
  directory = safetensors.check_folder(directory)
  if (directory / FILE).is_file():
    config = directory / "tokenizer_config.json"
    eos: Any = checkpoint.read_json(config).get("eos_token") if config.is_file() else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return JsonTokenizer(directory / FILE, eos=eos)
  formats = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
  others = [n for n in formats if (directory / n).is_file()]
  if others:
    raise ValueError(
      f"{directory}: {others[0]} but no {FILE}; save the tokenizer with a fast tokenizer to get one"
    )
  return ByteTokenizer()


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str = "tokens") -> None:
  """Refuse token ids that a model has no embedding for.

  Args:
    ids: token ids.
    vocab_size: the model's.
    where: what they are, for the message.

  Raises:
    ValueError: naming the first bad id, its position, and the valid range.

  Example:
    >>> check_ids([0, 4], 5)
  """
  flat = np.asarray(ids).reshape(-1)
  bad = np.flatnonzero((flat < 0) | (flat >= vocab_size))
  if bad.size:
    raise ValueError(
      f"{where}: token id {int(flat[bad[0]])} at position {int(bad[0])} is out of vocabulary; "
      f"valid are 0 to {vocab_size - 1} ({bad.size} of {flat.size} are not): does the tokenizer "
      "belong to the model?"
    )
