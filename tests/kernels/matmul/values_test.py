# SPDX-License-Identifier: Apache-2.0
"""What device codes stand for is what the format says: exactly, in bfloat16, or within a bound."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from treesurgeon.core import formats
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import values

FLOATS = [f"e{e}m{m}" for e in range(1, 8) for m in range(7) if 1 <= e + m <= 7]
ALL = [
  *(("nf", bits) for bits in range(2, 9)), *(("shift", bits) for bits in range(2, 6)),
  *(("pow2", bits) for bits in range(2, 6)), ("rf8", 8), ("sign", 1), ("ternary", 2), ("e4m3fn", 8),
  *((name, 1 + int(name[1]) + int(name[3])) for name in FLOATS),
]  # fmt: skip


def stands_for(line, count):
  """Compute what each of a format's codes becomes on the device."""
  codes = np.arange(count) if line.codes is None else line.codes
  if line.kind == "table":
    return line.table[codes]
  if line.kind == "steps":
    return (codes - line.zero) * line.factor
  return formats.levels(line.kind, 8)[codes] * line.factor


@pytest.mark.parametrize("target", devices.DEVICES)
def test_every_format_is_what_it_was(target):
  left = []
  for format, bits in ALL:
    line = values.find(format, bits, target)
    if line is None:
      left.append(format)
      continue
    if values.from_words(line.kind, target, "bfloat16"):
      line = line._replace(factor=line.factor / values.WORDS_FACTOR)
    levels = formats.levels(format, bits).astype(np.float64)
    found = stands_for(line, len(levels)).astype(np.float64)
    known = np.isfinite(levels)
    bound = 1 / 254 if format == "nf" and line.kind == "steps" else 1e-7
    assert np.abs(found - levels)[known].max() <= bound * np.abs(levels[known]).max(), format
  # Neither in equal steps nor among the values of an 8-bit float, and too many to be looked up.
  assert left == ["nf", "rf8", "e2m5", "e3m4", "e4m3", "e6m0", "e6m1", "e7m0"]


def test_steps_that_suit_a_table_are_closer_than_any():
  line = values.near("nf", 4)
  levels = formats.levels("nf", 4)
  error = np.abs((line.codes - line.zero) * line.factor - levels).max()
  assert error < 0.5 / 127 and line.codes.max() <= 255 and line.zero == 128
  assert values.near("nf", 8) is None and values.near("e5m2", 8) is None


@pytest.mark.parametrize(
  ("target", "kinds"),
  [
    ("tpu-v5e", "table table table steps steps steps"),
    ("tpu-v5p", "table table steps steps steps steps"),
    ("tpu-v6e", "table table table table steps steps"),
    ("tpu7x", "table table table table steps steps"),
  ],
)
def test_what_is_fastest_is_chosen(target, kinds):
  cases = (("nf", 2), ("nf", 3), ("nf", 4), ("e2m1", 4), ("nf", 5), ("int", 4))
  assert " ".join(values.find(*case, target).kind for case in cases) == kinds
  assert values.find("nf", 4, target, "int8").kind == "steps"
  assert values.find("e3m2", 6, target).kind == "e5m2"


def test_gpus_take_equal_steps():
  assert values.find("nf", 4, "gpu-sm90") is None
  assert values.find("e2m1", 4, "gpu-sm90").kind == "steps"


@pytest.mark.parametrize("format", ["e4m3fn", "e5m2"])
def test_hardware_rounds_inputs_as_the_table_says(format):
  # Ties, what lies beyond, both zeros, and the smallest.
  table = formats.levels(format, 8)
  table = np.unique(table[np.isfinite(table)])
  middles = (table[1:] + table[:-1]) / 2
  x = np.concatenate([table, middles, np.nextafter(middles, 9e9, dtype=np.float32), [1e9, -1e9]])
  codes = formats.encode(jnp.asarray(x, jnp.float32), format, 8)
  top = formats.divisor(format, 8)
  cast = jnp.clip(jnp.asarray(x, jnp.float32), -top, top).astype(f"float8_{format}")
  np.testing.assert_array_equal(
    np.asarray(cast.astype(jnp.float32)), formats.levels(format, 8)[np.asarray(codes)]
  )
  assert cast.dtype == getattr(ml_dtypes, f"float8_{format}")
