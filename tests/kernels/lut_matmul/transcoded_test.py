# SPDX-License-Identifier: Apache-2.0
"""Vectors as integers on a TPU: within half a step, and the vectors come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from treesurgeon import kernels
from treesurgeon.core import leaves, packing
from treesurgeon.kernels.lut_matmul import transcoded

KEY = jax.random.key(13)


def vectors(*batch, rows=300, cols=20, key=KEY):
  index = jax.random.randint(key, (*batch, -(-rows // 4), cols), 0, 256).astype(jnp.uint8)
  book = jax.random.normal(key, (*batch, 256, 4))
  return leaves.Codebook(packing.pack(index, bits=8), book, rows, cols, 8, 4)


def same(a, b):
  assert leaves.signature(a) == leaves.signature(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("batch", "residual"),
  [((2,), False), ((), True), pytest.param((1, 2), True, marks=pytest.mark.slow)],
)
def test_half_a_step_and_back(batch, residual):
  leaf = vectors(*batch)
  leaf = leaves.Sum((leaf, vectors(*batch, key=jax.random.key(1)))) if residual else leaf
  ready = kernels.prepare([leaf], target="tpu-v6e")[0]
  assert isinstance(ready, transcoded.Transcoded) and ready.shape == leaf.shape
  same(kernels.restore(ready), leaf)
  np.testing.assert_array_equal(ready.dense(), leaf.dense())
  w = np.asarray(leaf.dense(), np.float64)
  off = np.abs(np.asarray(ready.weight.dense(), np.float64) - w)
  groups = np.pad(np.abs(w), [(0, 0)] * len(batch) + [(0, -300 % 128), (0, 0)])
  top = groups.reshape(*batch, -1, 128, 20).max(axis=-2)
  assert (off <= np.repeat(top, 128, axis=-2)[..., :300, :] / 254 * (1 + 1e-5)).all()
  assert kernels.prepare(ready, target="tpu-v6e") is ready


def test_its_product_is_that_of_the_integers():
  leaf = vectors()
  ready = kernels.prepare(leaf, target="tpu-v5e")
  x = jax.random.normal(KEY, (2, 300))
  with pltpu.force_tpu_interpret_mode():
    got = kernels.matmul(x, ready, implementation="tpu")
  np.testing.assert_allclose(got, x @ ready.weight.dense(), rtol=2e-2, atol=0.2)
  np.testing.assert_allclose(got, x @ leaf.dense(), rtol=2e-2, atol=0.3)


def test_zeros_stay_zeros():
  leaf = leaves.Codebook(jnp.zeros((4, 3), jnp.uint8), jnp.zeros((2, 2)), 8, 3, 8, 2)
  assert not np.asarray(transcoded.transcode(leaf, "tpu-v5e").dense()).any()
