# SPDX-License-Identifier: Apache-2.0
"""QuaRot and SpinQuant: outputs stay, outliers spread, W4A4 gets better, turns stay turns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, stats
from treesurgeon.compress import residual
from treesurgeon.compress.quantize import activations, gptq, quarot, rtn, spinquant
from treesurgeon.core import descend, hadamard, leaves, model, paths
from treesurgeon.models import hf
from treesurgeon.run import collect, describe, drivers

SPEC = models.Spec(
  vocab_size=64, d_model=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32,
  max_positions=16, family="llama",
)  # fmt: skip
SPECS = {
  "llama": {},
  "tied": {"tied": True, "qkv_bias": True, "norm_plus_one": True, "family": "treesurgeon"},
  "gpt2": {
    "norm": "layer", "positions": "learned", "tied": True, "o_bias": True, "qkv_bias": True,
    "gated": False, "num_kv_heads": 4, "head_dim": 12,
  },
}  # fmt: skip
MIXTURE = {"num_experts": 3, "experts_per_token": 2, "family": "mixtral"}
W4A4 = rtn.rtn(bits=4) + activations.activations(bits=4)
W3A3 = rtn.rtn(bits=3) + activations.activations(bits=3)
LEARN = {"bits": 3, "inputs": 3, "steps": 40}
forward = jax.jit(models.forward, static_argnames=("spec", "observe"))
nll = jax.jit(models.nll, static_argnums=0)


def read(name, x):
  """Keeps what the kernels behind norms read."""
  return x if name in ("attn/in", "mlp/in") else None


@functools.cache
def planted(kind="llama"):
  """Draws a model, two of whose channels are outliers of the whole stream."""
  fields = MIXTURE if kind == "mixtral" else SPECS[kind]
  spec, rng = dataclasses.replace(SPEC, **fields), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))

  def draw(x):
    size = x.shape[-2] ** -0.5 if x.ndim == 3 else 1.0 if x.shape[0] > 2 and x.ndim == 2 else 0.2
    return jnp.asarray(size * rng.standard_normal(x.shape) + (x.ndim < 3 and size < 1), x.dtype)

  m = model.Model(spec, jax.tree.map(draw, shapes))
  tables = {a: m.leaf(a) for a in residual.TABLES if a in m.addresses()}
  return m.update({a: x.at[:, np.array([3, 9])].multiply(20.0) for a, x in tables.items()})


@functools.cache
def text(count=6):
  """Draws texts that the model writes itself, so that its loss tells what rounding costs."""
  m, rng, written = planted(), np.random.default_rng(1), []
  for _ in range(count):
    x = rng.integers(0, 64, (16, 12))
    for i in range(1, 12):
      said = np.asarray(forward(m.spec, m.params, x).logits)[:, i - 1]
      x[:, i] = (said + rng.gumbel(size=said.shape)).argmax(-1)
    written.append(x)
  return written


def apply(transform, m):
  return drivers.run(transform, m, collect.Materials(batches=text()[:4]), seed=1)


def logits(m):
  return np.asarray(forward(m.spec, m.params, text()[0]).logits)


def error(m):
  """Computes how far the logits of a model, turned or not, are from those of the planted one."""
  right = logits(planted())
  return np.linalg.norm(logits(apply(W4A4, m)) - right) / np.linalg.norm(right)


def peak(m):
  """Computes the largest magnitude of a token's inputs over their root mean square, the mean."""
  seen = forward(m.spec, m.params, text()[0], observe=read).observed
  found = [np.asarray(x, np.float64) for x in jax.tree.leaves(seen)]
  return np.mean([(np.abs(x).max(-1) / np.sqrt((x**2).mean(-1))).mean() for x in found])


@pytest.mark.parametrize("places", [quarot.PLACES, ("stream",), ("heads",)])
@pytest.mark.parametrize("kind", SPECS)
def test_outputs_are_kept(kind, places):
  m = planted(kind)
  out = apply(quarot.quarot(places=places), m)
  assert {a: tuple(out.leaf(a).shape) for a in out.addresses()} == models.addresses(out.spec)
  np.testing.assert_allclose(logits(out), logits(m), atol=1e-4 * np.abs(logits(m)).max())
  # A checkpoint stays what its family is; layer norms become RMS norms, which GPT-2 has not.
  if kind == "llama":
    assert hf.unsupported(out.spec) == ()
  assert out.spec.tied == (m.spec.tied and "stream" not in places)
  changed = [a for a in m.addresses() if a in out.addresses() and not same(m.leaf(a), out.leaf(a))]
  assert any("mlp" in a for a in changed) == ("stream" in places)


@pytest.mark.parametrize("learn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mixtures_are_turned_router_and_experts_alike(learn):
  m, made = planted("mixtral"), {"places": quarot.EVERY}
  out = apply(
    spinquant.spinquant(**made, **LEARN | {"steps": 2}) if learn else quarot.quarot(**made), m
  )
  np.testing.assert_allclose(logits(out), logits(m), atol=1e-4 * np.abs(logits(m)).max())
  assert isinstance(out.leaf("layers/1/mlp/experts/2/down/kernel"), leaves.Rotated)
  assert not same(m.leaf("layers/0/mlp/router/kernel"), out.leaf("layers/0/mlp/router/kernel"))
  assert hf.unsupported(out.spec) == ()


def same(a, b):
  return a.shape == b.shape and bool((a == b).all())


def test_outliers_spread_and_four_bits_cost_less():
  m = planted()
  folded, out = residual.fold_norms(m), apply(quarot.quarot(), m)
  # Folding alone is the control: it takes gains away, not the outliers of the stream.
  assert peak(out) < 0.5 * peak(folded) < 0.5 * peak(m)
  assert error(out) < 0.8 * min(error(m), error(folded))


def test_what_down_reads_is_turned_at_run_time():
  m = planted()
  some, every = np.array([2, 5]), quarot.quarot(places=quarot.EVERY)
  loud = {a: m.leaf(a).at[:, some].multiply(20.0) for a in m.addresses() if "/up/" in a}
  deaf = {a: m.leaf(a).at[some].divide(20.0) for a in m.addresses() if "/down/" in a}
  m = m.update({**loud, **deaf})
  out = apply(every, m)
  np.testing.assert_allclose(logits(out), logits(m), atol=1e-4 * np.abs(logits(m)).max())
  leaf = apply(every + W4A4, m).leaf("layers/1/mlp/down/kernel")
  assert isinstance(leaf, leaves.Rotated) and isinstance(leaf.weight, leaves.ActivationQuantized)
  assert describe.kind(leaf) == "int4 column, inputs int4 per token, inputs turned"
  # What rounding the inputs of down alone costs.
  four = activations.activations(bits=4, select="layers/.*/mlp/down/kernel")
  made = (apply(t + four, m) for t in (every, quarot.quarot()))
  wrong = [np.linalg.norm(logits(x) - logits(m)) for x in made]
  assert wrong[0] < 0.75 * wrong[1]
  with pytest.raises(ValueError, match="down/kernel is compressed"):
    quarot.start(out, jax.random.key(0))


def test_gptq_works_in_the_turned_basis():
  rng = np.random.default_rng(4)
  w, x = (rng.normal(size=s).astype(np.float32) for s in ((12, 5), (40, 12)))
  a, (one,) = "layers/0/mlp/down/kernel", gptq.gptq(bits=4, group_size=4)
  h = np.asarray(hadamard.matrix(12))
  made = []
  for leaf, seen in ((leaves.Rotated.of(jnp.asarray(w)), x), (jnp.asarray(h.T @ w), x @ h)):
    state = stats.FOLDS["second_moment"].update(
      stats.FOLDS["second_moment"].init(12), jnp.asarray(seen)
    )
    m = model.Model(None, paths.unflatten({a: leaf}))
    made.append(one.apply(m, {"hessian": {a: state}}, jax.random.key(0)).leaf(a))
  assert isinstance(made[0], leaves.Rotated)
  np.testing.assert_allclose(made[0].weight.dense(), made[1].dense(), atol=1e-6)


def test_a_cayley_step_is_the_formula():
  rng = np.random.default_rng(2)
  r = np.linalg.qr(rng.normal(size=(3, 6, 6)))[0]
  g = 0.1 * rng.normal(size=(3, 6, 6))
  out = np.asarray(spinquant.move(jnp.float32(r), jnp.float32(g), rate=0.7))
  for i in range(3):
    hat = g[i] @ r[i].T - 0.5 * r[i] @ r[i].T @ g[i] @ r[i].T
    y = -(hat - hat.T)
    a = min(0.7, 1 / np.abs(y).sum(axis=0).max())
    right = np.linalg.inv(np.eye(6) - a / 2 * y) @ (np.eye(6) + a / 2 * y) @ r[i]
    np.testing.assert_allclose(out[i], right, atol=1e-6)


def procrustes(spec, r, batch, key):
  del spec, key
  return jnp.square(r @ batch[0] - batch[1]).sum()


def test_cayley_steps_find_a_turn_and_stay_orthogonal():
  rng = np.random.default_rng(3)
  q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  q[0] *= np.sign(np.linalg.det(q))
  x = rng.normal(size=(8, 20))
  batch = np.stack([x, q @ x]).astype(np.float32)
  r, _ = descend.minimize(
    procrustes, jnp.eye(8), [batch], optimizer=spinquant.cayley(1.5, 300), steps=300
  )
  np.testing.assert_allclose(r @ r.T, np.eye(8), atol=1e-5)
  np.testing.assert_allclose(r, q, atol=1e-3)


def test_turns_are_learned_from_rounding_alone():
  m = planted()
  folded = residual.fold_norms(m)
  turns = quarot.start(m, jax.random.key(1))
  slope = jax.jit(jax.grad(spinquant.loss, argnums=1), static_argnums=0)
  steep = {}
  for bits in (None, 4):
    g = slope((folded.spec, bits, bits, True), turns, text()[0], None, folded.params)
    for name, r in turns.items():
      along = np.asarray(r @ jnp.swapaxes(g[name], -1, -2))
      steep[name, bits] = np.abs(along - np.swapaxes(along, -1, -2)).max()
  # Without rounding the function is the same whatever the turn.
  for name in turns:
    assert steep[name, None] < 1e-5 < 1e-3 < steep[name, 4]


def test_learned_turns_beat_hadamard_matrices():
  m = planted()
  out = apply(spinquant.spinquant(**LEARN), m)
  notes = out.lineage[0].notes
  assert notes["last_loss"] < 0.95 * notes["first_loss"] and notes["steps"] == LEARN["steps"]
  np.testing.assert_allclose(logits(out), logits(m), atol=1e-4 * np.abs(logits(m)).max())
  start, table = residual.fold_norms(m).leaf(residual.TABLES[0]), out.leaf(residual.TABLES[0])
  start, table = (np.asarray(x, np.float64) for x in (start, table))
  q = np.linalg.lstsq(start, table, rcond=None)[0]
  np.testing.assert_allclose(q @ q.T, np.eye(48), atol=1e-5)
  # On text that was not learned from: learned, Hadamard, and no turns at all.
  ways = (apply(W3A3, out), apply(quarot.quarot() + W3A3, m), apply(W3A3, m))
  held = [np.mean([nll(x.spec, x.params, t) for t in text()[4:]]) for x in ways]
  assert held[0] < held[1] < held[2]


@pytest.mark.slow
def test_turns_that_do_no_better_are_dropped_for_the_start(monkeypatch):
  """Climbs where it should descend, which also tells that descending is what helps."""
  m = planted()
  up = functools.partial(uphill, descend.minimize)
  monkeypatch.setattr(spinquant.descend, "minimize", up)
  out = apply(spinquant.spinquant(**LEARN), m)
  notes = out.lineage[0].notes
  assert notes["last_loss"] > notes["first_loss"]
  np.testing.assert_array_equal(logits(out), logits(apply(quarot.quarot(), m)))


def uphill(minimize, loss, *args, **kwargs):
  assert loss is spinquant.loss
  return minimize(climb, *args, **kwargs)


def climb(plan, turns, batch, key, params):
  return -spinquant.loss(plan, turns, batch, key, params)


def test_what_cannot_be_turned_is_named():
  with pytest.raises(ValueError, match=r"'queries' is none; valid: stream, heads, down"):
    quarot.quarot(places=("queries",))
  with pytest.raises(ValueError, match=r"bits=16: .* from 1 to 8, or None"):
    spinquant.spinquant(bits=16)
  with pytest.raises(ValueError, match=r"inputs=1: .* from 2 to 8, or None"):
    spinquant.spinquant(inputs=1)
  post = model.Model(dataclasses.replace(SPEC, norm_place="post", family="treesurgeon"), {})
  with pytest.raises(ValueError, match="norm_place='post' cannot be folded"):
    quarot.start(post, jax.random.key(0))
  with pytest.raises(ValueError, match="is compressed; "):
    quarot.start(rtn.rtn()[0].apply(planted(), {}, jax.random.key(0)), jax.random.key(0))
