# SPDX-License-Identifier: Apache-2.0
"""VQ4DiT: candidates and mixtures by definition, and that they beat fixed assignments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import kmeans, vq4dit
from treesurgeon.core import leaves

KEY = jax.random.key(0)
HOW = {
  "length": 2, "entries": 8, "ratio_rate": 0.05, "table_rate": 1e-3, "weight": 0.1, "batch": 6,
  "iterations": 20,
}  # fmt: skip


def toy(seed=0):
  """Draws a block of two kernels and correlated inputs."""
  rng = np.random.default_rng(seed)
  w = {n: jnp.asarray(rng.normal(size=(9, 9)), jnp.float32) for n in ("up", "down")}
  x = rng.normal(size=(6, 10, 9)) @ rng.normal(size=(9, 9)) / 3
  x = jnp.asarray(x * np.exp(rng.normal(size=9)), jnp.float32)

  def forward(changes, h):
    up, down = (leaves.dense({**w, **changes}[n]) for n in ("up", "down"))
    return jnp.tanh(h @ up) @ down

  def calibrate(**how):
    run = functools.partial(
      vq4dit._block, inputs=x, targets=forward({}, x), forward=forward, key=KEY, **HOW, **how
    )
    made = jax.jit(run)(w)
    return made, float(jnp.square(forward(made, x) - forward({}, x)).mean())

  return w, calibrate


def test_candidates_are_the_nearest(monkeypatch):
  rng = np.random.default_rng(0)
  x, table = rng.normal(size=(20, 3)), rng.normal(size=(7, 3))
  monkeypatch.setattr(kmeans, "CHUNK", 7 * 6)
  found = vq4dit.candidates_of(jnp.asarray(x), jnp.asarray(table), count=3)
  order = np.argsort(((x[:, None] - table) ** 2).sum(-1), axis=1)[:, :3].T
  np.testing.assert_array_equal(found, order)


def test_mixture_by_definition():
  rng = np.random.default_rng(0)
  table, logits = rng.normal(size=(5, 2)), rng.normal(size=(3, 4, 6))
  choices = rng.integers(0, 5, (3, 4, 6))
  got = vq4dit.mixture(jnp.asarray(table), jnp.asarray(choices), jnp.asarray(logits))
  ratios = np.exp(logits) / np.exp(logits).sum(0)
  for r in range(4):
    for c in range(6):
      want = sum(ratios[i, r, c] * table[choices[i, r, c]] for i in range(3))
      np.testing.assert_allclose(got[2 * r : 2 * r + 2, c], want, rtol=1e-5, atol=1e-6)


def test_without_calibration_it_is_k_means():
  w, calibrate = toy()
  made, _ = calibrate(count=2, epochs=0)
  vectors = jnp.swapaxes(jnp.pad(w["up"], [(0, 1), (0, 0)]).reshape(5, 2, 9), 1, 2).reshape(-1, 2)
  index, _ = kmeans.nearest(vectors, made["up"].codebook)
  np.testing.assert_array_equal(made["up"].indices(), index.reshape(5, 9))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_candidates_beat_fixed_assignments(seed):
  _, calibrate = toy(seed)
  start = calibrate(count=2, epochs=0)[1]
  (fixed, before), (made, after) = (calibrate(count=c, epochs=150) for c in (1, 2))
  assert after < 0.9 * before < 0.9 * start, (after, before, start)
  moved = np.mean([np.mean(made[n].indices() != fixed[n].indices()) for n in made])
  assert 0.02 < moved < 0.8


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="candidates=9: valid is 1 to the 8 entries of a table"):
    vq4dit.vq4dit(entries=8, candidates=9)
  with pytest.raises(ValueError, match="batch=0: a step needs 1 row"):
    vq4dit.vq4dit(batch=0)
  with pytest.raises(ValueError, match=r"epochs=-1: valid is 0 \(k-means\) or more"):
    vq4dit.vq4dit(epochs=-1)
