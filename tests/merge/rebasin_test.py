# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.core import paths
from treesurgeon.merge import (
  activation_matching,
  alignment,
  matching,
  permutations,
  straight_through,
  units,
)
from treesurgeon.run import collect, drivers

BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm": "layer", "gated": False}
SMALL = {"vocab_size": 13, "d_model": 12, "num_layers": 2, "d_ff": 10, "max_positions": 16}
SPECS = {
  "llama": models.Spec(**SMALL, num_heads=4, head_dim=4, num_kv_heads=2),
  "gpt2": models.Spec(**SMALL, **BIASES, num_heads=3, positions="learned", tied=True),
  "qwen3": models.Spec(
    **SMALL, num_heads=4, num_kv_heads=2, head_dim=6, rope_dim=2, qk_norm="head"
  ),
  "mlp": models.VisionSpec(
    "mlp", image_size=4, num_classes=3, d_model=6, num_layers=2, d_ff=(8, 5)
  ),
  "conv": models.VisionSpec("conv", image_size=4, num_classes=3, d_model=6, num_layers=2),
}
TINY = models.Spec(vocab_size=13, d_model=8, num_layers=1, num_heads=2, d_ff=6)
TOKENS = [np.random.default_rng(5).integers(0, 13, (4, 12)) for _ in range(2)]


def draw(spec, seed=0, scale=0.5):
  rng = np.random.default_rng(seed)
  shapes = models.addresses(spec)
  return {a: (scale * rng.standard_normal(s)).astype(np.float32) for a, s in shapes.items()}


def scramble(spec, seed=1):
  rng = np.random.default_rng(seed)
  index = permutations.identity(spec)
  for group in permutations.groups(spec):
    index = units.compose(index, group, rng.permutation(group.size))
  return index


def model(spec, flat):
  return model_lib.Model(spec, paths.unflatten({a: jnp.asarray(x) for a, x in flat.items()}))


def rebasin(m, donors, batches=(), **arguments):
  transform = registry.load("merge.rebasin")(**arguments)
  return drivers.run(transform, m, collect.Materials(batches=batches, donors=donors))


def equal(a, b):
  return all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_permutation_is_recovered_exactly(name, seed):
  spec = SPECS[name]
  a = draw(spec, seed)
  b = units.apply(a, scramble(spec, seed))
  (found,) = alignment.align(spec, a, [b], rng=np.random.default_rng(seed))
  assert equal(a, units.apply(b, found.index))
  assert found.sweeps <= 5
  assert found.gain > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_permutation_is_recovered_from_a_network_near_it(name):
  spec = SPECS[name]
  a, noise = draw(spec), draw(spec, seed=9, scale=0.05)
  near = {n: a[n] + noise[n] for n in a}
  b = units.apply(near, scramble(spec))
  (found,) = alignment.align(spec, a, [b], rng=np.random.default_rng(0))
  assert equal(near, units.apply(b, found.index))


def test_the_device_finds_what_the_host_finds():
  spec = TINY
  a, b = draw(spec), draw(spec, seed=3)
  groups, start = permutations.groups(spec), permutations.identity(spec)
  on = [{n: put(x) for n, x in t.items()} for put in (np.asarray, jnp.asarray) for t in (a, b)]
  host = matching.match(groups, on[0], on[1], start, rng=np.random.default_rng(0))
  device = matching.match(groups, on[2], on[3], start, rng=np.random.default_rng(0))
  assert jax.tree.all(jax.tree.map(np.array_equal, host.index, device.index))


def test_each_group_is_left_at_its_best():
  # Brute force: no single renumbering of one group's units brings the networks nearer.
  spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1, d_ff=4)
  a, b = draw(spec), draw(spec, seed=1)
  groups, start = permutations.groups(spec), permutations.identity(spec)
  found = matching.match(groups, a, b, start, rng=np.random.default_rng(0))

  def inner(index):
    moved = units.apply(b, index)
    return sum(float((a[n].astype(np.float64) * moved[n]).sum()) for n in a)

  best = inner(found.index)
  np.testing.assert_allclose(best - inner(start), found.gain, rtol=1e-5)
  for group in groups:
    for order in itertools.permutations(range(group.size)):
      assert inner(units.compose(found.index, group, order)) <= best + 1e-5
  # One hidden layer is one assignment problem, solved in the first sweep; the second finds no gain.
  one = matching.match(groups[:1], a, b, start, rng=np.random.default_rng(0))
  assert one.sweeps <= 2


def test_similarity_against_loops():
  spec = SPECS["qwen3"]
  a, b = draw(spec), draw(spec, seed=1)
  for group in permutations.groups(spec):
    want = np.zeros((group.size, group.size))
    for m in group.members:
      at = m.places(group.size)
      x, y = (np.moveaxis(t[m.address].astype(np.float64), m.axis, 0) for t in (a, b))
      for i, j in itertools.product(range(group.size), repeat=2):
        want[i, j] += (x[at[:, i]] * y[at[:, j]]).sum()
    np.testing.assert_allclose(matching.similarity(group, a, b), want, atol=1e-4)


def test_singular_values_are_invariant():
  spec = SPECS["gpt2"]
  a = draw(spec)
  b = units.apply(a, scramble(spec))
  for name in (n for n in a if n.endswith("kernel")):
    s, t = (np.linalg.svd(x[name].astype(np.float64), compute_uv=False) for x in (a, b))
    np.testing.assert_allclose(s, t, atol=1e-10)


def test_the_step_averages_the_permuted_donor():
  spec = TINY
  a = draw(spec)
  donor = units.apply(a, scramble(spec))
  m, d = model(spec, a), model(spec, donor)
  out = rebasin(m, [d])
  for name in a:
    np.testing.assert_array_equal(out.leaf(name), a[name], err_msg=name)
  alone = rebasin(m, [d], weights=(0.0, 1.0))
  assert all(np.array_equal(alone.leaf(n), a[n]) for n in a)
  (told,) = alone.lineage[0].notes["matched"]
  assert told["distance"][1] == 0 < told["distance"][0]
  plain = registry.load("merge.linear")()
  worse = drivers.run(plain, m, collect.Materials(donors=[d]))
  assert not np.allclose(worse.leaf("embed/tokens/embedding"), a["embed/tokens/embedding"])


def test_several_donors_agree_with_each_other():
  spec = SPECS["mlp"]
  a = draw(spec)
  donors = [model(spec, units.apply(a, scramble(spec, s))) for s in (1, 2, 3)]
  out = rebasin(model(spec, a), donors, weights=(0.0, 1.0, 1.0, 1.0))
  for name in a:
    np.testing.assert_allclose(out.leaf(name), a[name], atol=1e-6, err_msg=name)


def test_many_networks_end_no_farther_apart_than_after_one_round():
  spec = SPECS["mlp"]
  base, rest = draw(spec), [draw(spec, seed=s) for s in (1, 2, 3)]

  def spread(found):
    placed = [base, *(units.apply(d, f.index) for d, f in zip(rest, found, strict=True))]
    return sum(
      ((x[n] - y[n]) ** 2).sum() for x, y in itertools.combinations(placed, 2) for n in base
    )

  once = [alignment.align(spec, base, [d], rng=np.random.default_rng(0))[0] for d in rest]
  many = alignment.align(spec, base, rest, rng=np.random.default_rng(0))
  assert spread(many) <= spread(once)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_recover_a_permutation(name):
  spec = SPECS[name]
  a = draw(spec)
  b = units.apply(a, scramble(spec))
  (found,) = alignment.align(
    spec, a, [b], TOKENS, rng=np.random.default_rng(0), method="activation"
  )
  assert equal(a, units.apply(b, found.index))


def test_activations_of_images_recover_a_permutation():
  spec = SPECS["mlp"]
  a = draw(spec)
  x = np.random.default_rng(0).standard_normal((64, 4, 4, 1)).astype(np.float32)
  labels = np.zeros(32, np.int32)
  batches = [{"inputs": part, "labels": labels} for part in (x[:32], x[32:])]
  b = units.apply(a, scramble(spec))
  (found,) = alignment.align(
    spec, a, [b], batches, rng=np.random.default_rng(0), method="activation"
  )
  moved = units.apply(b, found.index)
  dead = 0  # a rectifier that never fires correlates with nothing; its place is arbitrary
  for n in a:
    dead += not np.array_equal(a[n], moved[n])
  assert dead <= 3


def test_correlations_against_numpy():
  spec = SPECS["llama"]
  a, b = (paths.unflatten(jax.tree.map(jnp.asarray, draw(spec, s))) for s in (0, 1))
  found = activation_matching.correlations(spec, a, b, TOKENS, ["mlp/down/in", "out"])
  seen = []
  run = jax.jit(lambda params, t: models.forward(spec, params, t, observe=lambda n, x: x))
  for params in (a, b):
    runs = [run(params, t) for t in TOKENS]
    seen.append(np.concatenate([r.observed["mlp/down/in"][1].reshape(-1, 10) for r in runs]))
  want = np.corrcoef(seen[0].T, seen[1].T)[:10, 10:]
  np.testing.assert_allclose(found["mlp/down/in", 1], want, atol=1e-4)
  assert set(found) == {(t, i) for t in ("mlp/down/in", "out") for i in (0, 1)}


def test_a_constant_unit_correlates_with_nothing():
  sums = activation_matching.correlation(jnp.full((5, 1), 3.0), jnp.arange(5.0)[:, None])
  assert activation_matching._pearson(sums).item() == 0.0


def test_the_straight_through_estimator_lowers_the_loss_at_the_midpoint():
  spec = TINY
  a, b = draw(spec), draw(spec, seed=4)
  groups, start = permutations.groups(spec), permutations.identity(spec)
  batch = TOKENS[:1]
  weight = matching.match(groups, a, b, start, rng=np.random.default_rng(0))
  found, losses = straight_through.match(
    spec, groups, a, b, start, batch, rng=np.random.default_rng(0), steps=12, rate=0.05
  )

  def midpoint(index):
    moved = units.apply(b, index)
    mean = {n: jnp.asarray(0.5 * (a[n] + moved[n])) for n in a}
    return float(jax.jit(models.nll, static_argnums=0)(spec, paths.unflatten(mean), batch[0]))

  np.testing.assert_allclose(losses[0], midpoint(weight.index), rtol=1e-5)
  np.testing.assert_allclose(losses.min(), midpoint(found.index), rtol=1e-5)
  assert losses.min() < losses[0]


@pytest.mark.parametrize("method", ["activation", "ste"])
def test_methods_with_data_through_the_driver(method):
  spec = TINY
  a = draw(spec)
  d = model(spec, units.apply(a, scramble(spec)))
  out = rebasin(model(spec, a), [d], TOKENS, method=method, steps=1)
  for name in a:
    np.testing.assert_allclose(out.leaf(name), a[name], atol=1e-6, err_msg=name)
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    rebasin(model(spec, a), [d], method=method)


def test_inside_a_trace_the_search_is_a_callback():
  spec = TINY
  a = draw(spec)
  m, d = model(spec, a), model(spec, units.apply(a, scramble(spec)))
  (one,) = registry.load("merge.rebasin")()
  evidence = {"donors": collect.needs.Aligned([d])}

  @jax.jit
  def run(params):
    return one.apply(m.replace(params=params), evidence, jax.random.key(0)).params

  out = paths.flatten(run(m.params))
  for name in a:
    np.testing.assert_array_equal(out[name], a[name], err_msg=name)


def test_bfloat16_and_wrong_arguments():
  spec = SPECS["mlp"]
  a = draw(spec)
  small = {n: np.asarray(jnp.asarray(x, jnp.bfloat16)) for n, x in a.items()}
  m, d = model(spec, small), model(spec, units.apply(small, scramble(spec)))
  out = rebasin(m, [d])
  assert all(np.array_equal(out.leaf(n), small[n]) for n in a)
  with pytest.raises(ValueError, match=r"weights=\(1.0,\) has 1 entries for 2 models"):
    rebasin(m, [d], weights=(1.0,))
  with pytest.raises(ValueError, match="sum to zero"):
    rebasin(m, [d], weights=(1.0, -1.0))
  with pytest.raises(ValueError, match="sweeps=0 and steps=100 must be >= 1"):
    registry.load("merge.rebasin")(sweeps=0)
  with pytest.raises(ValueError, match="method='sinkhorn' must be"):
    registry.load("merge.rebasin")(method="sinkhorn")
