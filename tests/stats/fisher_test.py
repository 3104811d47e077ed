# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import stats


def loss(params, tokens, shift):
  x = tokens.astype(jnp.float32) + shift
  return jnp.mean((x @ params["w"]) ** 2) + params["b"]


def test_it_is_the_sum_of_squared_gradients_of_single_examples():
  params = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.float32(0.0)}
  tokens = jnp.array([[1, 2, 3], [0, 1, 0], [5, 4, 2]])
  shift = jnp.float32(0.5)
  total = jax.tree.map(jnp.zeros_like, params)
  total = stats.add_squared_gradients(total, params, tokens[:2], shift, loss=loss)
  total = stats.add_squared_gradients(total, params, tokens[2:], shift, loss=loss)
  want = np.zeros(3)
  for row in np.asarray(tokens, np.float64):
    x = row + 0.5
    want += (2 * (x @ np.array([1.0, -2.0, 0.5])) * x) ** 2
  np.testing.assert_allclose(total["w"], want, rtol=1e-5)
  assert total["b"] == 3.0


def test_the_total_is_float32_whatever_the_parameters_are():
  params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros((), jnp.bfloat16)}
  total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  total = stats.add_squared_gradients(
    total, params, jnp.ones((1, 3), int), jnp.float32(0), loss=loss
  )
  assert {x.dtype.name for x in jax.tree.leaves(total)} == {"float32"}
