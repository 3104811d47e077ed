# SPDX-License-Identifier: Apache-2.0
"""PTQ1.61: the analytic start by definition in float64, its bits, and that learning helps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import ptq161
from treesurgeon.core import leaves
from treesurgeon.stats import folds


def by_definition(w, active, few, alpha=None, r1=1.0, r2=1.0):
  kept = np.sort(np.argsort(-active, kind="stable")[:few])
  out, rest = np.zeros_like(w), np.setdiff1d(np.arange(len(w)), kept)
  low, high = (f(w[kept], axis=0, initial=0.0) for f in (np.min, np.max))
  step = np.where(high > low, high - low, 1.0) / 15
  zero = np.round(-low / step)
  out[kept] = step * (np.clip(np.round(w[kept] / step + zero), 0, 15) - zero)
  mean = w[rest].mean(0)
  alpha = np.abs(w[rest]).mean(0) if alpha is None else alpha
  out[rest] = r2 * r1 * (alpha * np.where(w[rest] >= mean, 1, -1) + mean)
  return out


def test_start_by_definition():
  rng = np.random.default_rng(0)
  w, active = rng.normal(size=(23, 6)) + 0.2, rng.exponential(size=23)
  scales, make = ptq161.start(jnp.asarray(w), jnp.asarray(active), salient=0.2)
  leaf = make(scales)
  assert leaf.first.shape == (4, 6)
  np.testing.assert_allclose(leaf.dense(), by_definition(w, active, 4), atol=1e-5)
  some = {
    "alpha": jnp.asarray(rng.exponential(size=(1, 6))),
    "r1": jnp.asarray(rng.exponential(size=(1, 6))),
    "r2": jnp.asarray(rng.exponential(size=(19, 1))),
  }
  want = by_definition(w, active, 4, **{k: np.asarray(v, float) for k, v in some.items()})
  np.testing.assert_allclose(make(some).dense(), want, atol=1e-5)
  scales, make = ptq161.start(jnp.asarray(w), jnp.asarray(active), salient=0.0)
  np.testing.assert_allclose(make(scales).dense(), by_definition(w, active, 0), atol=1e-5)


def test_bits_of_a_wide_kernel():
  def quantize(w):
    scales, make = ptq161.start(w, jnp.ones(4096))
    return make(scales)

  leaf = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 4096), "bfloat16"))
  assert 1.6 < leaves.bits_per_weight(leaf) < 1.625


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_learned_scales_beat_analytic_ones(seed):
  rng = np.random.default_rng(seed)
  w = {n: jnp.asarray(rng.normal(size=(12, 12)), jnp.float32) for n in ("up", "down")}
  x = jnp.asarray(rng.normal(size=(6, 9, 12)) * np.exp(rng.normal(size=12)), jnp.float32)

  def forward(changes, h):
    up, down = (leaves.dense({**w, **changes}[n]) for n in ("up", "down"))
    return jnp.tanh(h @ up) @ down

  seen = folds.PerFeature(jnp.abs(x).max(axis=(0, 1)), jnp.ones(()))
  run = functools.partial(
    ptq161._block, inputs=x, targets=forward({}, x), forward=forward,
    activations={"up": seen, "down": seen}, salient=0.2, scale_rate=5e-3, rate=1e-2, batch=2,
  )  # fmt: skip
  before, after = (jax.jit(functools.partial(run, epochs=e))(w) for e in (0, 40))
  loss = lambda made: float(ptq161._distance(forward(made, x), forward({}, x)).mean())
  assert loss(after) < 0.85 * loss(before)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  same = lambda n: np.array_equal(before[n].rest.parts[0].signs, after[n].rest.parts[0].signs)
  assert same("up") and same("down")


def test_arguments_are_checked():
  for how, text in (
    ({"salient": 1.0}, "salient=1.0: valid is 0 to below 1"),
    ({"epochs": -1}, r"epochs=-1: valid is 0 \(analytic scales\) or more"),
    ({"batch": 0}, "batch=0: a step needs 1 row"),
  ):
    with pytest.raises(ValueError, match=text):
      ptq161.ptq161(**how)
