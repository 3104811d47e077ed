# SPDX-License-Identifier: Apache-2.0
"""Deltas: applied, taken back, composed, written and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.edit import delta


def made(seed, rank=2):
  a, b = jax.random.split(jax.random.key(seed))
  low = leaves.LowRank(jax.random.normal(a, (6, rank)), jax.random.normal(b, (rank, 4)))
  return delta.Delta({"layers/1/mlp/down/kernel": low}, ({"seed": seed},))


@pytest.fixture
def model():
  w = jax.random.normal(jax.random.key(9), (2, 6, 4))
  return model_lib.Model(None, {"layers": {"0:2": {"mlp": {"down": {"kernel": w}}}}})


def weights(m):
  return np.asarray(m.params["layers"]["0:2"]["mlp"]["down"]["kernel"])


def test_applying_adds_and_leaves_the_rest(model):
  before = weights(model).copy()
  after = weights(delta.apply(model, made(0)))
  part = made(0).parts["layers/1/mlp/down/kernel"]
  np.testing.assert_allclose(after[1], before[1] + part.a @ part.b, rtol=1e-5, atol=1e-6)
  assert np.array_equal(after[0], before[0])
  assert np.array_equal(weights(model), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_inverse_takes_it_back_to_the_dtype_s_precision(model, dtype):
  model = model.replace(params=jax.tree.map(lambda x: x.astype(dtype), model.params))
  there = delta.apply(model, made(1))
  back = delta.apply(there, delta.invert(made(1)))
  error = np.abs(weights(back).astype(np.float32) - weights(model).astype(np.float32))
  scale = np.abs(weights(there)).astype(np.float32).max()
  assert error.max() <= 2 * float(jnp.finfo(dtype).eps) * scale
  assert delta.invert(made(1)).provenance == ({"inverse": {"seed": 1}},)


def test_composing_equals_applying_in_turn(model):
  a, b = made(0), made(1, rank=1)
  once = delta.apply(model, delta.compose(a, b))
  twice = delta.apply(delta.apply(model, a), b)
  np.testing.assert_allclose(weights(once), weights(twice), rtol=1e-5, atol=1e-6)
  assert delta.compose(a, b).parts["layers/1/mlp/down/kernel"].rank == 3
  assert delta.compose(a, b).provenance == ({"seed": 0}, {"seed": 1})
  nothing = delta.compose(a, delta.invert(a)).parts["layers/1/mlp/down/kernel"].dense()
  np.testing.assert_allclose(nothing, 0, atol=1e-6)


def test_a_file_holds_all_of_it(tmp_path, model):
  path = tmp_path / "d.safetensors"
  d = delta.compose(made(0), made(1))
  delta.save(d, path)
  again = delta.load(path)
  assert again.provenance == d.provenance
  assert np.array_equal(weights(delta.apply(model, again)), weights(delta.apply(model, d)))
  assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
  path = tmp_path / "d.safetensors"
  delta.save(made(0), path)
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ValueError, match=r"d\.safetensors: not a complete safetensors file"):
    delta.load(path)
  safetensors.numpy.save_file({"w": np.zeros(2, np.float32)}, path)
  with pytest.raises(ValueError, match="holds tensors but no delta"):
    delta.load(path)
  half = {"w:a": np.zeros((2, 1), np.float32)}
  safetensors.numpy.save_file(half, path, {"format": delta.FORMAT, "provenance": "[]"})
  with pytest.raises(ValueError, match="the factors of w are incomplete"):
    delta.load(path)


def test_what_does_not_fit_is_named(model):
  wide = delta.Delta(
    {"layers/0/mlp/down/kernel": leaves.LowRank(jnp.ones((6, 1)), jnp.ones((1, 5)))}
  )
  with pytest.raises(ValueError, match=r"has shape \(6, 4\), the delta has \(6, 5\)"):
    delta.apply(model, wide)
  with pytest.raises(ValueError, match="no address matches 'layers/9"):
    delta.apply(model, delta.Delta({"layers/9/mlp/down/kernel": wide.parts.popitem()[1]}))
