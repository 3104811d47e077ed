# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model
from treesurgeon.merge import bang
from treesurgeon.train import objectives

SPEC = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
RNG = np.random.default_rng(0)
BATCH = {
  "inputs": RNG.standard_normal((6, 2, 2, 1)).astype(np.float32),
  "labels": np.arange(6, dtype=np.int32) % 3,
}
START = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
KEY = jax.random.key(0)


def run(batches, start=START, **arguments):
  (one,) = bang.bang(**arguments)
  return one.apply(start, {"batches": batches}, KEY)


def test_the_smoothed_loss_is_cross_entropy_to_soft_labels():
  logits = RNG.standard_normal((5, 4))
  labels = np.array([0, 3, 1, 1, 2])
  weights = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
  target = 0.8 * np.eye(4)[labels] + 0.2 / 4
  logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  want = (-(target * logp).sum(1) * weights).sum() / weights.sum()
  arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(weights, jnp.float32)
  np.testing.assert_allclose(bang.smoothed(*arrays, smoothing=0.2), want, rtol=1e-5)


def test_it_is_the_objective_of_the_training_loop():
  objective = objectives.classification(label_smoothing=0.2)
  want, _ = objective(SPEC, START.params, BATCH, None)
  logits, labels, weights = models.predictions(SPEC, START.params, BATCH)
  np.testing.assert_allclose(bang.smoothed(logits, labels, weights, smoothing=0.2), want, rtol=1e-5)


def test_the_average_lies_on_the_line_between_start_and_fine_tuned():
  half = run([BATCH], alpha=0.5, steps=3, rate=0.01)
  full = run([BATCH], alpha=1.0, steps=3, rate=0.01)
  for address in START.addresses():
    want = (np.asarray(START.leaf(address)) + np.asarray(full.leaf(address))) / 2
    np.testing.assert_allclose(half.leaf(address), want, rtol=1e-5, atol=1e-6)
  assert full.aux["notes"]["last_loss"] < full.aux["notes"]["first_loss"]


def test_smoothing_and_mixup_leave_the_network_less_sure():
  def surest(**arguments):
    tuned = run([BATCH], alpha=1.0, steps=150, rate=0.03, **arguments)
    out = models.forward(SPEC, tuned.params, BATCH["inputs"]).logits
    return float(jax.nn.softmax(out).max(1).mean())

  plain = surest(smoothing=0.0)
  assert surest(smoothing=0.3) < plain - 0.1
  assert surest(smoothing=0.0, mixup=2.0) < plain - 0.02


def test_tokens_are_smoothed_but_not_mixed():
  spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
  m = model.Model(spec, models.init(spec, KEY, jnp.bfloat16))
  tokens = RNG.integers(0, 5, (2, 6))
  tuned = run([tokens], m, steps=2)
  assert {x.dtype.name for x in jax.tree.leaves(tuned.params)} == {"bfloat16"}
  with pytest.raises(ValueError, match=r"mixup=0.2 averages images; tokens have no average"):
    run([tokens], m, mixup=0.2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"smoothing": 1.0}, r"smoothing=1.0 must be in \[0, 1\)"),
    ({"mixup": -1.0}, "mixup=-1.0 must not be negative"),
    ({"rate": 0.0}, "rate=0.0 must be above 0"),
    ({"steps": -1}, "steps=-1 must not be negative"),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    bang.bang(**arguments)


def test_without_data_it_says_so():
  with pytest.raises(ValueError, match="there is no batch to learn from"):
    run([])
