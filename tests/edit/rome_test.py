# SPDX-License-Identifier: Apache-2.0
"""ROME against closed forms in float64, on a random network, and on a world of facts (slow)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry, stats
from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.edit import delta, rome, tokens, value

SPEC = models.Spec(
  vocab_size=24, d_model=16, num_layers=3, num_heads=2, d_ff=32, max_positions=32,
  positions="learned", norm="layer", gated=False, mlp_bias=True, activation="gelu_tanh", tied=True,
)  # fmt: skip
ADDRESS = "layers/1/mlp/down/kernel"
WISH = tokens.Tokenized(
  lead=(1,),
  prompt=tokens.Prompt((5, 6, 7, 8), 1, 2),
  new=(9, 10),
  essence=(tokens.Prompt((6, 7, 3), 0, 1),),
  separator=(2,),
  label="x",
)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
  params = models.init(SPEC, jax.random.key(0), jnp.float32)
  # As initialized, hardly anything reaches the logits: make kernels and embeddings large.
  params = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params)
  params["embed"] = jax.tree.map(lambda x: 30 * x, params["embed"])
  return model_lib.Model(SPEC, params)


@pytest.fixture(scope="module")
def covariance():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(500, 32)) * np.geomspace(1, 0.05, 32)[None, :]
  return stats.SecondMoment(jnp.asarray(x.T @ x, jnp.float32), jnp.float32(len(x)))


def problem(seed, f=48, d=20, samples=400):
  """Returns W, C, k, k0, v with an ill-conditioned C."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(samples, f)) * np.geomspace(1, 1e-2, f)[None, :]
  w, v = rng.normal(size=(f, d)), rng.normal(size=d)
  k0 = x[0]
  return w, x.T @ x / samples, k0 + 0.1 * x[1], k0, v


@pytest.mark.parametrize("seed", range(5))
def test_the_key_gives_the_value_and_the_update_has_rank_one(seed):
  w, c, k, k0, v = problem(seed)
  u, r = rome.rank_one_update(*(jnp.asarray(x, jnp.float32) for x in (w, c, k, k0, v)), ridge=1e-4)
  new = w + np.outer(np.asarray(u, np.float64), np.asarray(r, np.float64))
  np.testing.assert_allclose(k0 @ new, v, atol=1e-5)
  assert np.linalg.matrix_rank(new - w, tol=1e-6 * np.linalg.norm(new - w)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_update_equals_the_constrained_minimum_in_float64(seed):
  # min tr(D' C D) with k D = r, by the KKT system for all columns at once.
  w, c, k, _, v = problem(seed)
  c = c + 1e-3 * np.mean(np.diag(c)) * np.eye(len(c))
  f = len(c)
  system = np.block([[2 * c, k[:, None]], [k[None, :], np.zeros((1, 1))]])
  right = np.concatenate([np.zeros((f, w.shape[1])), (v - k @ w)[None, :]])
  best = np.linalg.solve(system, right)[:f]
  u, r = rome.rank_one_update(*(jnp.asarray(x, jnp.float32) for x in (w, c, k, k, v)), ridge=0.0)
  np.testing.assert_allclose(np.outer(u, r), best, rtol=2e-3, atol=2e-3 * np.abs(best).max())
  cost = np.trace(best.T @ c @ best)
  for other in range(3):  # another change that meets the constraint costs more
    noise = np.random.default_rng(other).normal(size=best.shape)
    noise -= np.outer(k, k @ noise) / (k @ k)
    assert np.trace((best + 0.1 * noise).T @ c @ (best + 0.1 * noise)) > cost


def test_a_singular_covariance_is_raised_until_it_factors():
  w, _, _, k0, v = (jnp.asarray(x, jnp.float32) for x in problem(0))
  c = jnp.outer(k0, k0)
  u, r = rome.rank_one_update(w, c, k0, k0, v, ridge=0.0)
  np.testing.assert_allclose(k0 @ (w + jnp.outer(u, r)), v, atol=1e-4)


def test_an_edit_attains_in_the_network_what_was_sought(model, covariance):
  # The network with the changed matrix says what the network with the patched value says.
  change, note = rome.edit(model, WISH, covariance, KEY, layer=1, contexts=0, clamp=50.0, decay=0.0)
  after = delta.apply(model, change)
  rows = tokens.statements([(WISH.prompt, WISH.new)], before=WISH.lead)
  found = value.solve_value(
    SPEC, model.params, rows, tokens.statements([(WISH.essence[0], ())], before=WISH.lead),
    1, clamp=50.0, decay=0.0,
  )  # fmt: skip
  out = value.at_subject(SPEC, after.params, rows, 1, tap="mlp/out")[0]
  before = value.at_subject(SPEC, model.params, rows, 1, tap="mlp/out")[0]
  np.testing.assert_allclose(out, before + found.delta, rtol=1e-4, atol=1e-5)
  assert float(note["nll_after"]) < float(note["nll_before"])


def test_the_search_stops_early_and_keeps_to_the_clamp(model):
  rows = tokens.statements([(WISH.prompt, WISH.new)])
  v0 = value.at_subject(SPEC, model.params, rows, 1, tap="mlp/out")[0]
  easy = value.solve_value(SPEC, model.params, rows, rows, 1, stop=1e6)
  assert int(easy.steps) == 1
  assert not easy.delta.any()
  tight = value.solve_value(SPEC, model.params, rows, rows, 1, clamp=0.1, decay=0.0)
  assert bool(tight.clamped)
  np.testing.assert_allclose(jnp.linalg.norm(tight.delta), 0.1 * jnp.linalg.norm(v0), rtol=1e-3)
  none = value.solve_value(SPEC, model.params, rows, rows, 1, steps=0)
  assert float(none.nll) == pytest.approx(float(none.start))


@pytest.mark.slow
def test_kl_on_the_essence_prompt_is_what_its_weight_buys(model):
  rows = tokens.statements([(WISH.prompt, WISH.new)])
  keep = tokens.statements([(WISH.essence[0], ())])
  before = models.forward(SPEC, model.params, keep.ids).logits[0, 2]

  def drift(kl):
    found = value.solve_value(SPEC, model.params, rows, keep, 1, kl=kl, clamp=50.0, decay=0.0)
    patch = value._add(keep, 1, found.delta)
    after = models.forward(SPEC, model.params, keep.ids, patch=patch).logits[0, 2]
    p, q = jax.nn.log_softmax(after), jax.nn.log_softmax(before)
    return float((jnp.exp(p) * (p - q)).sum())

  assert drift(10.0) < 0.5 * drift(0.0)


def test_contexts_go_between_the_lead_and_the_prompt():
  drawn = [jnp.array([[11, 12], [13, 14]])]
  rows = value.in_contexts(WISH, drawn, length=12)
  assert rows.ids[0].tolist() == [1, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0]
  assert rows.ids[2].tolist() == [1, 13, 14, 2, 5, 6, 7, 8, 9, 0, 0, 0]
  assert rows.subject.tolist() == [3, 6, 6]
  assert rows.labels[2].tolist() == [-1] * 7 + [9, 10] + [-1] * 3


def test_capturing_and_patching_back_changes_no_bit(model):
  ids = jnp.array([[1, 5, 6, 7]])
  seen = models.forward(SPEC, model.params, ids, observe=lambda n, x: x if n == "mlp/out" else None)
  kept = seen.observed["mlp/out"]

  def patch(name, x, layer):
    return kept[layer] if name == "mlp/out" else x

  back = models.forward(SPEC, model.params, ids, patch=patch)
  assert np.array_equal(back.logits, seen.logits)


def test_the_step_reports_and_returns_its_delta(model, covariance):
  (one,) = rome.rome(layer=1, steps=5, contexts=2)
  evidence = {
    "requests": [WISH, dataclasses.replace(WISH, new=(4,))],
    "covariance": {ADDRESS: covariance},
  }
  out = one.apply(model, evidence, KEY)
  assert [n["request"] for n in out.aux["notes"]["edits"]] == ["x", "x"]
  change = out.aux["delta"]
  assert change.parts[ADDRESS].rank == 2
  again = delta.apply(model, change)
  np.testing.assert_allclose(again.leaf(ADDRESS), out.leaf(ADDRESS), atol=1e-5)
  assert (
    out.leaf("layers/0/mlp/down/kernel").tolist() == model.leaf("layers/0/mlp/down/kernel").tolist()
  )


def test_the_identity_for_covariance_needs_no_text(model):
  (one,) = rome.rome(layer=1, steps=2, contexts=0, covariance=False)
  assert set(one.needs) == {"requests"}
  out = one.apply(model, {"requests": [WISH]}, KEY)
  u = out.aux["delta"].parts[ADDRESS].a[:, 0]
  rows = value.in_contexts(WISH, [], length=8)
  k = value.at_subject(SPEC, model.params, rows, 1, tap="mlp/down/in")[0]
  np.testing.assert_allclose(u / jnp.linalg.norm(u), k / jnp.linalg.norm(k), atol=1e-5)


def test_no_requests_is_the_identity(model):
  (one,) = rome.rome(layer=1)
  assert one.apply(model, {"requests": [], "covariance": {}}, KEY) is model


def test_mistakes_are_named(model):
  with pytest.raises(ValueError, match=r"layer=-1.* must be >= 0"):
    rome.rome(layer=-1)
  with pytest.raises(ValueError, match=r"rate=0 and clamp=4.0 must be > 0"):
    rome.rome(rate=0)
  (one,) = rome.rome(layer=7)
  with pytest.raises(ValueError, match="no address matches"):
    one.units(model.addresses())
  with pytest.raises(ValueError, match="no address matches"):
    one.apply(model, {"requests": [WISH]}, KEY)
  short = model.replace(spec=dataclasses.replace(SPEC, max_positions=12))
  (one,) = rome.rome(layer=1, covariance=False)
  with pytest.raises(ValueError, match=r"takes 17 tokens, the model has 12 positions"):
    one.apply(short, {"requests": [WISH]}, KEY)


def test_a_compressed_leaf_is_refused(model):
  low = leaves.LowRank(jnp.ones((32, 2)), jnp.ones((2, 16)))
  packed = model.update({ADDRESS: low})
  (one,) = rome.rome(layer=1, covariance=False)
  with pytest.raises(ValueError, match=f"{ADDRESS} is a LowRank; edits need a dense leaf"):
    one.apply(packed, {"requests": [WISH]}, KEY)


def test_the_spelling_is_read_back():
  text = "edit.rome(layer=2, requests='edits.json', covariance=False)"
  assert repr(registry.parse(text)[0]) == text


@pytest.mark.slow
def test_on_a_world_of_facts_the_order_of_the_paper_holds():
  from treesurgeon.configs import facts as config
  from treesurgeon.experiments import train_facts

  c = config.get_config("quick")
  learned = train_facts.learn(c, 0)
  assert train_facts.recall(learned, shown=False) >= 0.97
  subject, _ = train_facts.effects(learned)
  assert subject[c.layer] >= 0.3
  scores = train_facts.compare(learned, c)
  best, plain, tuned = (scores[k] for k in ("ROME", "ROME, C = I", "fine-tuning"))
  assert best["ES"] >= 0.85  # all eight edits on one processor, seven on another
  assert best["PS"] >= 0.9
  assert best["NS"] >= 0.95
  assert plain["world_kl"] > 2 * best["world_kl"]
  assert plain["NM"] < best["NM"]
  assert tuned["NS"] < best["NS"]
