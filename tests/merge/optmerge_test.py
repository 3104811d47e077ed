# SPDX-License-Identifier: Apache-2.0
"""OptMerge against float64 transcriptions of its two official scripts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.merge import optmerge

RNG = np.random.default_rng(0)
# Compiled as one program: by itself, each of its operations would be compiled for each shape.
run = jax.jit(
  optmerge.denoised_interference, static_argnames=("variant", "steps", "axis", "matrix")
)  # fmt: skip


def merge(base, donors, **more):
  return run(jnp.asarray(base), tuple(map(jnp.asarray, donors)), **more)


def draw(shape, count, size=0.02):
  base = RNG.standard_normal(shape).astype(np.float32)
  near = [(base + size * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]
  return base, near


def deltas_of(base, donors):
  return [d.astype(np.float64) - base for d in donors]


def parts(deltas, variant):
  """What each donor should answer, what it reads, and its weight."""
  k = min(deltas[0].shape) // len(deltas)
  mean = np.mean(deltas, axis=0) if variant == "full" else 0.0
  found = []
  for d in deltas:
    u, s, v = np.linalg.svd(d - mean, full_matrices=False)
    answer = u[:, :k] @ np.diag(s[:k]) @ v[:k] + mean
    _, s, v = np.linalg.svd(d, full_matrices=False)
    found.append((answer, np.diag(s[:k]) @ v[:k], np.square(d).sum()))
  return found


def loss(tau, found):
  return sum(np.square((tau - t) @ b.T).sum() / n for t, b, n in found)


def oracle(deltas, variant, steps):
  found = parts(deltas, variant)
  slope = lambda x: sum(2 * (x - t) @ b.T @ b / n for t, b, n in found)
  x = sum(deltas) if variant == "full" else np.mean(deltas, axis=0)
  m, v = np.zeros_like(x), np.zeros_like(x)
  for t in range(1, steps + 1):
    g = slope(x)
    if variant == "full":
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      x = x - 1e-5 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    else:
      m = 0.9 * m + g
      x = x - 1e-4 * m
  return x


@pytest.mark.parametrize("variant", optmerge.VARIANTS)
@pytest.mark.parametrize("shape", [(12, 21), (21, 12)])
def test_equals_the_official_loop(shape, variant):
  base, donors = draw(shape, 3)
  got = merge(base, donors, variant=variant)
  wanted = base + oracle(deltas_of(base, donors), variant, 300)
  np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("variant", optmerge.VARIANTS)
def test_one_donor_is_returned(variant):
  base, donors = draw((9, 12), 1)
  got = merge(base, donors, variant=variant)
  np.testing.assert_allclose(got, donors[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", optmerge.VARIANTS)
def test_the_loss_falls(variant):
  base, donors = draw((16, 24), 4)
  deltas = deltas_of(base, donors)
  found = parts(deltas, variant)
  narrow = [d.astype(np.float32) for d in deltas]
  values = [
    loss(np.asarray(merge(0 * base, narrow, variant=variant, steps=n), np.float64), found)
    for n in (0, 30, 300)
  ]
  assert values == sorted(values, reverse=True)
  assert values[2] < 0.999 * values[0]


@pytest.mark.parametrize("variant", optmerge.VARIANTS)
def test_edges(variant):
  base, donors = draw((7, 9), 2)
  turned = merge(base.T, [d.T for d in donors], variant=variant, steps=20, axis=0)
  straight = merge(base, donors, variant=variant, steps=20)
  np.testing.assert_allclose(turned.T, straight, atol=1e-6, rtol=0)
  np.testing.assert_array_equal(merge(base, [base, base], variant=variant, steps=20), base)
  assert np.isfinite(merge(base, [donors[0], base], variant=variant, steps=20)).all()
  assert np.isfinite(merge(*draw((3, 4), 6), variant=variant, steps=20)).all()
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  assert merge(cast[0], cast[1:], variant=variant, steps=20).dtype == jnp.bfloat16


def test_other_leaves_receive_the_mean():
  base, donors = draw((11,), 3)
  got = merge(base, donors)
  np.testing.assert_allclose(got, np.mean(donors, axis=0), atol=1e-6, rtol=0)
  assert not re.fullmatch(optmerge.MATRICES, "lm_head/kernel")
  assert not re.fullmatch(optmerge.MATRICES, "model.lm_head.weight")
  assert re.fullmatch(optmerge.MATRICES, "layers/0/mlp/up/kernel")


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="variant='dora'; valid: full, lora"):
    registry.parse("merge.optmerge(variant='dora')")
  with pytest.raises(ValueError, match="lr=-1.0 must not be negative"):
    registry.parse("merge.optmerge(lr=-1.0)")
