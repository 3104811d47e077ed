# SPDX-License-Identifier: Apache-2.0
"""ECoFLaP's ratios by the authors' loop where nothing fills up, exact counts, and its drivers."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from treesurgeon import models, registry
from treesurgeon.compress.prune import ecoflap, wanda
from treesurgeon.core import model, step
from treesurgeon.run import collect, drivers, dry, gradients


def authors(scores, sizes, sparsity, limit):
  """Fills groups up in proportion to their scores; those that are full leave the next round."""
  scores, sizes = np.array(scores, float), np.array(sizes, float)
  total, kept = sizes.sum() * (1 - sparsity), np.ceil(sizes * (1 - limit))
  while kept.sum() < total:
    more = np.ceil(scores / scores.sum() * (total - kept.sum()))
    kept = kept + more
    scores[kept >= sizes] = 0
    kept = np.minimum(kept, sizes)
  return 1 - kept / sizes


def test_ratios_are_those_of_the_authors_loop():
  sizes = {f"layers/{i}/w/kernel": 10_000 * (1 + i % 2) for i in range(5)}
  scores = dict(zip(sizes, (5.0, 0.1, 0.7, 1.3, 0.2), strict=True))
  for sparsity, limit in ((0.5, 0.6), (0.3, 0.9), (0.8, 1.0)):
    found = ecoflap.shares(scores, sizes, sparsity=sparsity, limit=limit)
    want = authors(list(scores.values()), list(sizes.values()), sparsity, limit)
    got = np.array([found[a] / sizes[a] for a in sizes])
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert got.max() <= limit + 1e-4


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(st.tuples(st.floats(0, 10), st.integers(1, 500)), min_size=1, max_size=8),
  st.floats(0, 1),
  st.floats(0, 1),
)
def test_the_mean_is_exact(groups, sparsity, more):
  limit = sparsity + (1 - sparsity) * more
  sizes = {f"layers/{i // 2}/{i % 2}/kernel": n for i, (_, n) in enumerate(groups)}
  scores = {a: s for a, (s, _) in zip(sizes, groups, strict=True)}
  for per in ecoflap.PER:
    found = ecoflap.shares(scores, sizes, sparsity=sparsity, limit=limit, per=per)
    assert sum(found.values()) == int(sparsity * sum(sizes.values()))
    assert all(0 <= found[a] <= sizes[a] for a in sizes)
    assert all(found[a] <= limit * sizes[a] + 2 for a in sizes)


@pytest.mark.parametrize("pruned", [0, 7, 15, 37, 60])
def test_within_a_kernel_it_is_wanda(pruned):
  rng = np.random.default_rng(0)
  w, squares = rng.normal(size=(12, 5)), rng.uniform(0.1, 9, size=12)
  out = np.asarray(jax.jit(ecoflap.prune)(jnp.asarray(w), jnp.asarray(squares), jnp.int32(pruned)))
  np.testing.assert_array_equal(out, np.where(out == 0, 0, np.float32(w)))
  gone = (out == 0).sum(axis=0)
  assert gone.sum() == pruned
  assert gone.max() - gone.min() <= 1
  if pruned % 5 == 0:
    even = wanda.prune(jnp.asarray(w), jnp.asarray(squares), sparsity=pruned / 60)
    np.testing.assert_array_equal(out, even)
  score = np.abs(w) * np.sqrt(squares)[:, None]
  for c in range(5):
    assert score[out[:, c] == 0, c].max(initial=0) < score[out[:, c] != 0, c].min(initial=99)


SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=8, max_positions=8)
TEXT = [np.random.default_rng(i).integers(0, 11, (2, 6)) for i in range(2)]


@functools.cache
def make():
  return model.Model(SPEC, models.init(SPEC, jax.random.key(0)))


def test_a_block_that_does_nothing_is_pruned_most():
  m = make()
  quiet = {a: 0 * m.leaf(a) for a in ("layers/0/attn/o/kernel", "layers/0/mlp/down/kernel")}
  loud = {a: 8 * m.leaf(a) for a in m.addresses() if a.startswith("layers/1/")}
  m = m.update({**quiet, **loud})
  given = collect.Materials(batches=TEXT)
  out = drivers.run_blockwise(registry.parse("compress.prune.ecoflap(limit=0.9)"), m, given)
  chosen = [a for a in m.addresses() if a.startswith("layers/") and a.endswith("kernel")]
  zeros = {a: int((np.asarray(out.leaf(a)) == 0).sum()) for a in chosen if a not in quiet}
  notes = out.lineage[-1].notes["sparsity"]
  assert notes["layers/0/mlp/up/kernel"] > 0.6 > 0.4 > notes["layers/1/mlp/up/kernel"]
  for a, n in zeros.items():
    assert n == pytest.approx(notes[a] * out.leaf(a).size, abs=0.5)
  assert sum(notes[a] * m.leaf(a).size for a in chosen) == pytest.approx(
    0.5 * sum(m.leaf(a).size for a in chosen), abs=1
  )
  (one,) = ecoflap.ecoflap()
  assert one.scope == "block"
  assert set(dry.dry_run((one,), m).params) == set(m.params)


def test_slopes_do_not_depend_on_what_else_is_asked_for():
  m, address = make(), "layers/1/mlp/up/kernel"
  alone = gradients.slope(m, TEXT, select=address)
  both = gradients.slope(m, TEXT, select="layers/1/mlp/.*/kernel")
  assert list(alone) == [address]
  np.testing.assert_allclose(alone[address].value, both[address].value, rtol=1e-3)
  assert alone[address].size == 64
  with pytest.raises(ValueError, match="slopes of the loss need at least one batch"):
    gradients.slope(m, [])
  (packed,) = registry.parse("compress.prune.magnitude(pattern='2:4', packed=True)")
  with pytest.raises(ValueError, match="layers/0/attn/./kernel: a compressed leaf has no gradient"):
    gradients.slope(packed.apply(m, {}, jax.random.key(0)), TEXT)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"limit": 0.4}, "limit=0.4 must lie between the sparsity 0.5 and 1"),
    ({"per": "layer"}, "per='layer': valid are block, matrix"),
    ({"sparsity": 1.2}, "sparsity=1.2: valid is 0"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    ecoflap.ecoflap(**arguments)


def test_it_is_aimed_like_any_other():
  (aimed,) = step.by_path([("layers/1/.*", ecoflap.ecoflap())])
  assert aimed.scope == "block"
  assert all(a.startswith("layers/1/") for (a,) in aimed.units(make().addresses()))
