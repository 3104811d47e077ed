# SPDX-License-Identifier: Apache-2.0
"""Number formats: tables against ml_dtypes, nearest codes by brute force, ties to even."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from treesurgeon.core import formats

RNG = np.random.default_rng(0)
HARDWARE = {
  "e2m1": (4, ml_dtypes.float4_e2m1fn),
  "e2m3": (6, ml_dtypes.float6_e2m3fn),
  "e3m2": (6, ml_dtypes.float6_e3m2fn),
  "e4m3fn": (8, ml_dtypes.float8_e4m3fn),
  "e5m2": (8, ml_dtypes.float8_e5m2),
}
TABLES = [*((n, b) for n, (b, _) in HARDWARE.items()), ("e3m4", 8), ("e1m1", 3), ("nf", 4),
          ("nf", 3), ("shift", 4), ("pow2", 3), ("sign", 1), ("ternary", 2),
          ("rf8", 8)]  # fmt: skip


@pytest.mark.parametrize("name", HARDWARE)
def test_small_floats_are_those_of_the_hardware(name):
  bits, dtype = HARDWARE[name]
  codes = np.arange(2**bits, dtype=np.uint8)
  theirs = codes.view(dtype).astype(np.float32)
  ours = formats.levels(name, bits)
  finite = np.isfinite(theirs)
  np.testing.assert_array_equal(ours[finite], theirs[finite])
  assert np.isnan(ours[~finite]).all()
  values = RNG.normal(size=4000).astype(np.float32) * formats.divisor(name, bits) / 3
  values = np.concatenate([values, (ours[finite][:-1] + ours[finite][1:]) / 2])
  values = values[np.abs(values) <= formats.divisor(name, bits)]
  np.testing.assert_array_equal(
    formats.encode(jnp.asarray(values), name, bits), values.astype(dtype).view(np.uint8)
  )


@pytest.mark.parametrize(("name", "bits"), TABLES)
def test_the_nearest_code_by_brute_force(name, bits):
  table = formats.levels(name, bits).astype(np.float64)
  x = RNG.normal(size=1000).astype(np.float32) * formats.divisor(name, bits)
  got = table[np.asarray(formats.encode(jnp.asarray(x), name, bits))]
  best = np.nanmin(np.abs(table[None] - x[:, None].astype(np.float64)), axis=1)
  np.testing.assert_allclose(np.abs(got - x), best, rtol=1e-5, atol=1e-7)


def test_normal_floats_are_those_of_qlora():
  published = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004,
               0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684,
               1.0]  # fmt: skip
  np.testing.assert_allclose(formats.levels("nf", 4), published, atol=2e-7)


def test_shifts_have_no_zero_and_pow2_has_one():
  assert (formats.levels("shift", 4) != 0).all()
  assert (formats.levels("pow2", 4) == 0).sum() == 1


def test_rf8_holds_what_the_published_rounding_makes():
  def leading(x):
    power = np.round(np.log2(np.abs(x)))
    return np.sign(x) * 2.0**power, power

  x = RNG.choice([-1.0, 1.0], 4000) * 2.0 ** RNG.uniform(-14, 0.4, 4000)
  first, high = leading(x)
  second, low = leading(x - first)
  theirs = first + np.where(high - low <= 4, second, 0)
  table = formats.levels("rf8", 8)
  assert set(theirs) <= set(table.astype(np.float64))
  ours = table[np.asarray(formats.encode(jnp.asarray(x, jnp.float32), "rf8", 8))]
  assert (np.abs(ours - x) <= np.abs(theirs - x) + 1e-7).all()
  assert np.abs(ours / x - 1).max() < 1 / 8  # half of the widest gap, from 1.25 to 1.5
  assert formats.encode(jnp.zeros(1), "rf8", 8).tolist() == [0]


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_trits_come_back(rows):
  codes = RNG.integers(0, 3, (2, rows, 3)).astype(np.uint8)
  packed = formats.pack_trits(jnp.asarray(codes))
  assert packed.shape == (2, -(-rows // 5), 3)
  np.testing.assert_array_equal(formats.unpack_trits(packed, rows=rows), codes)


def test_errors():
  with pytest.raises(ValueError, match="format='e9m1': valid are int, ternary, sign, nf"):
    formats.levels("e9m1", 8)
  with pytest.raises(ValueError, match="format='e2m1' has codes of 4 bits, not 5"):
    formats.levels("e2m1", 5)
  with pytest.raises(ValueError, match="only e4m3fn has the ending fn"):
    formats.levels("e5m2fn", 8)
  with pytest.raises(ValueError, match="12 ternary codes fill 3 bytes, not 4"):
    formats.unpack_trits(jnp.zeros((4, 1), jnp.uint8), rows=12)
