# SPDX-License-Identifier: Apache-2.0
"""What the codes of a quantized matrix become on a device, and what they stand for there.

A kernel decodes a format in one of three ways, of which `find` takes the one that is predicted to
be fastest for few tokens:

* `steps`: `(code - zero) * factor`, up to 8 bits, wider than in files if they must be. Exact for
  integers, ternary and sign codes, and small floats of few exponents.
* `table`: up to 16 values, looked up in registers, each rounded to bfloat16 as a dense kernel's
  weights are. Exact beyond that; codes keep their width. v6e and tpu7x look two codes up at once,
  v5e one.
* `e4m3fn`, `e5m2`: 8-bit floats that the chip converts, and other floats and powers of two that
  are among their values, up to one factor.

Where none is faster than twice the bytes, tables go as the nearest of 255 steps: of NF4 on v5p, of
5 to 7 bits of `nf` anywhere, and of whatever is multiplied by 8-bit integers. No value is then off
by more than `1 / 254` of the largest.
"""

import functools
from typing import NamedTuple

import numpy as np

from treesurgeon.core import formats
from treesurgeon.kernels import devices

FLOATS = ("e5m2", "e4m3fn")
# Bits of the widest code that is looked up. NF4, 4096 x 4096, 16 tokens, by the compilers' counts:
# looked up 18.7, 8.4, 6.6 and 5.2 us on v5e, v5p, v6e and tpu7x; as int8, of twice the bytes, 21.5,
# 6.4, 10.7 and 5.2.
_LOOKED_UP = {"tpu-v5e": 4, "tpu-v5p": 3, "tpu-v6e": 4, "tpu7x": 4}
_BY_PAIRS = ("tpu-v6e", "tpu7x")
# Where two e4m3 in a word are decoded in fewer instructions than the compiler's conversion takes.
_FROM_WORDS = ("tpu-v6e",)
WORDS_FACTOR = 2.0**8  # of what comes out of words


class Line(NamedTuple):
  """Codes of a device whose values are `(code - zero) * factor`, or a table's times `factor`.

  Attributes:
    width: bits of a code.
    zero, factor: of the values.
    codes: the device's code of each code in files, or None if they are the same.
    kind: "steps", "table", "e4m3fn" or "e5m2".
    table: its values, of kind "table".
    by_pairs: whether it is looked up two codes at a time.
  """

  width: int
  zero: float
  factor: float
  codes: np.ndarray | None = None
  kind: str = "steps"
  table: np.ndarray | None = None
  by_pairs: bool = False


@functools.cache
def find(format: str, bits: int, target: str, inputs: str = "bfloat16") -> Line | None:
  """Choose how a device decodes a format.

  Args:
    format: of a QuantizedTensor.
    bits: width of a code.
    target: name of the device.
    inputs: dtype of the activations.

  Returns:
    The device's codes, or None if it has none for this format.

  Example:
    >>> [find("nf", 4, target).kind for target in ("tpu-v5p", "tpu-v6e")]
    ['steps', 'table']
  """
  exact = line(format, bits)
  if target in devices.GPUS:
    return exact
  if inputs == "int8":
    return exact or near(format, bits)
  wider = exact is None or exact.width > bits
  if bits <= _LOOKED_UP[target] and (exact is None or wider and target in _BY_PAIRS):
    table = formats.levels(format, bits)
    return Line(bits, 0.0, 1.0, None, "table", table, target in _BY_PAIRS)
  found = exact or _floats(format, bits) or near(format, bits)
  if found and from_words(found.kind, target, inputs):
    return found._replace(factor=found.factor * WORDS_FACTOR)
  return found


def from_words(kind: str, target: str, inputs: str) -> bool:
  """Tell whether 8-bit floats are stored in words, for arithmetic instead of conversion.

  Args:
    kind: of a `Line`.
    target: name of the device.
    inputs: dtype of the activations.

  Returns:
    Whether they are.

  Example:
    >>> from_words("e4m3fn", "tpu-v6e", "bfloat16"), from_words("e4m3fn", "tpu7x", "bfloat16")
    (True, False)
  """
  return kind == "e4m3fn" and target in _FROM_WORDS and inputs == "bfloat16"


@functools.cache
def line(format: str, bits: int) -> Line | None:
  """Find codes in equal steps for a format, wider than its own if they must be.

  Integers, ternary and sign codes are in equal steps; e2m1 and other small floats, and powers of
  two, are multiples of their smallest value: twelve halves, so 5 bits, for e2m1. A minus zero
  becomes a zero, and the code for what is no number becomes one.

  Args:
    format: of a QuantizedTensor.
    bits: width of a code.

  Returns:
    The line, or None if it would need over 8 bits.

  Example:
    >>> line("e2m1", 4)[:3], line("nf", 4)
    ((5, 12.0, 0.5), None)
  """
  known = {"int": Line(bits, 2.0 ** (bits - 1), 1.0), "ternary": Line(2, 1.0, 1.0),
           "sign": Line(1, 0.5, 2.0)}  # fmt: skip
  if format in known:
    return known[format]
  levels = np.nan_to_num(formats.levels(format, bits).astype(np.float64))
  factor = np.abs(levels[levels != 0]).min()
  steps = levels / factor
  zero = -steps.min()
  width = int(np.ceil(np.log2(steps.max() + zero + 1)))
  if (steps != np.round(steps)).any() or width > 8:
    return None
  return Line(width, float(zero), float(factor), (steps + zero).astype(np.uint8))


@functools.cache
def near(format: str, bits: int) -> Line | None:
  """Round a table to 8-bit steps, of the length that suits it best.

  Args:
    format: of a QuantizedTensor.
    bits: width of a code.

  Returns:
    The line, no value off by more than `1 / 254` of the largest, or None if two codes would become
    one.

  Example:
    >>> found = near("nf", 4)
    >>> bool(abs((found.codes - found.zero) * found.factor - formats.levels("nf", 4)).max() < 3e-3)
    True
  """
  levels = formats.levels(format, bits).astype(np.float64)
  if not np.isfinite(levels).all():
    return None
  lengths = np.linspace(100, 127, 2701)[:, None] / np.abs(levels).max()
  errors = np.abs(np.round(levels * lengths) / lengths - levels).max(axis=1)
  length = float(lengths[errors.argmin(), 0])
  codes = np.round(levels * length) + 128
  if len(np.unique(codes)) < len(codes):
    return None
  return Line(8, 128.0, 1 / length, codes.astype(np.uint8))


def _floats(format: str, bits: int) -> Line | None:
  """Find a format's values among those of an 8-bit float, times a power of two."""
  if format in FLOATS:
    return Line(8, 0.0, 1.0, None, format)
  levels = formats.levels(format, bits).astype(np.float64)
  top = np.nanmax(np.abs(levels))
  for kind in FLOATS:
    table = formats.levels(kind, 8).astype(np.float64)
    factor = 2.0 ** np.ceil(np.log2(top / np.nanmax(table)))
    # With its sign, so that minus zero stays one.
    places = {(v, bool(np.signbit(v))): i for i, v in enumerate(table) if np.isfinite(v)}
    found = [places.get((v, bool(np.signbit(v)))) for v in levels / factor]
    if None not in found:
      return Line(8, 0.0, float(factor), np.asarray(found, np.uint8), kind)
  return None
