# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs, paths, step
from treesurgeon.run import collect, gradients, statistics

SPEC = models.Spec(vocab_size=19, d_model=8, num_layers=3, num_heads=2, d_ff=12, max_positions=16)
ENCODER = models.Spec(
  vocab_size=19, d_model=8, num_layers=1, num_heads=2, d_ff=12, kind="encoder", pooler=True,
  positions="learned", norm="layer", norm_place="residual", gated=False, final_norm=False,
)  # fmt: skip
TEXT = [np.random.default_rng(i).integers(0, 19, (n, 6)) for i, n in enumerate((3, 3, 2))]
STEP = registry.parse("compress.quantize.rtn()")[0]


def make(spec=SPEC, seed=0):
  return model.Model(spec, models.init(spec, jax.random.key(seed)))


def needing(**wants):
  return step.Step(wants, lambda m, e, k: m, "model", {"name": "demo", "given": {}}, lambda n: [n])


def seen_by_a_whole_pass(m, tap):
  """The inputs at a tap, from one forward pass over each batch; layers first."""
  parts = []
  for tokens in TEXT:
    x = models.forward(m.spec, m.params, tokens, observe=lambda n, v: v).observed.get(tap)
    if tap == "lm_head/in":
      held = []
      models.forward(
        m.spec, m.params, tokens, observe=lambda n, v, h=held: h.append(v) if n == tap else None
      )
      x = held[0][None]
    parts.append(np.asarray(x, np.float64).reshape(x.shape[0], -1, x.shape[-1]))
  return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
  "address", ["layers/0/attn/q/kernel", "layers/2/mlp/down/kernel", "layers/1/attn/o/kernel"]
)
def test_statistics_are_those_of_a_whole_forward_pass(address):
  m = make()
  wants = {
    "h": needs.Statistic("second_moment", address),
    "top": needs.Statistic("absmax", address),
  }
  found = collect.evidence(needing(**wants), m, collect.Materials(batches=TEXT))
  x = seen_by_a_whole_pass(m, models.tap_of(address))[statistics.layer_of(address)]
  assert found["h"][address].count == len(x) == 48
  np.testing.assert_allclose(found["h"][address].moment, x.T @ x, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["top"][address].value, np.abs(x).max(0), rtol=1e-5)
  assert list(found["h"]) == [address]


def test_an_expert_counts_the_tokens_that_go_to_it():
  spec = dataclasses.replace(SPEC, num_experts=3, experts_per_token=2)
  m, base = make(spec), "layers/1/mlp/experts/2"
  folds = ("second_moment", "range", "samples")
  wants = {fold: needs.Statistic(fold, f"{base}/(up|down)/kernel") for fold in folds}
  tokens = np.concatenate(TEXT)
  mask = (np.arange(6) < np.arange(1, 9)[:, None]).astype(np.int32)
  batches = [{"tokens": tokens[i : i + 4], "mask": mask[i : i + 4]} for i in (0, 4)]
  found = collect.evidence(needing(**wants), m, collect.Materials(batches=batches))
  seen = jax.jit(
    lambda: models.forward(spec, m.params, tokens, mask=mask, observe=lambda n, x: x).observed
  )()
  for name in ("up", "down"):
    address = f"{base}/{name}/kernel"
    x = np.asarray(seen[models.tap_of(address)][1], np.float64)
    x = x[(np.asarray(seen["mlp/gates"][1])[..., 2] > 0) & (mask > 0)]
    assert 0 < len(x) < mask.sum()
    assert [int(found[f][address].count) for f in folds] == [len(x)] * 3
    moment = found["second_moment"][address].moment
    np.testing.assert_allclose(moment, x.T @ x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["range"][address].low, x.min(0), rtol=1e-4, atol=1e-7)
    assert int(found["samples"][address].weights().sum()) == len(x)


def test_statistics_of_the_head():
  m = make()
  one = needing(h=needs.Statistic("sum_squares", "lm_head/kernel"))
  found = collect.evidence(one, m, collect.Materials(batches=TEXT))["h"]["lm_head/kernel"]
  x = seen_by_a_whole_pass(m, "lm_head/in")[0]
  np.testing.assert_allclose(found.value, (x * x).sum(0), rtol=1e-4)


def test_statistics_see_compressed_and_split_layers():
  m = make()
  (one,) = registry.parse("compress.quantize.rtn(bits=3, select='layers/1/.*')")
  m = one.apply(m, {}, jax.random.key(0))
  assert len(paths.segments(m.params)) == 3
  address = "layers/2/mlp/up/kernel"
  wants = needing(h=needs.Statistic("sum_magnitudes", address))
  found = collect.evidence(wants, m, collect.Materials(batches=TEXT))["h"][address]
  x = seen_by_a_whole_pass(m, "mlp/in")[2]
  np.testing.assert_allclose(found.value, np.abs(x).sum(0), rtol=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_single_examples():
  m = make()
  found = gradients.fisher(m, TEXT)

  def loss(params, row):
    logits = models.forward(m.spec, params, row[None, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, row[None, 1:]).mean()

  total = jax.tree.map(jnp.zeros_like, m.params)
  rows = [r for batch in TEXT for r in batch]
  gradient = jax.jit(jax.grad(loss))
  for row in rows:
    total = jax.tree.map(lambda t, g: t + g**2, total, gradient(m.params, jnp.asarray(row)))
  for address in ("layers/1/mlp/up/kernel", "embed/tokens/embedding", "final_norm/scale"):
    want = np.asarray(paths.get(total, address)) / len(rows)
    np.testing.assert_allclose(found[address], want, rtol=1e-4, atol=1e-9)
  assert set(found) == set(m.addresses())


def test_fisher_of_some_leaves_leaves_the_others_out():
  m = make()
  (one,) = registry.parse("compress.quantize.rtn(select='.*/attn/.*')")
  mixed = one.apply(m, {}, jax.random.key(0))
  found = gradients.fisher(mixed, TEXT, select="layers/./mlp/up/kernel")
  assert list(found) == [f"layers/{i}/mlp/up/kernel" for i in range(3)]
  with pytest.raises(ValueError, match="layers/0/attn/./kernel: a compressed leaf has no gradient"):
    gradients.fisher(mixed, TEXT)
  with pytest.raises(ValueError, match="at least one example"):
    gradients.fisher(m, [])


def test_nothing_compiles_for_another_layer_or_batch():
  m = make()
  wants = needing(h=needs.Statistic("second_moment"))
  collect.evidence(wants, m, collect.Materials(batches=TEXT[:2]))
  size = statistics._through._cache_size()
  collect.evidence(wants, m, collect.Materials(batches=[*TEXT[:2], *TEXT[:2]]))
  assert statistics._through._cache_size() == size


@pytest.mark.parametrize(
  ("wants", "materials", "message"),
  [
    ({"h": needs.Statistic("second_moment")}, {}, "needs calibration text and none was given"),
    ({"h": needs.Statistic("absmax")}, {"batches": iter(TEXT)}, "read more than once; give a list"),
    ({"h": needs.Statistic("median")}, {"batches": TEXT}, "unknown statistic 'median'; known: sec"),
    ({"h": needs.Statistic("absmax", "x.*")}, {"batches": TEXT}, "no address matches 'x.*'"),
    ({"h": needs.Statistic("absmax", "final_norm/scale")}, {"batches": TEXT}, "no tap feeds"),
    ({"d": needs.Donors()}, {}, "needs donor models and none was given"),
    ({"d": needs.Donors(("a",))}, {}, "no way was given to open models by name"),
    ({"r": needs.Requests()}, {}, "needs edit requests and none were given"),
    ({"r": needs.Requests("a.json")}, {}, "no way was given to read 'a.json'"),
  ],
)
def test_what_was_not_brought_is_named(wants, materials, message):
  with pytest.raises(ValueError, match=message.replace("*", r"\*")):
    collect.evidence(needing(**wants), make(), collect.Materials(**materials))


def test_a_tap_that_collected_nothing_is_named():
  want = {("absmax", "layers/0/mlp/up/kernel"): ["h"]}
  with pytest.raises(
    ValueError, match="layers/0/mlp/up/kernel: the tap 'mlp/in' collected nothing"
  ):
    statistics.tap_statistics(make(), want, [])


def test_a_tap_outside_the_forward_pass_is_named():
  m = make(ENCODER.__class__(**{**vars(ENCODER), "mlm_head": True}))
  one = needing(h=needs.Statistic("absmax", "pooler/kernel"))
  with pytest.raises(ValueError, match="no tap 'pooler/in'"):
    collect.evidence(one, m, collect.Materials(batches=TEXT))


def test_donors_are_compared_before_any_leaf_is_read():
  base = make()

  class Closed(model.Model):
    def leaf(self, address):
      raise AssertionError(f"{address} was read")

  def check(spec):
    other = make(spec)
    collect.check_alike(base, Closed(spec, other.params), "donor 0")

  check(SPEC)
  changed = {**vars(SPEC)}
  with pytest.raises(ValueError, match="donor 0 has a vocabulary of 20 tokens, the base has 19"):
    check(models.Spec(**{**changed, "vocab_size": 20}))
  with pytest.raises(ValueError, match=r"layers/0/mlp/down/kernel: donor 0 has shape \(10, 8\)"):
    check(models.Spec(**{**changed, "d_ff": 10}))
  with pytest.raises(ValueError, match="layers/2/.*: donor 0 lacks it"):
    check(models.Spec(**{**changed, "num_layers": 2}))
  with pytest.raises(ValueError, match="donor 0 has num_heads=4, the base has 2"):
    check(
      models.Spec(**{**changed, "num_heads": 4, "num_kv_heads": 4, "head_dim": 2, "rope_dim": 2})
    )


def test_batches_have_a_digest():
  a, b = collect.Materials(batches=TEXT), collect.Materials(batches=TEXT[::-1])
  assert set(a.inputs) == {"batches"} and a.inputs != b.inputs
  assert collect.Materials(digests={"base": "x"}).inputs == {"base": "x"}
