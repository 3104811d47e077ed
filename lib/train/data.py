# SPDX-License-Identifier: Apache-2.0
"""Token batches: packing, shuffling, mixing, and an iterator that resumes exactly.

Documents are joined with an end-of-text token between and cut into rows of `length + 1` tokens
that overlap by one, so that every token is predicted exactly once. Rows are drawn by `grain`,
which computes the n-th batch from n and the seed: an iterator's state is a number, and with several
processes each computes its share of the same global batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np


def encode(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
  """Tokenize texts without adding special tokens.

  Args:
    texts: documents.
    tokenizer: a `tokenizers.Tokenizer`, or anything whose `encode(text)` returns ids.

  Returns:
    One int32 array a document.

  Example:
    >>> class Bytes:
    ...   def encode(self, text): return list(text.encode())
    >>> encode(["ab"], Bytes())[0].tolist()
    [97, 98]
  """
  if hasattr(tokenizer, "encode_batch"):
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
  else:
    found = [tokenizer.encode(text) for text in texts]
  return [np.asarray(getattr(f, "ids", f), np.int32) for f in found]


def pack(documents: Sequence[Any], *, length: int, eos: int) -> np.ndarray:
  """Join documents, each followed by `eos`, and cut the stream into rows.

  Args:
    documents: token ids, one sequence a document.
    length: tokens predicted in a row.
    eos: end-of-text token.

  Returns:
    int32 array (rows, length + 1); a row starts with the last token of the row before. What does
    not fill a row at the end is dropped.

  Raises:
    ValueError: if there are no documents or they do not fill one row.

  Example:
    >>> pack([[1, 2, 3], [4, 5]], length=3, eos=0).tolist()
    [[1, 2, 3, 0], [0, 4, 5, 0]]
  """
  if length < 1:
    raise ValueError(f"length must be at least 1 token; got {length}")
  parts = [np.append(np.asarray(d, np.int32), np.int32(eos)) for d in documents if len(d)]
  if not parts:
    raise ValueError(f"the text is empty: {len(documents)} documents hold no token")
  stream = np.concatenate(parts)
  rows = (len(stream) - 1) // length
  if rows < 1:
    raise ValueError(
      f"the text is shorter than one sequence: {len(stream)} tokens (end-of-text included), "
      f"length={length} needs {length + 1}; give more text or a length of at most {len(stream) - 1}"
    )
  windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)
  return np.ascontiguousarray(windows[: rows * length : length])


def rows(texts: Sequence[str], tokenizer: Any, *, length: int, eos: int) -> np.ndarray:
  """Tokenize and pack texts.

  Args:
    texts: documents.
    tokenizer: see `encode`.
    length: tokens predicted in a row.
    eos: end-of-text token.

  Returns:
    int32 array (rows, length + 1).

  Raises:
    ValueError: as `pack`.

  Example:
    >>> class Bytes:
    ...   def encode(self, text): return list(text.encode())
    >>> rows(["abcdef"], Bytes(), length=3, eos=0).shape
    (2, 4)
  """
  return pack(encode(texts, tokenizer), length=length, eos=eos)


def batches(
  sources: np.ndarray | Mapping[str, np.ndarray],
  *,
  batch: int,
  seed: int = 0,
  weights: Mapping[str, float | int] | None = None,
  epochs: int | None = None,
  shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
  """Shuffle rows, anew in each epoch, mix domains, and batch.

  Args:
    sources: rows of tokens from `pack`, or several such arrays by domain.
    batch: rows in a global batch.
    seed: of the order.
    weights: share of each domain in the mixture, any positive scale; by default its share of
      the rows.
    epochs: how often to go over a single source; None means without end.
    shard: (index, count) of this process; it receives its rows of every global batch.

  Returns:
    A `grain` dataset of int32 arrays (batch / count, length + 1). `iter` of it has `get_state`
    and `set_state`; nothing runs in other processes or threads.

  Raises:
    ValueError: for sources that disagree in length, weights of other domains or not positive, an
      empty source, or a batch that does not divide.

  Example:
    >>> stream = batches(np.arange(12).reshape(6, 2), batch=3, epochs=1)
    >>> sorted(int(x) for b in stream for x in b[:, 0])
    [0, 2, 4, 6, 8, 10]
  """
  named = dict(sources) if isinstance(sources, Mapping) else {"": sources}
  weights = _check(named, batch=batch, weights=weights, shard=shard)
  if epochs is not None and len(named) > 1:
    raise ValueError(f"epochs={epochs} has no meaning for a mixture of {len(named)} domains")
  streams = [
    grain.MapDataset.source(_Rows(named[name])).seed(seed + i).shuffle().repeat(epochs)
    for i, name in enumerate(sorted(named))
  ]
  mixed = streams[0]
  if len(streams) > 1:
    mixed = grain.MapDataset.mix(streams, [weights[name] for name in sorted(named)])
  index, count = shard
  share = batch // count
  stream = mixed.batch(batch, drop_remainder=True)
  if count > 1:
    stream = stream.map(lambda b: b[index * share : (index + 1) * share])
  if not len(stream):
    raise ValueError(f"{len(mixed)} rows do not fill one batch of {batch}")
  return stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


class _Rows:
  """A random-access view that prints short: grain puts its source's repr into the iterator."""

  def __init__(self, array: np.ndarray):
    self._array = array

  def __len__(self) -> int:
    return len(self._array)

  def __getitem__(self, index: Any) -> np.ndarray:
    return self._array[index]

  def __repr__(self) -> str:
    return f"rows{self._array.shape}"


def _check(
  named: Mapping[str, np.ndarray],
  *,
  batch: int,
  weights: Mapping[str, float | int] | None,
  shard: tuple[int, int],
) -> Mapping[str, float | int]:
  if not named:
    raise ValueError("there is no source of rows; give at least one domain")
  for name, array in named.items():
    if array.ndim != 2 or not array.size:
      raise ValueError(f"source {name!r} must hold rows of tokens; its shape is {array.shape}")
  widths = {name: a.shape[1] for name, a in named.items()}
  if len(set(widths.values())) > 1:
    raise ValueError(f"the domains must agree in row length; they have {widths}")
  index, count = shard
  if not 0 <= index < count:
    raise ValueError(f"shard={shard} must be (index, count) with 0 <= index < count")
  if batch < 1 or batch % count:
    raise ValueError(f"batch={batch} is not divisible by {count} processes")
  weights = {n: float(len(a)) for n, a in named.items()} if weights is None else weights
  if set(weights) != set(named):
    raise ValueError(f"weights are for {sorted(weights)}; the domains are {sorted(named)}")
  if min(weights.values()) <= 0:
    raise ValueError(f"weights must be positive; got {dict(weights)} (leave a domain out instead)")
  return weights
