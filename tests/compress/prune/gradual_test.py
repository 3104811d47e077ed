# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning against a plain simulation of jaxpruner's rule, and exact counts in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models, registry
from treesurgeon.compress.prune import gradual
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=13, d_model=8, num_layers=2, num_heads=2, d_ff=8, max_positions=8)
TEXT = [np.random.default_rng(i).integers(0, 13, (2, 8)) for i in range(2)]


def test_the_curve_is_cubic():
  got = gradual.cubic(0.875, initial=0.2, updates=10)
  want = [0.875 + (0.2 - 0.875) * (1 - t / 1000) ** 3 for t in range(0, 1001, 100)]
  np.testing.assert_allclose(got, want, atol=1e-12)
  assert (got[0], got[-1]) == (0.2, 0.875)
  assert np.all(np.diff(np.diff(got)) < 0)


def smallest(w, count):
  """Marks all but the `count` smallest entries; of equals the first are kept."""
  mask = np.ones(w.size, bool)
  mask[np.argsort(-np.abs(w).ravel(), kind="stable")[w.size - count :]] = False
  return mask.reshape(w.shape)


def test_masks_follow_jaxpruners_rule():
  """At each pruning the weights as they are before the update are ranked, matrix by matrix."""
  rng = np.random.default_rng(0)
  start = {
    "layers/0:3/w/kernel": rng.normal(size=(3, 4, 5)),
    "head/kernel": rng.normal(size=(6, 2)),
  }
  aims = [{n: rng.normal(size=w.shape) for n, w in start.items()} for _ in range(9)]
  inside = {"layers/0:3/w/kernel": (True, False, True), "head/kernel": (True,)}
  shares = gradual.cubic(0.8, initial=0.1, updates=3)
  plan = gradual.Plan(tuple(inside.items()), shares, begin=1, every=2)
  optimizer = gradual.pruning(optax.sgd(0.3, momentum=0.5), plan)
  ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  step = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
  state = optimizer.init(ours)
  theirs, moment = dict(start), dict.fromkeys(start, 0.0)
  kept = {n: np.ones(w.shape, bool) for n, w in start.items()}
  for t, aim in enumerate(aims):
    updates, state = step(jax.tree.map(lambda p, a: p - a, ours, aim), state, ours)
    ours = optax.apply_updates(ours, updates)
    for n, w in theirs.items():
      if t in (1, 3, 5, 7):
        share = shares[(t - 1) // 2]
        parts = w if w.ndim == 3 else w[None]
        new = [smallest(x, int(share * x.size)) if go else np.ones(x.shape, bool)
               for x, go in zip(parts, inside[n], strict=True)]  # fmt: skip
        new = np.stack(new).reshape(w.shape)
        assert (kept[n] | ~new).all()  # what is pruned stays pruned
        kept[n] = new
      moment[n] = w - aim[n] + 0.5 * moment[n]
      theirs[n] = (w - 0.3 * moment[n]) * kept[n]
      np.testing.assert_allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-5, err_msg=f"{t} {n}")
  assert (theirs["head/kernel"] == 0).sum() == int(0.8 * 12)


def make():
  rng = np.random.default_rng(3)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  return model.Model(
    SPEC, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  )


@pytest.mark.parametrize("pattern", [pytest.param(None, marks=pytest.mark.slow), "1:4"])
def test_it_ends_at_the_stated_sparsity_and_learns(pattern):
  expression = (
    f"compress.prune.gradual(sparsity=0.75, steps=20, every=3, rate=0.05, pattern={pattern!r})"
  )
  out = drivers.run(registry.parse(expression), make(), collect.Materials(batches=TEXT))
  for address in out.addresses():
    w = np.asarray(out.leaf(address))
    if address.startswith("layers/") and address.endswith("kernel"):
      assert (w == 0).sum() == 0.75 * w.size
      if pattern:
        assert ((w.reshape(-1, 4, w.shape[1]) != 0).sum(axis=1) <= 1).all()
    else:
      assert (w != 0).all()
  notes = out.lineage[-1].notes
  assert notes["updates"] == 5
  assert notes["last_loss"] < notes["first_loss"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"initial": 0.95}, "initial=0.95 must lie between 0 and the final sparsity 0.9"),
    ({"steps": 50}, "steps=50 with begin=0, until=0.75 leaves no time for two prunings, every=100"),
    ({"every": 0}, "every=0 must be at least 1"),
    ({"begin": -1}, "begin=-1 must not be negative"),
    ({"pattern": "3:2"}, "pattern='3:2': valid is"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    gradual.gradual(**arguments)


def test_rows_that_no_pattern_fits_are_named_before_training():
  expression = "compress.prune.gradual(pattern='1:3', steps=20, every=3)"
  with pytest.raises(
    ValueError, match="layers/0/attn/k/kernel: 1:3 sparsity needs a multiple of 3"
  ):
    drivers.run(registry.parse(expression), make(), collect.Materials(batches=TEXT))
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    drivers.run(gradual.gradual(), make())
