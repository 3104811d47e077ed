# SPDX-License-Identifier: Apache-2.0
"""Turn calibration text into token batches of one shape."""

import numpy as np


def batches(
  text: str,
  tokenizer: object,
  *,
  length: int,
  samples: int,
  batch: int,
  vocab_size: int,
  source: str = "the calibration text",
) -> list[np.ndarray]:
  """Cut a text into equal sequences, spread evenly over it.

  Args:
    text: calibration text.
    tokenizer: has `encode(text) -> int array`.
    length: tokens a sequence.
    samples: sequences wanted; fewer are returned if the text has fewer.
    batch: sequences a batch; the last batch may be smaller.
    vocab_size: the model's vocabulary.
    source: what to call the text in messages.

  Returns:
    Arrays (batch, length) int32.

  Raises:
    ValueError: if the text is shorter than one sequence or has tokens the model lacks.

  Example:
    >>> class Bytes:
    ...   def encode(self, text): return np.frombuffer(text.encode(), np.uint8)
    >>> cut = batches("abcdefgh", Bytes(), length=3, samples=9, batch=1, vocab_size=256)
    >>> [b.tolist() for b in cut]
    [[[97, 98, 99]], [[100, 101, 102]]]
  """
  ids = np.asarray(tokenizer.encode(text), np.int32)  # pyright: ignore[reportAttributeAccessIssue]
  if len(ids) < length:
    raise ValueError(
      f"{source} has {len(ids)} tokens, fewer than one sequence of {length}; "
      "give a longer text or a smaller calibration length"
    )
  if ids.max() >= vocab_size:
    raise ValueError(
      f"{source} has the token {ids.max()}, the model's vocabulary ends at {vocab_size - 1}; "
      "the tokenizer belongs to another model"
    )
  rows = ids[: len(ids) // length * length].reshape(-1, length)
  keep = np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int))
  rows = rows[keep]
  return [rows[i : i + batch] for i in range(0, len(rows), batch)]
