# SPDX-License-Identifier: Apache-2.0
"""ZipLM: the order of removal against brute force, and the target against the table."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.prune import latency, structured_obs, ziplm
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(
  vocab_size=11, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=10, max_positions=16
)
TEXT = [np.random.default_rng(i).integers(0, 11, (4, 12)).astype(np.int32) for i in range(2)]
GIVEN = collect.Materials(batches=TEXT)
DAMPING = 0.01


def draw(seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  fill = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + (x.ndim == 2), x.dtype)
  return model.Model(SPEC, jax.tree.map(fill, shapes))


def greedy(w, h, block):
  """Remove units by trying each, in float64."""
  h = h + DAMPING * np.diag(h).mean() * np.eye(len(h))
  left, order, errors = list(range(len(w) // block)), [], [0.0]

  def cost(units):
    rows = [r for u in units for r in range(u * block, u * block + block)]
    new = np.zeros_like(w)
    if rows:
      new[rows] = np.linalg.solve(h[np.ix_(rows, rows)], h[rows] @ w)
    return np.trace((w - new).T @ h @ (w - new))

  while left:
    costs = [cost([u for u in left if u != v]) for v in left]
    errors.append(min(costs))
    order.append(left.pop(int(np.argmin(costs))))
  return order, np.sqrt(np.array(errors) / np.trace(w.T @ h @ w))


@pytest.mark.parametrize("block", [1, 3])
def test_removal_is_the_brute_force_greedy(block):
  rng = np.random.default_rng(block)
  x = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))
  w, h = rng.normal(size=(12, 5)), x.T @ x
  found, errors = structured_obs.removal(
    jnp.asarray(w), jnp.asarray(h), block=block, damping=DAMPING
  )
  order, expected = greedy(w, h, block)
  assert found.tolist() == order
  np.testing.assert_allclose(errors, expected, rtol=2e-3, atol=1e-4)


def test_removing_a_duplicate_costs_nothing():
  rng = np.random.default_rng(4)
  x = rng.normal(size=(80, 12))
  x[:, 6:9] = x[:, 0:3]  # unit 2 gives what unit 0 does
  w, h = jnp.asarray(rng.normal(size=(12, 5))), jnp.asarray(x.T @ x)
  order, errors = structured_obs.removal(w, h, block=3, damping=1e-5)
  assert order[0] in (0, 2)
  assert errors[1] < 0.01 < 0.2 < errors[2]


def test_a_duplicate_head_goes_first_and_the_function_stays(tmp_path):
  m = draw()
  for i, (name, size) in itertools.product(range(2), (("q", 8), ("k", 4), ("v", 4))):
    address = f"layers/{i}/attn/{name}/kernel"
    w = m.leaf(address)
    m = m.update({address: w.at[:, size:].set(w[:, :size])})
  table = {"attention": {"1": 1.0, "2": 2.0}, "mlp": {"1": 0.0, "10": 0.0}, "other": 1.0}
  out = run(m, table, tmp_path / "table.json", speedup=1.6, damping=1e-5)
  assert (out.spec.num_heads, out.spec.num_kv_heads, out.spec.d_ff) == (2, 1, 10)
  before, after = (np.asarray(models.forward(x.spec, x.params, TEXT[0]).logits) for x in (m, out))
  np.testing.assert_allclose(after, before, atol=0.02 * np.abs(before).max())


def run(m, table, path, **arguments):
  path.write_text(json.dumps(table))
  return drivers.run(ziplm.ziplm(latency=str(path), search=0, **arguments), m, GIVEN)


@pytest.mark.parametrize("speedup", [pytest.param(1.3, marks=pytest.mark.slow), 2.0])
def test_the_target_is_met_and_the_spec_says_so(speedup):
  m = draw()
  out = drivers.run(ziplm.ziplm(speedup=speedup, search=3), m, GIVEN)
  note = out.lineage[0].notes
  assert note["cost"][1] <= note["cost"][0] / speedup + 1e-6
  table = latency.counted(SPEC)
  paid = sum(table.cost("attention", k) for k in out.spec.per_layer("num_kv_heads"))
  paid += sum(table.cost("mlp", k) for k in out.spec.per_layer("d_ff"))
  assert paid == pytest.approx(note["cost"][1])
  assert {a: tuple(out.leaf(a).shape) for a in out.addresses()} == models.addresses(out.spec)
  assert note["kept"]["mlp"] == list(out.spec.per_layer("d_ff"))


@pytest.mark.slow
def test_search_never_raises_the_loss_and_the_cut_model_is_the_silenced_one():
  m = draw()
  plain, searched = (
    drivers.run(ziplm.ziplm(speedup=1.5, search=n), m, GIVEN, seed=1) for n in (0, 12)
  )
  loss = lambda x: float(models.nll(x.spec, x.params, TEXT[0]))
  assert loss(searched) <= loss(plain) + 1e-6
  (one,) = ziplm.ziplm(speedup=1.5, search=0)
  moments = collect.evidence(one, m, GIVEN)["inputs"]
  job = ziplm.Job(m, moments, latency.counted(SPEC), 1.5, DAMPING)
  plan = job.plan(np.ones(4))
  silent, small = job.silenced(plan), job.apply(plan)
  a, b = (models.forward(x.spec, x.params, TEXT[0]).logits for x in (silent, small))
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_met_is_named(tmp_path):
  m = draw()
  with pytest.raises(ValueError, match=r"weights cannot be met; the smallest possible is"):
    drivers.run(ziplm.ziplm(speedup=100.0), m, GIVEN)
  with pytest.raises(ValueError, match=r"speedup=0.5 must be at least 1"):
    ziplm.ziplm(speedup=0.5)
  with pytest.raises(ValueError, match=r"damping=0.0: valid is above 0"):
    ziplm.ziplm(damping=0.0)
  with pytest.raises(ValueError, match=r"no.json: not a latency table"):
    drivers.run(ziplm.ziplm(latency=str(tmp_path / "no.json")), m, GIVEN)
  short = {"attention": {"1": 1.0, "2": 2.0}, "mlp": {"1": 0.0, "5": 0.0}}
  with pytest.raises(ValueError, match=r"tells of mlp with 1 to 5 units, not 10"):
    run(m, short, tmp_path / "short.json")


@pytest.mark.slow
def test_a_measured_table_covers_all_that_is_asked():
  table = latency.measured(SPEC, length=4)
  assert table.unit == "ms" and sorted(table.attention) == [1, 2]
  assert all(table.cost("mlp", k) > 0 for k in ziplm.levels(10, "mlp"))
