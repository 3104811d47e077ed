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


def kernel_loss(params, rows, shift):
  return jnp.sum((rows[0] @ params["layers/0:2/w"][1] + shift) ** 2)


def test_blocks_and_sums_are_of_single_gradients():
  rng = np.random.default_rng(0)
  w, rows = rng.normal(size=(2, 5, 3)), rng.normal(size=(4, 5))
  params = {"layers/0:2/w": jnp.asarray(w, jnp.float32)}
  blocks = {"layers/0:2/w": jnp.zeros((2, 3, 3, 2, 2))}
  totals = jax.tree.map(jnp.zeros_like, params)
  shift, rows_ = jnp.float32(0.5), jnp.asarray(rows, jnp.float32)
  for part in (rows_[:2], rows_[2:]):
    blocks = stats.add_gradient_blocks(blocks, params, part, shift, loss=kernel_loss, block=2)
    totals = stats.add_gradients(totals, params, part, shift, loss=kernel_loss)
  each = np.stack([2 * np.outer(x, x @ w[1] + 0.5) for x in rows])
  np.testing.assert_allclose(totals["layers/0:2/w"][1], each.sum(0), rtol=1e-4)
  assert not np.asarray(totals["layers/0:2/w"][0]).any()
  padded = np.pad(each, [(0, 0), (0, 1), (0, 0)]).reshape(4, 3, 2, 3)
  want = np.einsum("ebic,ebjc->bcij", padded, padded)
  np.testing.assert_allclose(blocks["layers/0:2/w"][1], want, rtol=1e-4, atol=1e-5)


def test_slopes_are_derivatives_along_random_directions():
  rng = np.random.default_rng(0)
  flat = {
    "layers/0:2/w": jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32),
    "v": jnp.ones((2, 2)),
  }
  rows, key = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jax.random.key(3)

  def loss(p, rows, rest):
    return jnp.mean((rows @ p["layers/0:2/w"][1]) ** 2) + rest * p["v"].sum()

  gradient = jax.grad(loss)(flat, rows, 2.0)
  for which, place, name in ((0, 1, "layers/0:2/w"), (0, 0, "layers/0:2/w"), (1, 0, "v")):
    got = stats.slope(
      flat, rows, 2.0, key, jnp.int32(which), jnp.int32(place), jnp.float32(1e-2), loss=loss,
      names=("layers/0:2/w", "v"),
    )  # fmt: skip
    g = gradient[name] if name == "v" else gradient[name][place]
    want = np.abs((np.asarray(g) * np.asarray(jax.random.normal(key, g.shape))).sum())
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
