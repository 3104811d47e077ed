# SPDX-License-Identifier: Apache-2.0
"""KnOTS against a float64 transcription, its identities, and adapters against dense donors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, model, step
from treesurgeon.merge import knots, ties
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
run = jax.jit(knots.merge_aligned, static_argnames=("method", "density", "axis", "matrix"))


def merge(base, donors, **more):
  return run(jnp.asarray(base), tuple(donors), **more)


def draw(shape, count, rank=None):
  base = RNG.standard_normal(shape).astype(np.float32)
  deltas = []
  for _ in range(count):
    if rank is None:
      deltas.append(0.1 * RNG.standard_normal(shape))
    else:
      deltas.append(RNG.standard_normal((shape[0], rank)) @ RNG.standard_normal((rank, shape[1])))
  return base, [(base + d).astype(np.float32) for d in deltas]


def drawn_factors(shape, ranks):
  found = []
  for i, r in enumerate(ranks):
    a, b = RNG.standard_normal((shape[0], r)), RNG.standard_normal((r, shape[1]))
    found.append(leaves.LowRank(jnp.asarray(a, "float32"), jnp.asarray(b, "float32"), 0.5 + i))
  return found


def oracle(base, donors, density, weights=None, lam=1.0):
  """The official algorithm, tensor by tensor; rows are output neurons."""
  deltas = [np.asarray(d, np.float64) - base for d in donors]
  weights = weights or [1.0] * len(deltas)
  u, s, v = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
  live = s > 1e-5 * s[0]
  u, s, v = u[:, live], s[live], v[live]
  blocks = np.split(s[:, None] * v, len(deltas), axis=1)
  trimmed = []
  for x in blocks:
    keep = max(1, int(density * x.size))
    least = np.sort(np.abs(x).ravel())[x.size - keep]
    trimmed.append(np.where(np.abs(x) >= least, x, 0))
  weighted = [c * x for c, x in zip(weights, trimmed, strict=True)]
  sign = np.where(sum(weighted) >= 0, 1, -1)
  agree = [np.sign(x) == sign for x in weighted]
  total = sum(np.where(a, x, 0) for a, x in zip(agree, weighted, strict=True))
  count = sum(np.where(a, c, 0) for a, c in zip(agree, weights, strict=True))
  return base + lam * u @ (total / np.where(count == 0, 1, count))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_equals_the_definition(shape):
  base, donors = draw(shape, 3)
  got = merge(base, donors, density=0.3, weights=(1.0, 2.0, 0.5), lam=0.6)
  wanted = oracle(base, donors, 0.3, (1.0, 2.0, 0.5), 0.6)
  np.testing.assert_allclose(got, wanted, atol=3e-6, rtol=0)


def test_of_low_rank_only_what_is_there_is_counted():
  base, donors = draw((24, 18), 2, rank=2)
  base, donors = 0 * base, [d - base for d in donors]
  got = merge(base, donors, density=0.3)
  np.testing.assert_allclose(got, oracle(base, donors, 0.3), atol=2e-5, rtol=0)


def test_the_basis_reconstructs_every_donor():
  tau = jnp.asarray(RNG.standard_normal((3, 10, 8)), jnp.float32)
  u, blocks, rank = jax.jit(knots.align)(tau)
  assert int(rank) == 10
  for i in range(3):
    np.testing.assert_allclose(u @ blocks[i], tau[i], atol=1e-5, rtol=0)
  np.testing.assert_allclose(u.T @ u, np.eye(10), atol=1e-5, rtol=0)
  low = drawn_factors((9, 14), (2, 3, 1))
  outs, ins = [x.b.T for x in low], [x.scale * x.a for x in low]
  u, blocks, rank = jax.jit(knots.align_factors)(outs, ins)
  assert u.shape == (14, 6) and blocks.shape == (3, 6, 9) and int(rank) == 6
  for i, x in enumerate(low):
    np.testing.assert_allclose(u @ blocks[i], x.dense().T, atol=2e-5, rtol=0)


def test_linear_merging_commutes():
  base, donors = draw((10, 13), 3)
  got = merge(base, donors, method="linear", weights=(1.0, 2.0, 1.0))
  wanted = base + np.einsum("t,tij->ij", [0.25, 0.5, 0.25], np.stack(donors) - base)
  np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("ranks, axis, method", [
  ((2, 3), 0, "ties"), ((6, 7), -1, "ties"), ((2, 3), 0, "linear")
])  # fmt: skip
def test_adapters_equal_dense_donors(ranks, axis, method):
  low = drawn_factors((12, 10), ranks)  # (6, 7) have more directions than the output has
  zero = jnp.zeros((12, 10))
  got = merge(zero, low, method=method, density=0.4, axis=axis)
  wanted = merge(zero, [x.dense() for x in low], method=method, density=0.4, axis=axis)
  np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=0)
  if axis == 0 and method == "ties":
    dense = [np.asarray(x.dense()).T for x in low]
    wanted = oracle(np.zeros((10, 12)), dense, 0.4).T
    np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=0)


def test_a_fresh_adapter_changes_nothing():
  low = drawn_factors((8, 6), (2, 2))
  fresh = leaves.LowRank(low[0].a, 0 * low[0].b, 1.0)
  base = jnp.asarray(RNG.standard_normal((8, 6)), jnp.float32)
  np.testing.assert_array_equal(merge(base, [fresh, fresh], axis=0), base)
  got = merge(base, [fresh, low[1]], density=1.0, axis=0)
  np.testing.assert_allclose(got, base + low[1].dense(), atol=2e-5, rtol=0)


def test_one_donor_and_other_leaves():
  base, donors = draw((7, 9), 1)
  got = merge(base, donors, density=1.0)
  np.testing.assert_allclose(got, donors[0], atol=2e-6, rtol=0)
  base, donors = draw((31,), 2)
  got = merge(base, donors, density=0.3)
  wanted = ties.trim_elect_merge(jnp.asarray(base), tuple(map(jnp.asarray, donors)), density=0.3)
  np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)
  np.testing.assert_array_equal(merge(base, donors, density=0.0), base)


def adapted_models():
  spec = models.Spec(vocab_size=13, d_model=8, num_layers=2, num_heads=2, d_ff=8)
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  drawn = lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32)
  m = model.Model(spec, jax.tree.map(drawn, shapes))
  donors = []
  for seed in (1, 2):
    rng = np.random.default_rng(seed)
    low = {}
    for address in m.addresses():
      if address.endswith("/kernel") and address.startswith("layers/"):
        rows, cols = m.leaf(address).shape
        a, b = rng.standard_normal((rows, 2)), rng.standard_normal((2, cols))
        low[address] = leaves.LowRank(jnp.asarray(a, "float32"), jnp.asarray(b, "float32"), 0.1)
    donors.append(adapters.attach(m, low))
  return m, donors


def test_the_driver_merges_adapted_models_as_merged_ones():
  m, donors = adapted_models()
  merged = [d.replace(params=leaves.map_leaves(leaves.dense, d.params)) for d in donors]
  transform = knots.knots(density=0.5, lam=0.6, select="layers/.*")
  low = drivers.run(transform, m, collect.Materials(donors=donors))
  dense = drivers.run(transform, m, collect.Materials(donors=merged))
  for address in m.addresses():
    np.testing.assert_allclose(
      low.leaf(address), dense.leaf(address), atol=2e-5, rtol=0, err_msg=address
    )
  changed = [a for a in m.addresses() if (low.leaf(a) != m.leaf(a)).any()]
  assert changed == [a for a in m.addresses() if "/kernel" in a and a.startswith("layers/")]
  (aimed,) = step.by_path([("layers/0/mlp/.*", transform)])
  part = drivers.run((aimed,), m, collect.Materials(donors=donors))
  address = "layers/0/mlp/up/kernel"
  np.testing.assert_array_equal(part.leaf(address), low.leaf(address))
  np.testing.assert_array_equal(
    part.leaf("layers/1/mlp/up/kernel"), m.leaf(address.replace("0", "1"))
  )


def test_an_adapter_on_another_base_counts_with_its_base():
  m, (donor, _) = adapted_models()
  address = "layers/0/mlp/up/kernel"
  base, low = donor.leaf(address).parts
  moved = donor.update({address: leaves.Sum((base + 0.1, low))})
  out = drivers.run(knots.knots(density=1.0), m, collect.Materials(donors=[moved]))
  np.testing.assert_allclose(out.leaf(address), base + 0.1 + low.dense(), atol=1e-5, rtol=0)


def test_bfloat16():
  base, donors = draw((6, 8), 2)
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (base, *donors)]
  assert merge(cast[0], cast[1:]).dtype == jnp.bfloat16


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="method='mean'; valid: ties, linear"):
    registry.parse("merge.knots(method='mean')")
  with pytest.raises(ValueError, match="density=1.5 must lie between 0 and 1"):
    registry.parse("merge.knots(density=1.5)")
  m, donors = adapted_models()
  with pytest.raises(ValueError, match=r"weights=\(1.0, -1.0\) sum to zero"):
    drivers.run(knots.knots(weights=(1.0, -1.0)), m, collect.Materials(donors=donors))
