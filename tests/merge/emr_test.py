# SPDX-License-Identifier: Apache-2.0
"""EMR against a float64 transcription of elect, mask and rescale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model, needs, step
from treesurgeon.merge import emr

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def by_definition(base, donors, task):
  """Returns the unscaled change of a task and the task vector."""
  deltas = [np.asarray(d, np.float64) - np.asarray(base) for d in donors]
  sign = np.where(sum(deltas) > 0, 1, -1)
  largest = np.max([np.where(d * sign > 0, np.abs(d), 0) for d in deltas], axis=0)
  return np.where(deltas[task] * sign > 0, sign * largest, 0), deltas[task]


def draw(count, shape=(7, 8)):
  base = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
  return base, tuple(
    base + jnp.asarray(0.1 * RNG.standard_normal(shape), jnp.float32) for _ in range(count)
  )


def test_equals_the_definition_and_preserves_the_mean_magnitude():
  base, donors = draw(4)
  for task in range(4):
    change, delta = by_definition(base, donors, task)
    wanted = change * np.abs(delta).sum() / np.abs(change).sum()
    got = np.asarray(emr.serve(base, donors, task=task), np.float64) - np.asarray(base)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    np.testing.assert_allclose(np.abs(got).mean(), np.abs(delta).mean(), rtol=1e-5)


def test_global_rescaling_takes_the_model_as_one_vector():
  shapes = {"a": (5, 6), "b": (7,)}
  drawn = {n: draw(3, s) for n, s in shapes.items()}
  base = model.Part(None, {n: b for n, (b, _) in drawn.items()})
  donors = [model.Part(None, {n: d[i] for n, (_, d) in drawn.items()}) for i in range(3)]
  (one,) = emr.emr(task=1, granularity="global")
  out = one.apply(base, {"donors": needs.Aligned(donors)}, KEY)
  parts = {n: by_definition(b, d, 1) for n, (b, d) in drawn.items()}
  scale = sum(np.abs(t).sum() for _, t in parts.values()) / sum(
    np.abs(c).sum() for c, _ in parts.values()
  )
  for name, (change, _) in parts.items():
    wanted = np.asarray(base.leaf(name)) + scale * change
    np.testing.assert_allclose(out.leaf(name), wanted, atol=2e-6)
  assert one.scope == "model"
  (aimed,) = step.by_path([("a", (one,))])
  assert aimed.units(["a", "b"]) == [("a",)]


def test_one_donor_is_rebuilt():
  base, donors = draw(1)
  np.testing.assert_allclose(emr.serve(base, donors, task=0), donors[0], atol=1e-6)


def test_zero_changes_bfloat16_and_scalars():
  for shape in ((), (3,)):
    base = jnp.ones(shape, jnp.bfloat16)
    got = emr.serve(base, (base, base), task=1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, base)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="granularity='row'; valid: tensor, global"):
    registry.parse("merge.emr(task=0, granularity='row')")
  base = model.Part(None, {"a": jnp.ones(1)})
  for how in emr.GRANULARITIES:
    (one,) = emr.emr(task=1, granularity=how)
    with pytest.raises(ValueError, match="task=1: there are 1 donors; valid: 0 to 0"):
      one.apply(base, {"donors": {"a": (jnp.ones(1),)}}, KEY)
