# SPDX-License-Identifier: Apache-2.0
"""FlexRound: where it starts, how far a weight moves, and that a block's output is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import flexround, learnable, reconstruct, rtn
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves

FORM = learnable.Form(3, 5, True, "float32")


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_it_starts_at_rounding_to_nearest_and_moves_a_weight_by_its_size():
  w, slope = draw(12, 6), draw(12, 6, seed=1)
  start = flexround.start(w, FORM)

  def loss(learned):
    codes, scales, zeros = flexround.codes(w, learned, FORM, False)
    made = (codes - zeros[0, 0]) * learnable.spread(scales, 12, FORM)
    return (slope * made).sum(), (codes, scales)

  by, (codes, scales) = jax.jit(jax.grad(loss, has_aux=True))(start)
  expected, grid = rtn.quantize(w, bits=3, group_size=5)
  np.testing.assert_array_equal(codes, expected)
  np.testing.assert_array_equal(scales, grid.scales)
  # Proposition 3.1: the gradient by a factor is the weight times that by the quantized weight;
  # none where it is clipped, as the top of a symmetric grid is.
  clipped = np.asarray(jnp.round(w / learnable.spread(grid.scales, 12, FORM))) == 4
  np.testing.assert_allclose(by["each"], np.where(clipped, 0, -slope * w), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(by["output"][0], by["each"].sum(0), rtol=1e-4, atol=1e-5)


def test_one_factor_moves_a_large_weight_by_more_codes():
  w, form = jnp.array([[7.5], [6.0], [1.0]]), learnable.Form(4, 3, True, "float32")
  moved = {**flexround.start(w, form), "each": jnp.full((3, 1), 0.4)}
  codes = [flexround.codes(w, x, form, True)[0] for x in (flexround.start(w, form), moved)]
  assert (codes[0] - codes[1])[:, 0].tolist() == [2.0, 2.0, 0.0]


def solve(w, inputs, targets, **how):
  """Tunes a block of two kernels, the first of which feeds the second."""

  def forward(made, h):
    a, b = (leaves.dense({**w, **made}[n]) for n in "ab")
    return jnp.tanh(h @ a) @ b + h

  @jax.jit
  def run(w):
    return reconstruct.block(
      w, inputs=inputs, targets=targets, forward=forward, key=jax.random.key(0),
      plan=flexround.plan, batch=4, bits=2, group_size=4, symmetric=False, scale_dtype=None, **how,
    )  # fmt: skip

  made = run(w)
  wrong = np.asarray(forward(made, inputs), np.float64) - targets
  return made, np.square(wrong).mean()


def test_a_block_is_tuned_together_and_what_is_quantized_stays():
  w = {"a": draw(8, 8), "b": draw(8, 8, seed=1)}
  inputs = draw(10, 3, 8, seed=2)  # not a whole number of batches
  targets = jnp.tanh(inputs @ w["a"]) @ w["b"] + inputs
  nearest = {}
  for n, x in w.items():
    codes, grid = rtn.quantize(x, bits=2, group_size=4, symmetric=False)
    nearest[n] = grids.tensor(codes, grid, bits=2, group_size=4, store="float32")
  a, b = (nearest[n].dense() for n in "ab")
  before = np.square(jnp.tanh(inputs @ a) @ b + inputs - targets).mean()
  made, after = solve(w, inputs, targets, steps=60, rate=1e-2)
  assert after < 0.6 * before
  kept, alone = solve({**w, "a": nearest["a"]}, inputs, targets, steps=60, rate=1e-2)
  np.testing.assert_array_equal(kept["a"].codes, nearest["a"].codes)
  assert after < alone < before


def test_nonsense_is_named():
  with pytest.raises(ValueError, match="rate=0: valid is above 0"):
    flexround.flexround(rate=0)
