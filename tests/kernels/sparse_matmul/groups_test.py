# SPDX-License-Identifier: Apache-2.0
"""Kept groups in their places: the same matrix, restored bit for bit, multiplied on a TPU."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.kernels.matmul import arrange
from treesurgeon.kernels.sparse_matmul import arg_specs, groups

KEY = jax.random.key(11)


def same(a, b):
  assert leaves.signature(a) == leaves.signature(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("rows", "bits", "group", "sparsity", "zeros"),
  [
    (301, 4, 16, 0.75, True),
    pytest.param(512, 4, 16, 0.5, False, marks=pytest.mark.slow),
    pytest.param(200, 2, 32, 0.3, False, marks=pytest.mark.slow),
    pytest.param(7, 8, 16, 0.0, True, marks=pytest.mark.slow),
  ],
)
def test_it_is_the_same_matrix_and_comes_back(rows, bits, group, sparsity, zeros):
  form = {"bits": bits, "group": group, "sparsity": sparsity, "zeros": zeros}
  leaf = arg_specs.group_sparse(rows, 9, key=KEY, **form)
  ready = kernels.prepare({"w": leaf}, target="tpu-v6e")["w"]
  assert isinstance(ready, groups.PreparedGroups) and ready.shape == leaf.shape
  same(kernels.restore(ready), leaf)
  np.testing.assert_array_equal(ready.dense(), leaf.dense())
  x = jax.random.normal(KEY, (3, rows))
  rounded = np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)
  expected = rounded @ np.asarray(leaf.dense(), np.float64)
  with pltpu.force_tpu_interpret_mode():
    got = kernels.matmul(x, ready, implementation="tpu")
  # Weights in small groups are scaled before the product, rounded to bfloat16.
  np.testing.assert_allclose(got, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
  np.testing.assert_allclose(
    kernels.matmul(x, ready), kernels.matmul(x, leaf), rtol=0, atol=1e-5 * np.abs(expected).max()
  )


def test_stacked_layers_are_put_in_place_one_by_one():
  one, two = (arg_specs.group_sparse(64, 3, key=k) for k in jax.random.split(KEY))
  stacked = jax.tree.map(lambda a, b: jnp.stack([a, b])[None], one, two)
  ready = kernels.prepare(stacked, target="tpu-v5e")
  assert ready.shape == (1, 2, 64, 3)
  same(ready.restore(), stacked)
  same(jax.tree.map(lambda a: a[0, 1], ready), kernels.prepare(two, target="tpu-v5e"))
  assert kernels.prepare(ready, target="tpu-v5e") is ready
  same(kernels.prepare(ready, target="tpu7x"), kernels.prepare(stacked, target="tpu7x"))


def test_what_stays(caplog):
  leaf = arg_specs.group_sparse(64, 3, key=KEY)
  stays = dataclasses.replace(leaf, kept=leaf.kept.dense())
  arrange._say.cache_clear()
  with caplog.at_level(logging.WARNING):
    assert kernels.prepare(stays, target="tpu-v5e") is stays
  assert "quantized, not an array" in caplog.text
  halves = dataclasses.replace(leaf, kept=dataclasses.replace(leaf.kept, group_size=8))
  assert "a scale a kept group of 16 rows, not one for 8" in groups.unsupported(halves)
