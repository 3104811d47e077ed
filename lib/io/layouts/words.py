# SPDX-License-Identifier: Apache-2.0
"""Bitstreams as the 32-bit words that other tools store.

The codes of a leaf are a little-endian bitstream along the input rows (`core.packing`), which is
also the stream of compressed-tensors and of GPTQ: four byte rows make one row of words.
"""

import numpy as np

from treesurgeon.core import packing


def join(stream: np.ndarray) -> np.ndarray:
  """Join byte rows into little-endian words, four at a time.

  Args:
    stream: uint8 (bytes, cols); padded with zero bytes to whole words.

  Returns:
    int32 (words, cols).

  Example:
    >>> join(np.array([[1], [2], [0], [0], [7]], np.uint8)).tolist()
    [[513], [7]]
  """
  stream = np.asarray(stream)
  length, cols = stream.shape
  words = -(-length // 4)
  if length % 4:
    stream = np.concatenate([stream, np.zeros((-length % 4, cols), np.uint8)])
  lanes = np.ascontiguousarray(stream.reshape(words, 4, cols).transpose(0, 2, 1))
  return lanes.view("<i4").reshape(words, cols)


def cut(words: np.ndarray, length: int) -> np.ndarray:
  """Cut words into byte rows; the inverse of `join`.

  Args:
    words: int32 (words, cols).
    length: byte rows wanted.

  Returns:
    uint8 (length, cols).

  Example:
    >>> cut(np.array([[513], [7]], np.int32), 5)[:, 0].tolist()
    [1, 2, 0, 0, 7]
  """
  count, cols = words.shape
  lanes = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(count, cols, 4)
  return lanes.transpose(0, 2, 1).reshape(count * 4, cols)[:length]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Pack codes along the first axis into words, on the host; meant for zero points.

  Args:
    codes: uint8 (count, cols), below `2**bits`.
    bits: width of a code.

  Returns:
    int32 (ceil(count * bits / 32), cols).

  Example:
    >>> pack(np.array([[1], [2]], np.uint8), 4).tolist()
    [[33]]
  """
  single = (codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
  return join(np.packbits(single.reshape(-1, codes.shape[1]), axis=0, bitorder="little"))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
  """Unpack codes along the first axis; the inverse of `pack`.

  Args:
    words: int32 (words, cols).
    bits: width of a code.
    count: codes wanted.

  Returns:
    uint8 (count, cols).

  Example:
    >>> unpack(np.array([[33]], np.int32), 4, 2)[:, 0].tolist()
    [1, 2]
  """
  stream = cut(words, packing.packed_rows(count, bits))
  single = np.unpackbits(stream, axis=0, count=count * bits, bitorder="little")
  weights = (1 << np.arange(bits, dtype=np.uint8))[:, None]
  return (single.reshape(count, bits, -1) * weights).sum(axis=1, dtype=np.uint8)
