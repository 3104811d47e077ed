# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: what is dead goes first and costs nothing, shapes and spec agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.prune import layer_drop, minitron, shortgpt, shrink
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(
  vocab_size=11, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=12, max_positions=16
)
TEXT = [np.random.default_rng(i).integers(0, 11, (3, 8)).astype(np.int32) for i in range(2)]
PROBE = np.random.default_rng(9).integers(0, 11, (2, 7))
GIVEN = collect.Materials(batches=TEXT)


def draw(spec=SPEC, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  fill = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + (x.ndim == 2), x.dtype)
  return model.Model(spec, jax.tree.map(fill, shapes))


def silent(m, layer):
  """The model with a layer that adds nothing."""
  names = [f"layers/{layer}/{n}/kernel" for n in ("attn/o", "mlp/down")]
  return m.update({n: jnp.zeros_like(m.leaf(n)) for n in names})


def logits(m):
  return np.asarray(models.forward(m.spec, m.params, PROBE).logits)


def fits(m):
  assert {a: tuple(m.leaf(a).shape) for a in m.addresses()} == models.addresses(m.spec)


def test_influence_is_one_minus_the_cosine():
  rng = np.random.default_rng(0)
  a, b, w = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 4)), rng.random((2, 5))
  cos = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  found = shortgpt.influence(*(jnp.asarray(x) for x in (a, b, w)))
  np.testing.assert_allclose(found, ((1 - cos) * w).sum(), rtol=1e-5)
  assert np.isfinite(shortgpt.influence(jnp.zeros((1, 4)), jnp.ones((1, 4)), jnp.ones(1)))


def test_an_identity_layer_has_no_influence_and_is_dropped_free():
  m = silent(draw(), 1)
  scores = shortgpt.influences(m, TEXT)
  assert abs(float(scores[1])) < 1e-6 < float(jnp.delete(scores, 1).min())
  out = drivers.run(shortgpt.shortgpt(drop=1), m, GIVEN)
  assert out.lineage[0].notes["dropped"] == [1]
  np.testing.assert_allclose(logits(out), logits(m), rtol=1e-5, atol=1e-5)
  fits(out)
  hidden = models.forward(m.spec, m.params, TEXT[0], observe=lambda n, x: x).observed
  cos = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  direct = shortgpt.influences(m, TEXT[:1])
  np.testing.assert_allclose(
    direct, [1 - cos(*(np.asarray(hidden[t][i]) for t in ("in", "out"))).mean() for i in range(3)],
    atol=1e-5,
  )  # fmt: skip


def test_padding_does_not_count():
  m, tokens = draw(), TEXT[0]
  mask = np.ones_like(tokens)
  mask[:, 5:] = 0
  other = tokens.copy()
  other[:, 5:] = 0
  for measure in (shortgpt.influences, lambda *a: minitron.importances(*a)["channels"]):
    a, b = (measure(m, [{"tokens": t, "mask": mask}]) for t in (tokens, other))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_layers_are_dropped_by_number():
  m = draw(dataclasses.replace(SPEC, window=(0, 3, 5)))
  out = drivers.run(layer_drop.layer_drop(layers=(1,)), m)
  assert out.spec.window == (0, 5) and out.lineage[0].notes["index"] == [0, 2]
  np.testing.assert_array_equal(
    out.leaf("layers/1/attn/q/kernel"), m.leaf("layers/2/attn/q/kernel")
  )
  for layers, message in (((3,), "layer 3 cannot be dropped"), ((0, 1, 2), "all 3 layers")):
    with pytest.raises(ValueError, match=message):
      drivers.run(layer_drop.layer_drop(layers=layers), m)


def test_shrinking_is_silencing():
  m = draw()
  neurons, q, kv = jnp.array([0, 2, 3, 7, 8]), jnp.array([1, 3]), jnp.array([0, 1])
  whole = jnp.arange(12), jnp.arange(4), jnp.arange(2)
  units = shrink.Units(None, [whole[0], neurons, neurons], [whole[1], q, q], [whole[2], kv, kv])
  out = shrink.shrink(m, units)
  fits(out)
  assert (out.spec.d_ff, out.spec.num_heads) == ((12, 5, 5), (4, 2, 2))
  changes = {}
  for i in (1, 2):
    down, o = (f"layers/{i}/{n}/kernel" for n in ("mlp/down", "attn/o"))
    keep = np.isin(np.arange(12), neurons)[:, None]
    changes[down] = jnp.where(keep, m.leaf(down), 0)
    changes[o] = jnp.where(np.isin(np.arange(16) // 4, q)[:, None], m.leaf(o), 0)
  np.testing.assert_allclose(logits(out), logits(m.update(changes)), rtol=1e-5, atol=1e-5)


def test_importances_are_numpys():
  m = draw()
  found = minitron.importances(m, TEXT)
  neurons, heads, channels = 0.0, 0.0, 0.0
  for tokens in TEXT:
    seen = models.forward(m.spec, m.params, tokens, observe=lambda n, x: x).observed
    squares = {tap: np.square(np.asarray(x, float)) for tap, x in seen.items()}
    neurons += np.sqrt(squares["mlp/down/in"].sum(2)).sum(1) / 6
    heads += np.sqrt(squares["attn/o/in"].reshape(3, 3, 8, 4, 4).sum((2, 4))).sum(1) / 6
    for tap in ("attn/in", "mlp/in", "lm_head/in"):
      each = np.sqrt(squares[tap].sum(-2))
      channels += each.sum(axis=tuple(range(each.ndim - 1))) / 6
  np.testing.assert_allclose(found["channels"], channels, rtol=1e-4)
  np.testing.assert_allclose(found["neurons"], neurons, rtol=1e-4)
  np.testing.assert_allclose(found["heads"], heads, rtol=1e-4)


def test_dead_neurons_and_heads_go_first_and_cost_nothing():
  m = draw()
  for i in range(3):
    gate, v = f"layers/{i}/mlp/gate/kernel", f"layers/{i}/attn/v/kernel"
    m = m.update({
      gate: m.leaf(gate).at[:, [i, i + 3]].set(0.0),  # silu(0) = 0
      v: m.leaf(v).at[:, 4 * (i % 2) : 4 * (i % 2) + 4].set(0.0),
    })  # fmt: skip
  out = drivers.run(minitron.minitron(d_ff=10, kv_heads=1), m, GIVEN)
  fits(out)
  assert (out.spec.d_ff, out.spec.num_heads, out.spec.num_kv_heads) == (10, 2, 1)
  np.testing.assert_allclose(logits(out), logits(m), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["loss", "influence"])
def test_a_silent_layer_goes_first(by):
  m = silent(draw(), 2)
  out = drivers.run(minitron.minitron(layers=2, depth_by=by), m, GIVEN)
  assert out.lineage[0].notes["index"] == [0, 1] or by == "loss"
  if by == "loss":
    whole = float(models.nll(m.spec, m.params, TEXT[0]))
    without = minitron.losses_without(m, TEXT[:1])
    np.testing.assert_allclose(without[2], whole, rtol=1e-5)


def test_dead_channels_go_first():
  m = draw()
  channels = np.array([3, 8, 9])
  changes = {a: m.leaf(a).at[channels].set(0.0) for a in m.addresses() if a.endswith("norm/scale")}
  out = drivers.run(minitron.minitron(d_model=13), m.update(changes), GIVEN)
  fits(out)
  kept = np.delete(np.arange(16), channels)
  np.testing.assert_array_equal(out.leaf("final_norm/scale"), m.leaf("final_norm/scale")[kept])


def test_heads_are_chosen_within_groups():
  scores = jnp.array([1.0, 2.0, 8.0, 7.0, 3.0, 0.0])
  q, kv = minitron.chosen_heads(scores, heads=2, kv_heads=2, groups=3)
  assert kv.tolist() == [0, 1] and q.tolist() == [1, 2]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"d_ff": 13}, "d_ff=13 cannot stay; there are 12"),
    ({"heads": 3}, "heads=3 and kv_heads=2: every key/value head serves equally many"),
    ({"heads": 0}, "heads=0 must be at least 1"),
    ({"depth_by": "depth"}, "depth_by='depth'; valid: loss, influence"),
  ],
)
def test_targets_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    drivers.run(minitron.minitron(**arguments), draw(), GIVEN)


def test_what_cannot_be_cut_is_named():
  packed = rtn.rtn(bits=4)[0].apply(draw(), {}, jax.random.key(0))
  with pytest.raises(ValueError, match="compressed; prune structure before that"):
    drivers.run(minitron.minitron(d_ff=4), packed, GIVEN)
  mixture = draw(dataclasses.replace(SPEC, num_experts=2, experts_per_token=1))
  with pytest.raises(ValueError, match="num_experts=2: units of experts are not pruned"):
    drivers.run(minitron.minitron(d_ff=4), mixture, GIVEN)
  with pytest.raises(ValueError, match="drop=3 of 3 layers; valid: 0 to 2"):
    drivers.run(shortgpt.shortgpt(drop=3), draw(), GIVEN)
