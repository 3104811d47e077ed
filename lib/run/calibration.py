# SPDX-License-Identifier: Apache-2.0
"""Turn calibration data into token batches of one shape.

A file is UTF-8 text, one document; JSON lines, a document each; or token ids (.npy, .npz). By
default documents are packed: joined, each followed by the end-of-text token, and cut into rows of
equal length, so that every position holds a token and all rows have one shape. A row may then begin
within a document and hold several, which see each other. `rows="documents"` gives each document a
row of its own, cut at the length, and a mask over the padding, which no statistic sees.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treesurgeon.io import tokenizer as tokenizers

ROWS = ("pack", "documents")
TOKENS = (".npy", ".npz")
LINES = (".jsonl", ".ndjson")
_FIELDS, _ARRAYS = ("text", "messages"), ("tokens", "input_ids")

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def read(
  path: str | Path, *, field: str | None = None, render: Render | None = None
) -> list[str] | np.ndarray:
  r"""Read calibration data from a file, whose kind its suffix tells.

  Args:
    path: .jsonl or .ndjson; .npy or .npz, with one array or one named "tokens" or "input_ids"; or
      UTF-8 text under any other name.
    field: of JSON lines, where the text or the messages are; None takes "text", or "messages".
    render: turns a conversation into text; None if the model has no chat template.

  Returns:
    Documents; or token ids, a stream (n,) or rows (n, length).

  Raises:
    ValueError: naming the file, and the line of a file of JSON lines.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   _ = Path(root, "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    ...   read(f"{root}/a.jsonl")
    ['one', 'two']
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file")
  if path.suffix in TOKENS:
    return _read_tokens(path)
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text: {error}") from error
  if path.suffix not in LINES:
    return [text]
  lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
  documents = [_document(f"{path}:{i}", line, field, render) for i, line in lines]
  if not documents:
    raise ValueError(f"{path} holds no document")
  return documents


def batches(
  data: str | Sequence[str] | np.ndarray,
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  samples: int,
  batch: int,
  vocab_size: int,
  rows: str = "pack",
  source: str = "the calibration text",
) -> list[Any]:
  """Cut calibration data into sequences, spread evenly over it.

  Of many documents only as many are tokenized as are needed, spread evenly too.

  Args:
    data: a text; documents; or token ids. Ids in rows are cut at the length, not joined.
    tokenizer: of the model.
    length: tokens a sequence.
    samples: sequences wanted; fewer are returned if the data have fewer.
    batch: sequences a batch; the last batch may be smaller.
    vocab_size: the model's vocabulary.
    rows: "pack" or "documents", see above.
    source: what to call the data in messages.

  Returns:
    Arrays (batch, length) int32; of documents mappings with "tokens" and "mask" of one width, that
    of the longest.

  Raises:
    ValueError: if the data are shorter than one sequence or have tokens that the model lacks.

  Example:
    >>> cut = batches("abcdefgh", tokenizers.ByteTokenizer(), length=3, samples=9, batch=1,
    ...               vocab_size=256)
    >>> [b.tolist() for b in cut]
    [[[97, 98, 99]], [[100, 101, 102]]]
    >>> whole = batches(["ab", "c"], tokenizers.ByteTokenizer(), length=3, samples=9, batch=2,
    ...                 vocab_size=257, rows="documents")
    >>> whole[0]["tokens"].tolist(), whole[0]["mask"].tolist()
    ([[97, 98], [99, 256]], [[1, 1], [1, 0]])
  """
  if rows not in ROWS:
    raise ValueError(f"rows={rows!r}: valid are {', '.join(ROWS)}")
  documents = [data] if isinstance(data, str) else data
  end = tokenizer.eos_id if tokenizer.eos_id is not None and tokenizer.eos_id < vocab_size else None
  if isinstance(documents, np.ndarray):
    if rows == "documents":
      raise ValueError(f"{source} holds tokens, which come in rows already; rows must be 'pack'")
    _check(documents, vocab_size, source)
    ids = documents.astype(np.int32)
    cut = ids[:, :length] if ids.ndim == 2 else _rows(ids, length, source)
    return _dealt(_even(cut, samples), batch)
  encoded = _encode(documents, tokenizer, vocab_size, source)
  if rows == "documents":
    some = dict(itertools.islice(((i, x[:length]) for i, x in encoded if len(x)), samples))
    if not some:
      raise ValueError(f"{source} has 0 tokens")
    tokens, mask = _padded([some[i] for i in sorted(some)], 0 if end is None else end)
    return _dealt(tokens, batch, mask)
  found: dict[int, np.ndarray] = {}
  tail = np.asarray([end] if len(documents) > 1 and end is not None else [], np.int32)
  missing = samples * length
  for i, ids in encoded:
    found[i] = np.concatenate([ids, tail])
    missing -= len(found[i])
    if missing <= 0:
      break
  stream = np.concatenate([found[i] for i in sorted(found)])
  return _dealt(_even(_rows(stream, length, source), samples), batch)


def _read_tokens(path: Path) -> np.ndarray:
  try:
    held = np.load(path, allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    raise ValueError(f"{path} is not a numpy file of token ids: {error}") from error
  if isinstance(held, np.lib.npyio.NpzFile):
    names = held.files if len(held.files) == 1 else [n for n in _ARRAYS if n in held.files]
    if not names:
      raise ValueError(
        f"{path} holds {', '.join(held.files) or 'nothing'}; token ids go by the name of "
        f"{' or '.join(_ARRAYS)}"
      )
    held = held[names[0]]
  if not np.issubdtype(held.dtype, np.integer) or held.ndim not in (1, 2):
    raise ValueError(
      f"{path} holds {held.dtype.name} of shape {held.shape}; valid are integers, a stream (n,) or "
      "rows (n, length)"
    )
  if not held.size:
    raise ValueError(f"{path} holds no token")
  return held


def _document(where: str, line: str, field: str | None, render: Render | None) -> str:
  """Read one JSON line."""
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON: {error}") from error
  if not isinstance(entry, Mapping):
    raise ValueError(f"{where}: {line[:40]!r} is not a JSON object with a text or messages")
  name = next((n for n in ((field,) if field else _FIELDS) if n in entry), None)
  if name is None:
    wanted = repr(field) if field else " or ".join(map(repr, _FIELDS))
    raise ValueError(f"{where}: no field {wanted}; it has {', '.join(entry) or 'none'}")
  value = entry[name]
  if isinstance(value, str):
    return value
  if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
    raise ValueError(f"{where}: {name!r} is neither a text nor a list of messages")
  if render is None:
    raise ValueError(
      f"{where}: {name!r} holds messages, and the model has no chat template to write them out"
    )
  try:
    return render(value)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _encode(
  documents: Sequence[str], tokenizer: tokenizers.Tokenizer, vocab_size: int, source: str
) -> Iterator[tuple[int, np.ndarray]]:
  """Tokenize documents, in an order in which those so far are always spread over all."""
  bits = max(1, (len(documents) - 1).bit_length())
  order = sorted(range(len(documents)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
  for i in order:
    ids = np.asarray(tokenizer.encode(documents[i]), np.int32)
    _check(ids, vocab_size, source)
    yield i, ids


def _check(ids: np.ndarray, vocab_size: int, source: str) -> None:
  for value in (ids.max(), ids.min()) if ids.size else ():
    if not 0 <= value < vocab_size:
      raise ValueError(
        f"{source} has the token {value}, the model's vocabulary ends at {vocab_size - 1}; "
        "the tokens belong to another model"
      )


def _rows(ids: np.ndarray, length: int, source: str) -> np.ndarray:
  if len(ids) < length:
    raise ValueError(
      f"{source} has {len(ids)} tokens, fewer than one sequence of {length}; "
      "give a longer text or a smaller calibration length"
    )
  return ids[: len(ids) // length * length].reshape(-1, length)


def _even(rows: np.ndarray, samples: int) -> np.ndarray:
  """Keep rows that are spread evenly over all."""
  last = len(rows) - 1
  return rows[np.unique(np.linspace(0, last, min(samples, len(rows))).astype(int))]


def _padded(rows: list[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
  """Lay rows of several lengths out in one array; the padding comes last."""
  shape = len(rows), max(map(len, rows))
  tokens, mask = np.full(shape, fill, np.int32), np.zeros(shape, np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, 1
  return tokens, mask


def _dealt(rows: np.ndarray, batch: int, mask: np.ndarray | None = None) -> list[Any]:
  parts = [slice(i, i + batch) for i in range(0, len(rows), batch)]
  return [rows[p] if mask is None else {"tokens": rows[p], "mask": mask[p]} for p in parts]
