# SPDX-License-Identifier: Apache-2.0
"""Distillation: the loss against numpy, what trains and what does not, who may teach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.distill import logits, losses, student
from treesurgeon.compress.low_rank import svd
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, model
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop

SPEC = models.Spec(vocab_size=7, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=16)
SMALL = dataclasses.replace(SPEC, num_layers=1, num_heads=1, num_kv_heads=1, d_ff=6)
TEXT = [np.random.default_rng(0).integers(0, 7, (4, 9)).astype(np.int32)]


def net(spec, seed=0):
  return model.Model(spec, models.init(spec, jax.random.key(seed)))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_divergence_is_numpys():
  rng = np.random.default_rng(1)
  student, teacher, weights = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), rng.random(5)
  for t in (1.0, 3.0):
    p, q = log_softmax(teacher / t), log_softmax(student / t)
    each = (np.exp(p) * (p - q)).sum(-1)
    expected = t**2 * (each * weights).sum() / weights.sum()
    found = losses.divergence(*(jnp.asarray(x) for x in (student, teacher, weights)), temperature=t)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_at_high_temperature_it_is_the_squared_difference_of_centred_logits():
  rng = np.random.default_rng(2)  # Hinton et al., section 2.1
  a, b = (x - x.mean(-1, keepdims=True) for x in rng.normal(size=(2, 4, 7)))
  found = losses.divergence(jnp.asarray(a), jnp.asarray(b), jnp.ones(4), temperature=100.0)
  np.testing.assert_allclose(found, ((a - b) ** 2).sum(-1).mean() / 14, rtol=0.05)


def test_an_impossible_token_of_the_teacher_costs_nothing():
  teacher = jnp.array([[0.0, -jnp.inf]])
  assert float(losses.divergence(jnp.zeros((1, 2)), teacher, jnp.ones(1))) == pytest.approx(
    np.log(2), rel=1e-5
  )


def test_a_student_of_another_shape_comes_nearer():
  big, small = net(SPEC), net(SMALL, 1)
  transform = logits.logits(steps=20, rate=0.01, alpha=0.5)
  out = drivers.run(transform, small, collect.Materials(batches=TEXT, donors=[big]))
  note = out.lineage[0].notes
  assert note["last_loss"] < note["first_loss"]
  assert out.spec == SMALL


def test_arrays_and_factors_train_in_float32_and_return_as_they_were():
  m = net(SPEC)
  m = m.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), m.params))
  m = rtn.rtn(bits=4, select=".*/down/kernel")[0].apply(m, {}, jax.random.key(0))
  train, rest = student.masters(m)
  assert list(rest) == ["layers/0:2/mlp/down/kernel"]
  assert {x.dtype for x in jax.tree.leaves(train)} == {jnp.dtype("float32")}
  same = student.put(m, train)
  for a in m.addresses():
    jax.tree.map(np.testing.assert_array_equal, same.leaf(a), m.leaf(a))


@pytest.mark.slow
def test_quantized_leaves_stay_and_factors_train():
  m = net(SPEC)
  thin = svd.svd(rank=2, select=".*/up/kernel")[0].apply(m, {}, jax.random.key(0))
  both = rtn.rtn(bits=4, select=".*/down/kernel")[0].apply(thin, {}, jax.random.key(0))
  out = drivers.run(
    logits.logits(steps=3, rate=0.01, features=1.0),
    both,
    collect.Materials(batches=TEXT, donors=[m]),
  )
  up, down = (f"layers/0/mlp/{n}/kernel" for n in ("up", "down"))
  assert isinstance(out.leaf(up), leaves.LowRank)
  assert (np.asarray(out.leaf(up).a) != np.asarray(both.leaf(up).a)).any()
  np.testing.assert_array_equal(out.leaf(down).codes, both.leaf(down).codes)
  np.testing.assert_array_equal(out.leaf(down).scales, both.leaf(down).scales)


@pytest.mark.slow
def test_the_training_loop_takes_the_same_loss():
  big, small = net(SPEC), net(SMALL, 1)
  data = list(losses.taught(big, TEXT * 8))
  plan = (SMALL, SPEC, True, False)
  strengths = (jnp.float32(2.0), jnp.float32(0.7), jnp.float32(0.0))
  inside = logits.loss(plan, small.params, TEXT[0], jax.random.key(0), {}, big.params, strengths)
  objective = losses.objective(temperature=2.0, alpha=0.7)
  loss, aux = objective(SMALL, small.params, data[0], None)
  np.testing.assert_allclose(loss, inside, rtol=1e-5)
  assert float(aux["weight"]) == 32
  out = loop.fit(small, data, steps=8, objective=objective, optimizer={"lr": 0.01})
  assert float(objective(SMALL, out.params, data[0], None)[0]) < float(loss)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: logits.logits(temperature=0.0), "temperature=0.0 must be above 0"),
    (lambda: logits.logits(alpha=1.5), "alpha=1.5 must lie between 0 and 1"),
    (lambda: logits.logits(features=-1.0), "features=-1.0 must not be negative"),
    (lambda: logits.logits(steps=-1), "steps=-1 must not be negative"),
  ],
)
def test_arguments_out_of_range_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_unfit_teachers_are_named():
  big, small = net(SPEC), net(SMALL)
  with pytest.raises(ValueError, match="learns from one teacher; 2 were given"):
    drivers.run(logits.logits(), small, collect.Materials(batches=TEXT, donors=[big, big]))
  with pytest.raises(ValueError, match="the teacher has 2 layers of width 8, the student 1 of 8"):
    drivers.run(logits.logits(features=1.0), small, collect.Materials(batches=TEXT, donors=[big]))
  other = net(dataclasses.replace(SPEC, vocab_size=9))
  with pytest.raises(ValueError, match="vocabulary of 9 tokens, the base has 7"):
    drivers.run(logits.logits(), small, collect.Materials(batches=TEXT, donors=[other]))
