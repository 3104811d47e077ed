# SPDX-License-Identifier: Apache-2.0
"""The layer-wise search: recipes are read right, and the outcome is never worse than the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs
from treesurgeon.merge import mixed_models, task_arithmetic, unconstrained
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
TEXT = [np.random.default_rng(5).integers(0, 11, (6, 8))]


def near(base, seed, size=0.2):
  rng = np.random.default_rng(seed)
  return base.replace(
    params=jax.tree.map(
      lambda x: (x + size * rng.standard_normal(x.shape)).astype(x.dtype), base.params
    )
  )


BASE = near(model.Model(SPEC, models.init(SPEC, jax.random.key(0))), 9, 0.3)
DONORS = [near(BASE, 1), near(BASE, 2)]
GIVEN = collect.Materials(batches=TEXT, donors=DONORS)


def nll(m):
  return float(models.nll(SPEC, m.params, TEXT[0]))


def test_a_genome_is_read_row_by_row():
  genome = np.array([[0.1, 0.2, 0.9, 0.0, 0.3], [0.3, 0.4, 0.1, 0.2, 0.8], [0.5, 0.6, 0, 1, 0]])
  found = unconstrained.recipe(genome.ravel(), methods=3, donors=2, layers=2)
  want = np.zeros((6, 3))
  want[0:2, 0], want[4:6, 1], want[2:4, 2] = (0.1, 0.2), (0.3, 0.4), (0.5, 0.6)
  np.testing.assert_allclose(np.asarray(found["layers"]), want[:, :2], atol=1e-7)
  np.testing.assert_allclose(np.asarray(found["rest"]), want[:, 2], atol=1e-7)


@pytest.mark.slow
def test_changes_are_prepared_as_the_methods_say():
  _, parts = mixed_models.gather(BASE, needs.Aligned(DONORS), ".*", granularity="layer")
  found = unconstrained.prepared(
    parts, jax.random.key(0), methods=unconstrained.METHODS, density=0.25
  )
  assert len(found.donors) == 6
  name = "layers/0:2/mlp/up/kernel"
  tau = np.asarray(DONORS[0].params["layers"]["0:2"]["mlp"]["up"]["kernel"]) - parts.base[name]
  plain, ties, dare = (np.asarray(found.donors[i][name]) - parts.base[name] for i in (0, 2, 4))
  np.testing.assert_allclose(plain, tau, atol=1e-6)
  kept = np.abs(ties) > 1e-6
  np.testing.assert_allclose(ties[kept], np.asarray(tau)[kept], atol=1e-6)
  assert 0.02 < kept.mean() < 0.3
  kept = np.abs(dare) > 1e-6
  np.testing.assert_allclose(dare[kept], 4 * np.asarray(tau)[kept], atol=1e-5)
  assert 0.1 < kept.mean() < 0.4
  assert (kept[0] != kept[1]).any()


def test_the_start_is_task_arithmetic_and_is_never_lost():
  start = drivers.run(unconstrained.unconstrained(budget=1, init=0.4), BASE, GIVEN)
  want = drivers.run(task_arithmetic.task_arithmetic(lam=0.4), BASE, GIVEN)
  for a in BASE.addresses():
    np.testing.assert_allclose(start.leaf(a), want.leaf(a), atol=1e-6)
  done = drivers.run(unconstrained.unconstrained(budget=60, init=0.4), BASE, GIVEN)
  note = done.lineage[0].notes
  np.testing.assert_allclose(note["first_loss"], nll(start), rtol=1e-5)
  np.testing.assert_allclose(note["loss"], nll(done), rtol=1e-5)
  assert nll(done) < nll(start)
  assert [r["layer"] for r in note["recipe"]] == [0, 1, "outside"]
  assert {r["method"] for r in note["recipe"]} <= set(unconstrained.METHODS)
  again = drivers.run(unconstrained.unconstrained(budget=60, init=0.4), BASE, GIVEN)
  for a in BASE.addresses():
    np.testing.assert_array_equal(again.leaf(a), done.leaf(a))


def test_mistakes_are_named():
  for text, message in (
    ("methods=('slerp',)", r"methods=\('slerp',\); valid: some of task_arithmetic, ties, dare"),
    ("init=2.0", "init=2.0 between low=0.0 and high=1.0"),
    ("budget=0", "budget=0 be at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      registry.parse(f"merge.unconstrained({text})")
  assert jnp.isfinite(nll(BASE))
