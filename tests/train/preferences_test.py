# SPDX-License-Identifier: Apache-2.0
"""Preference objectives against float64, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.models import preferences as arrays
from treesurgeon.train import preferences

SPEC = models.Spec(vocab_size=7, d_model=4, num_layers=1, num_heads=1, d_ff=8)
PARAMS, OTHER = (models.init(SPEC, jax.random.key(i)) for i in (0, 1))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 7, (3, 5)).astype(np.int32)
PAIRS = {"chosen": TOKENS, "rejected": RNG.integers(0, 7, (3, 4)).astype(np.int32)}


FORWARD = jax.jit(lambda p, x: models.forward(SPEC, p, x).logits)


def log_probs(params, tokens):
  logits = np.asarray(FORWARD(params, tokens[:, :-1]), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], -1)[..., 0]


def test_dpo_is_the_formula():
  loss, aux = preferences.dpo(OTHER, beta=0.3)(SPEC, PARAMS, PAIRS, None)
  ratio = [(log_probs(PARAMS, x) - log_probs(OTHER, x)).sum(1) for x in PAIRS.values()]
  margin = 0.3 * (ratio[0] - ratio[1])
  assert float(loss) == pytest.approx(-np.log(1 / (1 + np.exp(-margin))).mean(), rel=1e-5)
  assert float(aux["margin"]) == pytest.approx(margin.mean(), abs=1e-6)
  assert float(aux["accuracy"]) == pytest.approx((margin > 0).mean())
  assert float(aux["weight"]) == 3


def test_a_reference_given_with_the_batch_is_the_same():
  given = arrays.pair_log_probs(SPEC, OTHER, PAIRS)
  batch = {**PAIRS, "reference_chosen": given[0], "reference_rejected": given[1]}
  inside, _ = preferences.dpo(OTHER)(SPEC, PARAMS, PAIRS, None)
  brought, _ = preferences.dpo()(SPEC, PARAMS, batch, None)
  assert float(inside) == float(brought)
  with pytest.raises(ValueError, match="dpo has no reference: give reference_params"):
    preferences.dpo()(SPEC, PARAMS, PAIRS, None)


def test_no_gradient_where_the_answers_are_equal_and_none_into_the_reference():
  same = {"chosen": TOKENS, "rejected": TOKENS}
  both = lambda p, q, pairs: preferences.dpo(q)(SPEC, p, pairs, None)[0]
  here, there = jax.jit(jax.grad(both, argnums=(0, 1)))(PARAMS, OTHER, same)
  assert max(float(abs(np.asarray(x)).max()) for x in jax.tree.leaves(here)) < 1e-7
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(there))


def test_ppo_is_the_formula():
  rng = np.random.default_rng(1)
  logp, sampled, reference = (-rng.random((4, 3)) for _ in range(3))
  rewards, weights = rng.standard_normal(4), (rng.random((4, 3)) < 0.8).astype(float)
  loss, kl = arrays.ppo(
    *(jnp.asarray(x, jnp.float32) for x in (logp, sampled, reference, rewards, weights)),
    beta=0.3, clip=0.1,
  )  # fmt: skip
  want_kl = ((sampled - reference) * weights).sum(1)
  returns = rewards - 0.3 * want_kl
  advantage = (returns - returns.mean())[:, None]
  ratio = np.exp(logp - sampled)
  gain = np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage)
  np.testing.assert_allclose(kl, want_kl, rtol=1e-5)
  assert float(loss) == pytest.approx(-(gain * weights).sum() / weights.sum(), rel=1e-4)


def test_ppo_is_pulled_towards_its_reference():
  """With no reward to gain, a step makes answers likelier that the reference prefers."""
  tokens = jnp.concatenate([TOKENS, jnp.full_like(TOKENS, 3)])
  sampled = arrays.token_log_probs(SPEC, PARAMS, tokens)
  batch = {"tokens": tokens, "weights": np.ones((6, 4)), "rewards": np.zeros(6), "sampled": sampled}
  objective = preferences.ppo(OTHER, beta=1.0)
  step = jax.jit(jax.value_and_grad(lambda p: objective(SPEC, p, batch, None), has_aux=True))
  (_, aux), slope = step(PARAMS)
  gap = (log_probs(OTHER, tokens) - log_probs(PARAMS, tokens)).sum(1)
  assert float(aux["divergence"]) == pytest.approx(-gap.mean(), rel=1e-4)
  moved = jax.tree.map(lambda x, g: x - 0.05 * g, PARAMS, slope)
  change = (log_probs(moved, tokens) - log_probs(PARAMS, tokens)).sum(1)
  assert ((gap - gap.mean()) * change).sum() > 0
  itself, _ = preferences.ppo(PARAMS)(SPEC, PARAMS, batch, None)
  assert float(itself) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("make", [preferences.dpo, preferences.ppo])
def test_wrong_arguments_are_named(make):
  with pytest.raises(ValueError, match="beta=0 must be above 0"):
    make(beta=0)
  with pytest.raises(ValueError, match="clip=-1 must be above 0"):
    preferences.ppo(clip=-1)
  with pytest.raises(ValueError, match="a batch of preferences holds tokens, x; valid"):
    arrays.check({"tokens": 1, "x": 2})
