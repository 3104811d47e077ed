# SPDX-License-Identifier: Apache-2.0
"""Host copies that run near memory speed, transposed ones included, and a scan for NaN and Inf.

numpy copies a transposed matrix one far stride at a time, about ten times slower than in blocks
that fit the cache. Copies and scans go through unsigned integers, so they release the
interpreter lock and run in threads for every dtype.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

_ROWS = 64
_CHUNK = 1 << 18
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# The exponent bits: all set in NaN and Inf, in nothing else.
_EXPONENT = {
  np.dtype(np.float16): 0x7C00,
  np.dtype(ml_dtypes.bfloat16): 0x7F80,
  np.dtype(np.float32): 0x7F800000,
  np.dtype(np.float64): 0x7FF0000000000000,
}


def copy(out: np.ndarray, source: np.ndarray) -> None:
  """Copy an array into another of equal shape and dtype.

  Args:
    out: C-contiguous array, written to.
    source: array of any strides.

  Example:
    >>> out = np.zeros((2, 3), np.int8)
    >>> copy(out, np.arange(6, dtype=np.int8).reshape(3, 2).T)
    >>> out.tolist()
    [[0, 2, 4], [1, 3, 5]]
  """
  source, out = _bits(source), _bits(out)
  if source.ndim != 2 or source.flags.c_contiguous:
    np.copyto(out, source)
    return
  for i in range(0, source.shape[1], _ROWS):
    out[:, i : i + _ROWS] = source[:, i : i + _ROWS]


def check_finite(name: str, array: np.ndarray, file: str | Path) -> None:
  """Refuse a tensor with NaN or Inf.

  Args:
    name: tensor name or address, for the message.
    array: any dtype; integers pass.
    file: where it came from, for the message.

  Raises:
    ValueError: naming the file, the tensor, the first bad position and its value.

  Example:
    >>> check_finite("w", np.ones(3, np.float32), "model.safetensors")
  """
  if finite(array):
    return
  value = array if array.dtype.kind == "c" else array.astype(np.float64)
  bad = ~np.isfinite(value)
  first = tuple(int(i) for i in np.argwhere(bad)[0])
  raise ValueError(
    f"{file}: tensor {name!r} holds {int(bad.sum())} NaN or Inf of {bad.size} values, the first "
    f"{value[first]} at {list(first)}; weights must be finite"
  )


def finite(array: np.ndarray) -> bool:
  """Tell whether an array is free of NaN and Inf; releases the interpreter lock, copies little.

  Args:
    array: any dtype; integers are finite.

  Returns:
    Whether it is.

  Example:
    >>> finite(np.ones(3)), finite(np.array([1.0, np.inf], ml_dtypes.bfloat16))
    (True, False)
  """
  dtype = array.dtype
  flat = (array.T if array.flags.f_contiguous else array).reshape(-1)
  if dtype in _EXPONENT:
    # NaN and Inf of either sign are the largest words: as signed integers the positive ones, as
    # unsigned the negative ones. Two maxima of a piece in the cache need no array between.
    words = flat.view(_BITS[dtype.itemsize])
    worst = _EXPONENT[dtype]
    negative = worst + (1 << (8 * dtype.itemsize - 1))
    signed = words.view(f"i{dtype.itemsize}")
    return all(
      signed[i : i + _CHUNK].max() < worst and words[i : i + _CHUNK].max() < negative
      for i in range(0, words.size, _CHUNK)
    )
  if dtype.kind == "c" or dtype.name.startswith("float"):
    pieces = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    wide = np.complex64 if dtype.kind == "c" else np.float32
    return all(bool(np.isfinite(p.astype(wide)).all()) for p in pieces)
  return True


def _bits(x: np.ndarray) -> np.ndarray:
  return x.view(_BITS[x.dtype.itemsize]) if x.dtype.kind not in "biuc" else x
