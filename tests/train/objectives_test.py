# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.train import objectives

MASK = jax.jit(objectives.mask_tokens, static_argnames=("mask_id", "vocab_size", "rate", "special"))


def oracle(logits, targets, weights):
  x = np.asarray(logits, np.float64)
  x = x - x.max(-1, keepdims=True)
  nll = np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, targets[..., None], -1)[..., 0]
  return (nll * weights).sum() / weights.sum()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_float64(scale, weighted):
  rng = np.random.default_rng(0)
  logits = (scale * rng.standard_normal((3, 5, 7))).astype(np.float32)
  targets = rng.integers(0, 7, (3, 5)).astype(np.int32)
  weights = rng.random((3, 5)).astype(np.float32) if weighted else np.ones((3, 5), np.float32)
  loss, aux = objectives.cross_entropy(
    jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights) if weighted else None
  )
  assert float(loss) == pytest.approx(oracle(logits, targets, weights), rel=1e-5)
  hits = (logits.argmax(-1) == targets) * weights
  assert float(aux["accuracy"]) == pytest.approx(hits.sum() / weights.sum(), rel=1e-5)
  assert float(aux["weight"]) == pytest.approx(weights.sum(), rel=1e-6)


def test_log_softmax_is_float32_for_low_precision_logits():
  logits = jnp.array([[[30.0, 30.125, -10.0]]], jnp.bfloat16)
  targets = jnp.zeros((1, 1), jnp.int32)
  loss, _ = objectives.cross_entropy(logits, targets)
  want = oracle(np.asarray(logits, np.float64), np.zeros((1, 1), int), np.ones((1, 1)))
  assert loss.dtype == jnp.float32
  assert float(loss) == pytest.approx(want, rel=1e-6)


def test_what_weighs_nothing_cannot_hurt():
  logits = jnp.array([[[0.0, 0.0], [jnp.inf, -jnp.inf]]])
  targets = jnp.array([[0, 99]], jnp.int32)
  weights = jnp.array([[1.0, 0.0]])
  loss, _ = objectives.cross_entropy(logits, targets, weights)
  assert float(loss) == pytest.approx(np.log(2))
  none, aux = objectives.cross_entropy(logits, targets, 0 * weights)
  assert float(none) == 0 and float(aux["accuracy"]) == 0


def test_masking_has_berts_rates_and_spares_special_tokens():
  tokens = jnp.tile(jnp.arange(100, dtype=jnp.int32)[None, :], (200, 1))
  keys = jax.random.split(jax.random.key(0), 200)
  x, w = MASK(keys, tokens, mask_id=100, vocab_size=100, rate=0.3, special=(0, 1))
  x, w, tokens = np.asarray(x), np.asarray(w), np.asarray(tokens)
  assert (x[w == 0] == tokens[w == 0]).all()
  assert w[:, :2].sum() == 0 and w[:, 2:].mean() == pytest.approx(0.3, abs=0.02)
  chosen, before = x[w == 1], tokens[w == 1]
  assert (chosen == 100).mean() == pytest.approx(0.8, abs=0.02)
  assert (chosen == before).mean() == pytest.approx(0.1, abs=0.02)


def test_masking_of_an_example_does_not_depend_on_its_batch():
  tokens = jnp.tile(jnp.arange(50, dtype=jnp.int32)[None, :], (4, 1))
  keys = jax.random.split(jax.random.key(0), 4)
  whole, _ = MASK(keys, tokens, mask_id=50, vocab_size=50)
  half, _ = MASK(keys[2:], tokens[2:], mask_id=50, vocab_size=50)
  assert (whole[2:] == half).all()


def test_next_token_takes_weights_beside_tokens():
  spec = models.Spec(vocab_size=7, d_model=4, num_layers=1, num_heads=1, d_ff=8)
  params = models.init(spec, jax.random.key(0))
  tokens = jnp.array([[1, 2, 3, 4]], jnp.int32)
  objective = jax.jit(objectives.next_token(), static_argnums=0)
  plain, _ = objective(spec, params, tokens, None)
  logits = jax.jit(lambda p, t: models.forward(spec, p, t).logits)(params, tokens[:, :-1])
  assert float(plain) == pytest.approx(
    oracle(logits, np.asarray(tokens[:, 1:]), np.ones((1, 3))), rel=1e-5
  )
  weights = jnp.array([[0.0, 1.0, 0.0]])
  one, aux = objective(spec, params, {"tokens": tokens, "weights": weights}, None)
  assert float(one) == pytest.approx(
    oracle(logits, np.asarray(tokens[:, 1:]), np.asarray(weights)), rel=1e-5
  )
  assert float(aux["weight"]) == 1


def test_masked_token_scores_chosen_places_from_both_sides():
  spec = models.Spec(
    vocab_size=20, d_model=8, num_layers=1, num_heads=2, d_ff=8, kind="encoder", mlm_head=True
  )
  params = models.init(spec, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 19)
  keys = jax.random.split(jax.random.key(2), 3)
  objective = jax.jit(objectives.masked_token(mask_id=19, rate=0.4), static_argnums=0)
  loss, aux = objective(spec, params, tokens, keys)
  x, w = MASK(keys, tokens, mask_id=19, vocab_size=20, rate=0.4)
  logits = jax.jit(lambda p, t: models.forward(spec, p, t).logits)(params, x)
  want = oracle(logits, np.asarray(tokens), np.asarray(w))
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert float(aux["weight"]) == float(w.sum())
  with pytest.raises(ValueError, match="mask_id=20 is outside the vocabulary of 20"):
    objectives.masked_token(mask_id=20)(spec, params, tokens, keys)
