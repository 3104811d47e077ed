# SPDX-License-Identifier: Apache-2.0
"""SALSA: log ratios are taken to the soup, alpha=0 is plain DPO, and tuning prefers the chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model
from treesurgeon.merge import mixed_models
from treesurgeon.merge import salsa as salsa_lib
from treesurgeon.run import collect, drivers, dry
from treesurgeon.train import loop, preferences

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
RNG = np.random.default_rng(5)
PAIRS = {side: RNG.integers(0, 11, (4, 8)).astype(np.int32) for side in ("chosen", "rejected")}
PAIRS |= {f"{s}_weights": (RNG.random((4, 7)) < 0.7).astype(np.float32) for s in list(PAIRS)}
LOGP = jax.jit(lambda p, x: jax.nn.log_softmax(models.forward(SPEC, p, x[:, :-1]).logits))


def near(seed, base=None):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  like = shapes if base is None else base.params
  draw = lambda x: jnp.asarray(
    0.2 * rng.standard_normal(x.shape) + (x.ndim == 2 if base is None else x), jnp.float32
  )
  return model.Model(SPEC, jax.tree.map(draw, like))


BASE = near(0)
DONORS = [near(i, BASE) for i in (1, 2)]
GIVEN = collect.Materials(batches=[PAIRS], donors=DONORS)


def run(given=GIVEN, **arguments):
  return drivers.run(salsa_lib.salsa(**{"steps": 3, "rate": 0.01, **arguments}), BASE, given)


def answers(params, side):
  """Log probability of each answer, summed in float64."""
  logp = np.asarray(LOGP(params, PAIRS[side]), np.float64)
  picked = np.take_along_axis(logp, PAIRS[side][:, 1:, None], -1)[..., 0]
  return (picked * PAIRS[f"{side}_weights"]).sum(1)


def soup(alpha):
  mix = lambda b, *d: (1 - alpha) * b + alpha * sum(d) / len(d)
  return jax.tree.map(mix, BASE.params, *(d.params for d in DONORS))


def dpo(policy, reference, beta):
  ratio = [answers(policy, s) - answers(reference, s) for s in ("chosen", "rejected")]
  return np.log1p(np.exp(-beta * (ratio[0] - ratio[1]))).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_first_loss_is_dpos_with_the_soup_as_reference(alpha):
  note = run(alpha=alpha, beta=0.7).lineage[0].notes
  want = dpo(BASE.params, soup(alpha), 0.7)
  assert note["first_loss"] == pytest.approx(want, rel=2e-5)
  if alpha == 0:
    assert note["first_loss"] == pytest.approx(np.log(2), rel=1e-6)
  assert note["last_loss"] < note["first_loss"]


def test_alpha_0_is_plain_dpo_whoever_the_donors_are():
  """By `loop.fit` with the base as reference; SGD's momentum is the same in both."""
  mine = run(alpha=0.0, beta=0.5, optimizer="sgd", rate=0.05)
  pairs = {"tokens": PAIRS["chosen"], "weights": PAIRS["chosen_weights"]}
  pairs |= {k: v for k, v in PAIRS.items() if k.startswith("rejected")}
  sgd = {"name": "sgd", "b1": 0.9, "lr": 0.05, "schedule": "linear", "final": 0.0}
  fitted = loop.fit(
    BASE, [pairs] * 3, steps=3, objective=preferences.dpo(BASE.params, beta=0.5),
    optimizer={**sgd, "weight_decay": 0.0, "clip": None},
  )  # fmt: skip
  far = 0.0
  for a in BASE.addresses():
    np.testing.assert_allclose(mine.leaf(a), fitted.leaf(a), atol=3e-6, err_msg=a)
    far = max(far, float(jnp.abs(mine.leaf(a) - BASE.leaf(a)).max()))
  assert far > 1e-3


def test_tuning_prefers_the_chosen_and_follows_the_soup():
  before, after = BASE.params, run(steps=30).params
  gap = lambda p: answers(p, "chosen") - answers(p, "rejected")
  assert (gap(after) > gap(before)).all()
  plain = run(steps=30, alpha=0.0).params
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after, plain)), strict=True))


def test_equal_answers_teach_nothing():
  same = {**PAIRS, "rejected": PAIRS["chosen"], "rejected_weights": PAIRS["chosen_weights"]}
  done = run(given=collect.Materials(batches=[same], donors=DONORS), optimizer="sgd")
  for a in BASE.addresses():
    np.testing.assert_allclose(done.leaf(a), BASE.leaf(a), atol=1e-7)


def test_only_the_selected_leaves_train_and_differ_in_the_reference():
  select = "layers/1/mlp/.*"
  done = run(select=select)
  moved = [a for a in BASE.addresses() if (done.leaf(a) != BASE.leaf(a)).any()]
  assert moved and all(a.startswith("layers/1/mlp/") for a in moved)
  donors = {a: tuple(d.leaf(a) for d in DONORS) for a in BASE.addresses()}
  plan, parts = mixed_models.gather(BASE, donors, select, granularity="task")
  told = salsa_lib.reference(plan, parts, jnp.full(2, 0.25), PAIRS)
  mixed = {
    a: 0.5 * BASE.leaf(a) + 0.25 * donors[a][0] + 0.25 * donors[a][1]
    for a in BASE.addresses()
    if a.startswith("layers/1/mlp/")
  }
  want = answers(BASE.update(mixed).params, "chosen")
  np.testing.assert_allclose(told["reference_chosen"], want, rtol=1e-5)


def test_shapes_alone():
  shapes = dry.dry_run(salsa_lib.salsa(), BASE, donors=2)
  assert jax.tree.structure(shapes.params) == jax.tree.structure(BASE.params)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"alpha": 1.5}, "alpha=1.5 must lie between 0 and 1"),
    ({"beta": 0.0}, "beta=0.0 and rate=0.01 must be above 0"),
    ({"steps": -1}, "steps=-1 and decay=0.0 must not be negative"),
    ({"optimizer": "lion"}, "optimizer='lion'; valid: adamw, sgd"),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    run(**arguments)


def test_text_without_pairs_is_refused():
  with pytest.raises(ValueError, match="holds ndarray; valid: a mapping with 'chosen' and 'reje"):
    run(given=collect.Materials(batches=[PAIRS["chosen"]], donors=DONORS))
