# SPDX-License-Identifier: Apache-2.0
"""AdaMerging: entropy falls, gradients are right, and the merge is what the coefficients say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs, paths
from treesurgeon.merge import adamerging, mixed_models, mixture, task_arithmetic
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
OWN = [[np.random.default_rng(i).integers(0, 11, (4, 8))] for i in range(2)]
EVERY = ".*"


def near(base, seed, size=0.3):
  rng = np.random.default_rng(seed)
  return base.replace(
    params=jax.tree.map(
      lambda x: (x + size * rng.standard_normal(x.shape)).astype(x.dtype), base.params
    )
  )


BASE = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
DONORS = [near(BASE, 1), near(BASE, 2)]
GIVEN = collect.Materials(donors=DONORS, donor_batches=OWN)


def gathered(granularity, pattern=EVERY, **more):
  return mixed_models.gather(
    BASE, needs.Aligned(DONORS), pattern, granularity=granularity, **more
  )  # fmt: skip


def by_hand(coefficients):
  """θ₀ + Σ c τ with coefficients by address, in float64."""
  out = {}
  for a in BASE.addresses():
    w = np.float64(BASE.leaf(a))
    each = coefficients.get(a, [0.0] * len(DONORS))
    out[a] = w + sum(c * (np.float64(d.leaf(a)) - w) for c, d in zip(each, DONORS, strict=True))
  return out


@pytest.mark.parametrize("granularity", mixture.GRANULARITIES)
@pytest.mark.parametrize("lazy", [False, True])
def test_the_merge_is_what_the_coefficients_say(granularity, lazy):
  donors = {a: tuple(d.leaf(a) for d in DONORS) for a in BASE.addresses()}
  view = donors if lazy else needs.Aligned(DONORS)
  pattern = "(layers/1/.*|final_norm/.*|layers/0/attn.*)"
  plan, parts = mixed_models.gather(BASE, view, pattern, granularity=granularity)
  blank = mixture.start(plan, 2, 0.0)
  rng = np.random.default_rng(0)
  c = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), blank)
  done = mixed_models.put(BASE, plan, parts, c)
  listed = mixed_models.by_address(plan, c)
  assert set(listed) == {a for a in BASE.addresses() if a.split("/")[0] != "embed"
                         and "lm_head" not in a and "layers/0/mlp" not in a}  # fmt: skip
  for a, want in by_hand(listed).items():
    np.testing.assert_allclose(done.leaf(a), want, atol=2e-6, err_msg=a)
    if a not in listed:
      np.testing.assert_array_equal(done.leaf(a), BASE.leaf(a))
  sizes = {"task": 2, "layer": 2 * 3}
  if granularity in sizes:
    assert sum(x.size for x in jax.tree.leaves(c)) == sizes[granularity]
  if granularity == "layer":
    assert listed["layers/1/mlp/up/kernel"] == listed["layers/1/attn/q/kernel"]
    assert listed["layers/0/attn/q/kernel"] != listed["layers/1/attn/q/kernel"]


def test_equal_coefficients_are_task_arithmetic():
  plan, parts = gathered("tensor")
  done = mixed_models.put(BASE, plan, parts, mixture.start(plan, 2, 0.3))
  (one,) = task_arithmetic.task_arithmetic(lam=0.3)
  want = one.apply(BASE, {"donors": needs.Aligned(DONORS)}, jax.random.key(0))
  for a in BASE.addresses():
    np.testing.assert_allclose(done.leaf(a), want.leaf(a), atol=1e-6)


def test_the_gradient_is_the_difference_quotient():
  plan, parts = gathered("layer")
  batch = tuple(jnp.asarray(b[0]) for b in OWN)
  c = mixture.start(plan, 2, 0.3)

  @jax.jit
  def f(c):
    return adamerging.mean_entropy(plan, c, batch, jax.random.key(0), parts)

  slope = jax.grad(f)(c)
  for where in (("layers", (0, 1)), ("layers", (1, 0)), ("rest", (0,))):
    name, index = where
    up, down = ({**c, name: c[name].at[index].add(e)} for e in (1e-2, -1e-2))
    quotient = (float(f(up)) - float(f(down))) / 2e-2
    np.testing.assert_allclose(slope[name][index], quotient, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize(
  "more",
  [
    {"granularity": "task"},
    {"density": 0.4},
    pytest.param({"clamp": True}, marks=pytest.mark.slow),
  ],
)
def test_entropy_falls(more):
  done = drivers.run(adamerging.adamerging(steps=30, rate=0.02, **more), BASE, GIVEN)
  note = done.lineage[0].notes
  assert note["last_loss"] < note["first_loss"]
  assert note["steps"] == 30
  before = drivers.run(adamerging.adamerging(steps=0, **more), BASE, GIVEN)
  entropy = [
    np.mean([float(models.entropy(SPEC, m.params, b[0])) for b in OWN]) for m in (before, done)
  ]
  np.testing.assert_allclose(entropy[0], note["first_loss"], rtol=1e-4)
  assert entropy[1] < entropy[0]
  if more.get("granularity") == "task":
    assert note["trainable"] == 2 and len(note["coefficients"]) == 2
    for a, want in by_hand(done.aux["coefficients"]).items():
      np.testing.assert_allclose(done.leaf(a), want, atol=2e-6)
  if "clamp" in more:
    flat = np.concatenate([np.ravel(c) for c in done.aux["coefficients"].values()])
    assert flat.min() >= 0 and flat.max() <= 1


def test_plus_plus_trims_over_the_model_and_elects():
  _, parts = gathered("task")
  found = adamerging.agreeing(parts, density=0.25)
  names = list(parts.base)
  vectors = [
    np.concatenate([np.ravel(np.asarray(d[n], np.float32) - np.asarray(parts.base[n])) for n in
                    names]) for d in parts.donors]  # fmt: skip
  trimmed = []
  for v in vectors:
    k = int(0.25 * v.size)
    keep = np.zeros(v.size, bool)
    keep[np.argsort(-np.abs(v), kind="stable")[:k]] = True
    trimmed.append(np.where(keep, v, 0))
  sign = np.where(sum(trimmed) >= 0, 1, -1)
  for d, t in zip(found.donors, trimmed, strict=True):
    got = np.concatenate([np.ravel(np.asarray(d[n]) - np.asarray(parts.base[n])) for n in names])
    np.testing.assert_allclose(got, np.where(np.sign(t) == sign, t, 0), atol=1e-6)


@pytest.mark.slow
def test_compressed_and_bfloat16_bases_and_split_segments():
  (quantize,) = registry.parse("compress.quantize.rtn(select='layers/1/.*', group_size=4)")
  mixed = quantize.apply(BASE, {}, jax.random.key(0))
  given = collect.Materials(batches=OWN[0], donors=DONORS)
  done = drivers.run(adamerging.adamerging(steps=2, granularity="layer"), mixed, given)
  assert [s[:2] for s in paths.segments(mixed.params)] == [(0, 1), (1, 2)]
  assert done.leaf("layers/1/mlp/up/kernel").shape == (8, 12)
  half = BASE.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE.params))
  done = drivers.run(adamerging.adamerging(steps=2, granularity="task"), half, given)
  assert {done.leaf(a).dtype for a in done.addresses()} == {jnp.dtype("bfloat16")}


def test_mistakes_are_named():
  for text, message in (
    ("granularity='block'", "granularity='block'; valid: task, layer, tensor"),
    ("steps=-1", "steps=-1 must not be negative"),
    ("density=0.0", "density=0.0 must lie between 0 and 1"),
  ):
    with pytest.raises(ValueError, match=message):
      registry.parse(f"merge.adamerging({text})")
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    drivers.run(adamerging.adamerging(), BASE, collect.Materials(donors=DONORS))
  one = adamerging.adamerging()[0]
  with pytest.raises(ValueError, match="there is no batch to learn from"):
    one.apply(BASE, {"donors": needs.Aligned(DONORS), "batches": ([],)}, jax.random.key(0))
