# SPDX-License-Identifier: Apache-2.0
"""Layouts: exact round trips between any two, and the definitions written out."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.kernels.matmul import layouts


def draw(rows, bits, cols=3):
  return np.random.default_rng(bits).integers(0, 2**bits, (rows, cols)).astype(np.uint8)


@pytest.mark.parametrize("rows", [128, 512, 300])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_any_to_any_round_trips(bits, rows):
  codes = draw(rows, bits)
  names = [n for n, layout in layouts.LAYOUTS.items() if bits in layout.widths]
  form = {"bits": bits, "group_size": 128}
  packed = {n: layouts.encode(jnp.asarray(codes), layout=n, **form) for n in names}
  for a, b in itertools.product(names, names):
    there = layouts.repack(packed[a], source=a, target=b, rows=rows, **form)
    assert there.dtype == packed[b].dtype
    np.testing.assert_array_equal(np.asarray(there, np.int64), np.asarray(packed[b], np.int64))
    decoded = layouts.decode(there, layout=b, rows=rows, **form)
    np.testing.assert_array_equal(decoded, codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gs32_words(bits):
  n = 16 // bits
  codes = draw(128 * n, bits).astype(np.int64)
  packed = jnp.asarray(codes, jnp.uint8)
  words = np.asarray(layouts.encode(packed, layout="gs32", bits=bits, group_size=128))
  for r, j in itertools.product([0, 5, 63], range(n)):
    word = words[r].astype(np.int64) & 0xFFFFFFFF
    np.testing.assert_array_equal((word >> (bits * j)) % 2**bits, codes[j * 128 + 2 * r])
    np.testing.assert_array_equal((word >> (16 + bits * j)) % 2**bits, codes[j * 128 + 2 * r + 1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gs8_words(bits):
  n = 8 // bits
  codes = draw(128 * n, bits).astype(np.int64)
  words = layouts.encode(jnp.asarray(codes, jnp.uint8), layout="gs8", bits=bits, group_size=128)
  for r, j, b in itertools.product([0, 31], range(n), range(4)):
    word = np.asarray(words)[r].astype(np.int64) & 0xFFFFFFFF
    got = (word >> (8 * b + bits * j)) % 2**bits
    signed = (codes[j * 128 + 4 * r + b] - 2 ** (bits - 1)) % 2**bits
    np.testing.assert_array_equal(got, signed)


def test_native_is_signed():
  packed = layouts.encode(jnp.asarray([[0], [7]], jnp.uint8), layout="native", bits=3, group_size=2)
  assert packed.dtype == jnp.int4
  assert packed.astype(jnp.int8).tolist() == [[-4], [3]]


def test_errors():
  codes = jnp.zeros((4, 1), jnp.uint8)
  with pytest.raises(ValueError, match="unknown layout 'marlin'; known: bitstream, native"):
    layouts.encode(codes, layout="marlin", bits=4, group_size=4)
  with pytest.raises(ValueError, match="layout 'u8gs' holds codes of 4 bits, not 3"):
    layouts.encode(codes, layout="u8gs", bits=3, group_size=4)
  with pytest.raises(ValueError, match="takes groups of 128 rows, not 4"):
    layouts.encode(codes, layout="gs32", bits=4, group_size=4)
