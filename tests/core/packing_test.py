# SPDX-License-Identifier: Apache-2.0
"""Packing: exact round trips, the bit order of the format, and its errors."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import packing

SETTINGS = hypothesis.settings(max_examples=12, deadline=None)


def draw(seed, *shape, bits):
  kind = np.uint8 if bits <= 8 else np.uint16
  return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(kind)


@SETTINGS
@hypothesis.given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_round_trip(bits, rows, cols, seed):
  codes = draw(seed, rows, cols, bits=bits)
  stream = packing.pack(jnp.asarray(codes), bits=bits)
  assert stream.shape == (packing.packed_rows(rows, bits), cols)
  found = packing.unpack(stream, bits=bits, rows=rows)
  np.testing.assert_array_equal(found, codes)
  assert found.dtype == codes.dtype


@SETTINGS
@hypothesis.given(st.integers(1, 16), st.integers(1, 30), st.integers(0, 99))
def test_stream_is_little_endian(bits, rows, seed):
  codes = draw(seed, rows, 1, bits=bits)
  number = sum(int(c) << (bits * i) for i, c in enumerate(codes[:, 0]))
  expected = number.to_bytes(packing.packed_rows(rows, bits), "little")
  assert bytes(np.asarray(packing.pack(jnp.asarray(codes), bits=bits))[:, 0]) == expected


@pytest.mark.parametrize("bits", range(1, 17))
def test_planes_interleave_to_the_codes(bits):
  codes = draw(0, 24, 3, bits=bits)
  planes = packing.planes(packing.pack(jnp.asarray(codes), bits=bits), bits=bits)
  assert len(planes) == packing.period(bits)
  for j, plane in enumerate(planes):
    np.testing.assert_array_equal(plane, codes[j :: len(planes)])


def test_leading_axes():
  codes = draw(1, 2, 3, 11, 5, bits=3)
  stream = packing.pack(jnp.asarray(codes), bits=3)
  np.testing.assert_array_equal(packing.unpack(stream, bits=3, rows=11), codes)
  np.testing.assert_array_equal(stream[1, 2], packing.pack(jnp.asarray(codes[1, 2]), bits=3))


@pytest.mark.parametrize("bits", [0, 17])
def test_width_is_checked(bits):
  with pytest.raises(ValueError, match=rf"bits={bits} is not a whole number from 1 to 16"):
    packing.pack(jnp.zeros((2, 2), jnp.uint8), bits=bits)


def test_length_is_checked():
  with pytest.raises(ValueError, match="a stream of 10 3-bit codes has 4 bytes, not 5"):
    packing.unpack(jnp.zeros((5, 1), jnp.uint8), bits=3, rows=10)
