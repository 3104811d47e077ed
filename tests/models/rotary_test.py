# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against complex arithmetic in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.models import rotary

BASE = {"vocab_size": 5, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 8}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [1, 3, 4])
def test_rotate_is_a_complex_product(half: int, interleaved: bool):
  rng = np.random.default_rng(half)
  x = rng.normal(size=(2, 6, 3, 8))
  positions = rng.integers(0, 500, (2, 6))
  freq = rng.uniform(0.01, 1.0, half)
  a, b = slice(0, half), slice(half, 2 * half)
  if interleaved:
    a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
  turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * positions[:, :, None, None] * freq)
  expected = x.copy()
  expected[..., a], expected[..., b] = turned.real, turned.imag
  got = rotary.rotate(
    jnp.asarray(x, jnp.float32),
    jnp.asarray(positions),
    jnp.asarray(freq, jnp.float32),
    interleaved=interleaved,
  )
  np.testing.assert_allclose(got, expected, atol=2e-4)


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)
  freq = rotary.at_layer(models.Spec(**BASE), 0)

  def score(at_q: int, at_k: int) -> float:
    turned = (rotary.rotate(x, jnp.full((1, 1), n), freq) for x, n in ((q, at_q), (k, at_k)))
    return float(np.vdot(*turned))

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


def test_frequencies_by_layer():
  spec = models.Spec(
    **BASE, rope_theta=(1e4, 1e6), rope_scaling="linear", rope_factor=(1.0, 8.0), rope_dim=4
  )
  got = rotary.frequencies(spec)
  np.testing.assert_allclose(got, [[1.0, 1e-2], [1 / 8, 1e-3 / 8]], rtol=1e-6)
  np.testing.assert_array_equal(rotary.at_layer(spec, jnp.int32(1)), got[1])
  assert not got.flags.writeable


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
  spec = models.Spec(
    vocab_size=5,
    d_model=128,
    num_layers=1,
    num_heads=1,
    d_ff=8,
    rope_theta=5e5,
    rope_scaling="llama3",
    rope_factor=8.0,
  )
  plain = 5e5 ** -(np.arange(64) / 64)
  got = rotary.frequencies(spec)[0]
  wavelength = 2 * np.pi / plain
  for freq, base, length in zip(got, plain, wavelength, strict=True):
    if length < 8192 / 4:
      wanted = base
    elif length > 8192:
      wanted = base / 8
    else:
      blend = (8192 / length - 1) / 3
      wanted = (1 - blend) * base / 8 + blend * base
    assert freq == pytest.approx(wanted, rel=1e-6)
