# SPDX-License-Identifier: Apache-2.0
"""PCB-Merging against a float64 transcription of its formulas, with sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model, needs
from treesurgeon.merge import pcb

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
merge = jax.jit(pcb.merge, static_argnames=("density", "granularity", "axis"))
compete = jax.jit(pcb.compete, static_argnames="density")


def oracle(tasks, density, weights=None):
  """Merges task vectors, one a row."""
  tasks = np.asarray(tasks, np.float64)
  count, size = tasks.shape
  magnitudes = np.sort(np.abs(tasks), axis=1)
  low = magnitudes[:, int(size * 1e-4), None]
  high = magnitudes[:, max(int(size * (1 - 1e-4) - 1), 0), None]
  clipped = np.clip(np.abs(tasks), low, high)
  beta = (clipped - low) / (high - low)
  scores = np.exp(count * beta**2) * np.tanh(tasks * tasks.sum(axis=0))
  bar = np.sort(scores, axis=1)[:, min(int(size * (1 - density)), size - 1), None]
  share = (np.maximum(scores, bar) - bar) / (scores.max(axis=1, keepdims=True) - bar)
  c = np.ones(count) if weights is None else np.asarray(weights)
  top = (c[:, None] * share * np.sign(tasks) * clipped).sum(axis=0)
  return top / np.maximum(share.sum(axis=0), 1e-12)


@pytest.mark.parametrize(
  ("count", "size", "density"),
  # Above 4096 entries are counted instead of sorted; at density .9 the bar is negative.
  [(2, 611, 0.05), (5, 611, 0.3), (3, 611, 1.0), (3, 5000, 0.1), (2, 5000, 0.9)],
)
def test_equals_the_formulas(count, size, density):
  tasks = (0.1 * RNG.standard_normal((count, size))).astype(np.float32)
  parts = [[jnp.asarray(t[:200]), jnp.asarray(t[200:])] for t in tasks]
  weights = tuple(np.linspace(0.5, 1.3, count))
  got = np.concatenate(compete(parts, density=density, weights=weights))
  np.testing.assert_allclose(got, oracle(tasks, density, weights), atol=1e-6)


def test_a_single_task_keeps_its_clipped_winners():
  delta = (0.1 * RNG.standard_normal(500)).astype(np.float32)
  got = np.asarray(merge(jnp.zeros(500), (jnp.asarray(delta),), density=0.1, lam=1.0))
  order = np.sort(np.abs(delta))
  wins = np.abs(delta) > order[450]
  clipped = np.sign(delta) * np.minimum(np.abs(delta), order[int(500 * (1 - 1e-4) - 1)])
  np.testing.assert_allclose(got, np.where(wins, clipped, 0), atol=1e-7)


def test_rows_compete_by_themselves():
  base = np.zeros((40, 3), np.float32)
  donors = [(0.1 * RNG.standard_normal(base.shape)).astype(np.float32) for _ in range(2)]
  got = merge(
    jnp.asarray(base), tuple(map(jnp.asarray, donors)),
    density=0.2, lam=1.2, granularity="row", axis=-2,
  )  # fmt: skip
  for j in range(3):
    wanted = 1.2 * oracle([d[:, j] for d in donors], 0.2)
    np.testing.assert_allclose(got[:, j], wanted, atol=1e-6)


def test_the_model_competes_as_one_vector():
  shapes = {"a": (20, 6), "b": (17,)}
  base = {n: RNG.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
  near = [
    {n: (x + 0.1 * RNG.standard_normal(x.shape)).astype(np.float32) for n, x in base.items()}
    for _ in range(3)
  ]
  (one,) = pcb.pcb(granularity="global", density=0.2, weights=(1.0, 0.8, 1.2))
  m = model.Part(None, jax.tree.map(jnp.asarray, base))
  donors = [model.Part(None, jax.tree.map(jnp.asarray, d)) for d in near]
  out = one.apply(m, {"donors": needs.Aligned(donors)}, KEY)
  vectors = [np.concatenate([(d[n] - base[n]).ravel() for n in shapes]) for d in near]
  change = 1.2 * oracle(vectors, 0.2, (1.0, 0.8, 1.2))
  got = np.concatenate([(np.asarray(out.leaf(n), np.float64) - base[n]).ravel() for n in shapes])
  np.testing.assert_allclose(got, change, atol=1e-6)
  aimed = one.reselect("a")
  assert aimed.units(["a", "b"]) == [("a",)]


def test_zero_changes_bfloat16_and_scalars():
  for shape, how in (((), "row"), ((1,), "tensor"), ((2, 2), "row")):
    base = jnp.ones(shape, jnp.bfloat16)
    got = merge(base, (base, base), granularity=how)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="granularity='layer'; valid: tensor, row, global"):
    registry.parse("merge.pcb(granularity='layer')")
  with pytest.raises(ValueError, match="density=-1 must lie between 0 and 1"):
    registry.parse("merge.pcb(density=-1)")
  with pytest.raises(ValueError, match="nothing can vary in it"):
    pcb.pcb(lam=((".*", 1.0),), granularity="global")
