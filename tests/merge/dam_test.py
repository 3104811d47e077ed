# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs
from treesurgeon.evaluate import backdoor, classification
from treesurgeon.merge import dam, mixed_models, mixture

SPEC = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=6, num_layers=2)
RNG = np.random.default_rng(0)
KEY = jax.random.key(3)


def make(seed):
  return model.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


def batch(count=8):
  return {
    "inputs": RNG.random((count, 2, 2, 1)).astype(np.float32),
    "labels": RNG.integers(0, 3, count).astype(np.int32),
  }


BASE, DONORS = make(0), [make(1), make(2)]
BATCHES = ([batch(), batch()], [batch()])


def run(expression, batches=BATCHES, donors=DONORS):
  (one,) = registry.parse(expression)
  return one.apply(BASE, {"donors": needs.Aligned(donors), "batches": batches}, KEY)


def test_a_mask_is_a_relaxed_coin():
  logits = np.array([-1.0, 0.0, 2.0])
  u = np.array([0.2, 0.5, 0.9])
  want = 1 / (1 + np.exp(-(logits + np.log(u / (1 - u))) / 0.5))
  arrays = (jnp.asarray(x, jnp.float32) for x in (logits, u))
  np.testing.assert_allclose(dam.concrete(*arrays, temperature=0.5), want, rtol=1e-5)
  cold = dam.concrete(jnp.array([-1.0, 1.0]), jnp.full(2, 0.5), temperature=0.01)
  np.testing.assert_allclose(cold, [0, 1], atol=1e-6)


def test_masks_have_mean_one_in_each_layer():
  mask = jnp.asarray(RNG.random((2, 3, 4)), jnp.float32)
  np.testing.assert_allclose(dam.rescaled(mask, stacked=True).mean((1, 2)), [1, 1], rtol=1e-6)
  np.testing.assert_allclose(dam.rescaled(mask, stacked=False).mean(), 1, rtol=1e-6)


def test_without_masks_it_is_adamerging():
  given = "init=0.4, steps=3, rate=0.01"
  a, b = run(f"merge.dam(mask_steps=0, {given})"), run(f"merge.adamerging({given})")
  for address in BASE.addresses():
    np.testing.assert_array_equal(a.leaf(address), b.leaf(address))


def test_a_mask_of_even_odds_changes_nothing():
  plan, parts = mixed_models.gather(BASE, needs.Aligned(DONORS), ".*", granularity="task")
  zeros = {n: jnp.zeros(w.shape) for n, w in parts.base.items()}
  for masks in (1, 2):
    mask = dam._sample(plan, (zeros,) * masks, None, jnp.float32(0.5))
    restricted = dam._restricted(parts, mask)
    for got, want in zip(restricted.donors, parts.donors, strict=True):
      for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_the_masks_move_in_turn_and_the_noise_always():
  plan, parts = mixed_models.gather(BASE, needs.Aligned(DONORS), ".*", granularity="tensor")
  settings = (plan, "entropy", (0.0, 1.0), 0.1, 0.01)
  numbers = dam.Numbers(*map(jnp.float32, (0.5, 1.0, 0.1)))
  found = mixture.start(plan, 2, 0.3)
  given = dam._together((BATCHES[0][0], BATCHES[1][0]))
  state = dam._begin(settings, parts, given, 2)
  for i in range(2):
    new = dam._step(settings, state, parts, found, given, KEY, jnp.int32(i), numbers)
    moved = [
      any(bool((a != b).any()) for a, b in zip(x.values(), y.values(), strict=True))
      for x, y in zip(new.logits, state.logits, strict=True)
    ]
    assert moved == [i == 0, i == 1]
    assert float(jnp.abs(new.noise - state.noise).max()) <= 0.0101
    assert (new.noise != state.noise).any()
    state = new


def test_the_noise_changes_predictions_as_a_trigger_would():
  params, given = BASE.params, BATCHES[0][0]
  quiet = dam._risk(SPEC, params, given, jnp.zeros((2, 2, 1)), bounds=None, penalty="consistency")
  logits = np.asarray(models.forward(SPEC, params, given["inputs"]).logits, np.float64)
  want = (np.log(np.exp(logits).sum(1)) - logits.max(1)).mean()
  np.testing.assert_allclose(quiet, want, rtol=1e-5)
  entropy = dam._risk(SPEC, params, given, jnp.ones((2, 2, 1)), bounds=(0, 1), penalty="entropy")
  ones = {**given, "inputs": np.ones_like(given["inputs"])}
  np.testing.assert_allclose(entropy, models.entropy(SPEC, params, ones), rtol=1e-5)


@pytest.mark.parametrize("masks", [1, 2])
def test_learned_masks_lower_what_they_mind(masks):
  """The entropy after many steps is below task arithmetic's, and the storage dtype is kept."""
  merged = run(
    f"merge.dam(mask_steps=60, mask_rate=0.1, steps=0, masks={masks}, granularity='task')"
  )
  plain = run("merge.task_arithmetic(lam=0.3)")

  def entropy(m):
    return float(sum(models.entropy(SPEC, m.params, b[0]) for b in BATCHES))

  assert entropy(merged) < entropy(plain)


@pytest.mark.slow
def test_tokens_are_disturbed_in_their_embeddings():
  spec = models.Spec(vocab_size=7, d_model=4, num_layers=1, num_heads=1, d_ff=8)
  a, b = (model.Model(spec, models.init(spec, jax.random.key(i))) for i in (0, 1))
  tokens = RNG.integers(0, 7, (2, 5))
  (one,) = registry.parse("merge.dam(mask_steps=2, mask_rate=0.1, steps=0)")
  out = one.apply(a, {"donors": needs.Aligned([b]), "batches": ([tokens],)}, KEY)
  assert out.spec == spec
  noise = dam._begin(
    (mixed_models.gather(a, needs.Aligned([b]), ".*", granularity="task")[0], "", None, 0.1, 0.1),
    mixed_models.gather(a, needs.Aligned([b]), ".*", granularity="task")[1],
    dam._together((tokens,)),
    1,
  ).noise
  assert noise.shape == (1, 4, 4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("masks=3", r"masks=3, penalty='entropy'; valid: 1, 2; entropy, consistency"),
    ("penalty='x'", "penalty='x'; valid"),
    ("temperature=0.0", "temperature=0.0 must be above 0"),
    ("mask_rate=0.0", "mask_rate=0.0 must be above 0"),
    ("mask_steps=-1", "mask_steps=-1 must not be negative"),
    ("granularity='row'", "granularity='row'; valid: task, layer, tensor"),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    registry.parse(f"merge.dam({arguments})")


def test_batches_of_several_shapes_are_refused():
  with pytest.raises(ValueError, match="the tasks' batches must have one shape; these have"):
    run("merge.dam(mask_steps=1, steps=0)", ([batch(8)], [batch(4)]))
  with pytest.raises(ValueError, match="there is no batch to learn from"):
    run("merge.dam(mask_steps=1, steps=0)", ([], []))


def test_the_attack_success_rate_leaves_the_target_class_out():
  params = jax.tree.map(jnp.zeros_like, BASE.params)
  params["head"]["bias"] = jnp.array([0.0, 1.0, 0.0])
  always = BASE.replace(params=params)
  rows = batch(6)
  labels = np.array([0, 1, 1, 2, 0, 1])
  assert backdoor.attack_success_rate(always, rows, labels, target=1) == 1.0
  assert backdoor.attack_success_rate(always, rows, labels, target=0) == 0.0
  with pytest.raises(ValueError, match="every image is of the attacker's class 1"):
    backdoor.attack_success_rate(always, rows, [1] * 6, target=1)
  assert classification.accuracy(always, {**rows, "labels": labels}) == 0.5
  want = np.exp(1) / (np.exp(1) + 2)
  np.testing.assert_allclose(classification.confidence(always, rows), want, rtol=1e-6)
