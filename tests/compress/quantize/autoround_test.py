# SPDX-License-Identifier: Apache-2.0
"""AutoRound against its gradients and steps in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import autoround, learnable, reconstruct, rtn
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves
from treesurgeon.stats import folds

NAMES = ("shift", "low", "high")
FORM = {"bits": 3, "group_size": 5, "symmetric": False}


def problem(rows=12, cols=6, seed=0):
  """Draws weights and the second moment of correlated inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(6 * rows, rows)) @ (rng.normal(size=(rows, rows)) / rows**0.5)
  return rng.normal(size=(rows, cols)).astype(np.float32), (x.T @ x).astype(np.float32)


def slopes(w, h, v, a, b, *, bits, group_size, symmetric):
  """Computes the weights, and the loss' gradients by V, α and β, written out in float64."""
  w, h, top = w.astype(np.float64), h.astype(np.float64), 2**bits - 1
  groups = np.arange(len(w)) // group_size
  low = np.array([np.minimum(w[groups == g].min(0), 0) for g in range(groups[-1] + 1)])
  high = np.array([np.maximum(w[groups == g].max(0), 0) for g in range(groups[-1] + 1)])
  if symmetric:
    s, z = np.maximum(-low * a, high * b) / (top / 2), np.full_like(a, (top + 1) / 2)
    ds = [np.where(-low * a > high * b, -low, 0), np.where(-low * a < high * b, high, 0)]
    ds, dz = [x / (top / 2) for x in ds], [0, 0]
  else:
    s = (high * b - low * a) / top
    z = np.clip(np.round(-low * a / s), 0, top)
    ds = [-low / top, high / top]
    dz = [-low / s + low * a / s**2 * ds[0], low * a / s**2 * ds[1]]
  wide = s[groups]
  q = np.round(w / wide + v) + z[groups]
  inside = (q >= 0) & (q <= top)
  made = (np.clip(q, 0, top) - z[groups]) * wide
  g = 2 * h @ (made - w)
  by_s = g * (made / wide - np.where(inside, w / wide, 0))
  by_z = g * np.where(inside, 0, -wide)
  total = [np.array([x[groups == k].sum(0) for k in range(groups[-1] + 1)]) for x in (by_s, by_z)]
  return made, [
    g * wide * inside,
    *(total[0] * x + total[1] * y for x, y in zip(ds, dz, strict=True)),
  ]


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "steps"))
def solve(w, h, *, steps, **form):
  state = folds.SecondMoment(h, jnp.float32(1))
  return reconstruct.kernel(
    w, state, plan=autoround.plan, steps=steps, rate=None, batch=8, scale_dtype=None, **form
  )


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_formula(symmetric):
  w, h = problem()
  rng = np.random.default_rng(1)
  v = rng.uniform(-0.4, 0.4, w.shape)
  a, b = (rng.uniform(0.5, 0.9, (3, w.shape[1])) for _ in range(2))
  form = learnable.Form(3, 5, symmetric, "float32")

  def loss(learned):
    made = learnable.weights(autoround.SHIFT, jnp.asarray(w), learned, form, hard=False)
    return ((made - w) * jnp.matmul(h, made - w, precision="highest")).sum(), made

  learned = {n: jnp.asarray(x, jnp.float32) for n, x in zip(NAMES, (v, a, b), strict=True)}
  found, made = jax.grad(loss, has_aux=True)(learned)
  expected, by = slopes(w, h, v, a, b, bits=3, group_size=5, symmetric=symmetric)
  np.testing.assert_allclose(made, expected, atol=1e-5)
  for name, x in zip(NAMES, by, strict=True):
    np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-3)


def test_the_best_of_the_steps_is_kept_column_by_column():
  w, h = problem()
  steps = 20
  learned = [np.zeros_like(w), *(np.ones((3, w.shape[1])) for _ in range(2))]
  made = []
  for i in range(steps + 1):
    weights, by = slopes(w, h, *learned, **FORM)
    made.append((np.einsum("ic,ij,jc->c", weights - w, h, weights - w), weights))
    learned = [
      np.clip(
        x - (1 - i / steps) / steps * np.sign(g), *((-0.5, 0.5) if x is learned[0] else (0, 1))
      )
      for x, g in zip(learned, by, strict=True)
    ]
  best = np.argmin([losses for losses, _ in made], axis=0)
  expected = np.stack([made[i][1][:, c] for c, i in enumerate(best)], axis=1)
  np.testing.assert_allclose(leaves.dense(solve(w, h, **FORM, steps=steps)), expected, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_is_rounding_to_nearest(symmetric, dtype):
  w = jnp.asarray(problem(13, 6)[0], dtype)
  form = learnable.Form(3, 5, symmetric, dtype)
  made = learnable.tensor(autoround.SHIFT, w, autoround.start(w.astype(jnp.float32), form), form)
  codes, grid = rtn.quantize(w, bits=3, group_size=5, symmetric=symmetric)
  expected = grids.tensor(codes, grid, bits=3, group_size=5, store=dtype)
  jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_nonsense_is_named():
  with pytest.raises(ValueError, match="steps=-1: valid is 0, rounding to nearest, or more"):
    autoround.autoround(steps=-1)
  with pytest.raises(ValueError, match="per='layer': valid are block, kernel"):
    autoround.autoround(per="layer")
  with pytest.raises(ValueError, match="batch=0: a step needs 1 row"):
    autoround.autoround(batch=0)
  with pytest.raises(ValueError, match="scale_dtype='int8': valid are float32"):
    autoround.autoround(scale_dtype="int8")
  with pytest.raises(ValueError, match="rate=0.0: valid is above 0"):
    autoround.autoround(rate=0.0)
  with pytest.raises(ValueError, match="bits=9"):
    autoround.autoround(bits=9)
