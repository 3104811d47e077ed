# SPDX-License-Identifier: Apache-2.0
"""BitStack: blocks by definition in float64, ranks by brute force, any prefix, any budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.compress.quantize import bitstack, bitstack_cut, bitstack_sort
from treesurgeon.core import leaves, model
from treesurgeon.models import losses
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, family="llama")
BATCHES = [np.random.default_rng(0).integers(0, 32, (2, 12))]
MATERIALS = collect.Materials(batches=BATCHES)


@functools.cache
def stacked():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim == 2), jnp.float32)
  m = model.Model(SPEC, jax.tree.map(draw, shapes))
  step = "compress.quantize.bitstack(blocks=3, rank=2, select='layers/.*/mlp/.*/kernel')"
  return drivers.run(registry.parse(f"{step} + compress.quantize.bitstack_sort()"), m, MATERIALS)


def test_blocks_by_definition():
  rng = np.random.default_rng(0)
  w, squares = rng.normal(size=(14, 9)), rng.exponential(size=14)
  leaf = bitstack.quantize(jnp.asarray(w), jnp.asarray(squares), blocks=4, rank=2)
  norms = np.sqrt(squares) + 1e-3 * np.sqrt(squares).mean()
  left, errors = w * norms[:, None], []
  for block in leaf.parts:
    errors.append(np.linalg.norm(left))
    u, s, vt = np.linalg.svd(np.abs(left))
    want = np.where(left >= 0, 1, -1) * ((u[:, :2] * s[:2]) @ vt[:2]) / norms[:, None]
    np.testing.assert_allclose(block.dense(), want, atol=4e-3)
    left = left - np.asarray(block.dense(), float) * norms[:, None]
  assert (np.diff([*errors, np.linalg.norm(left)]) < 0).all()
  np.testing.assert_allclose(leaf.dense(), w - left / norms[:, None], atol=1e-5)


def test_a_full_rank_magnitude_is_exact_but_for_float16():
  w = np.random.default_rng(0).normal(size=(6, 5))
  leaf = bitstack.quantize(jnp.asarray(w), jnp.zeros(6), blocks=2, rank=16)
  np.testing.assert_allclose(leaf.dense(), w, atol=1e-4)
  assert leaf.parts[0].rank == 5 and leaf.parts[0].a.dtype == "float16"


def test_ranks_by_brute_force():
  m = stacked()
  stacks = {a: bitstack.stack(m.leaf(a)) for a in m.addresses()}
  stacks = {a: b for a, b in stacks.items() if b}
  assert len(stacks) == 6
  places = {(a, i): int(b.order[0, 0]) for a, s in stacks.items() for i, b in enumerate(s)}
  assert sorted(places.values()) == list(range(18))
  for level in (1, 2):
    below = m.update({a: leaves.dense(leaves.Sum(b[:level])) for a, b in stacks.items()})
    loss = {}
    for a, b in stacks.items():
      more = below.update({a: leaves.dense(leaves.Sum(b[: level + 1]))})
      loss[a] = float(losses.nll(SPEC, more.params, BATCHES[0]))
    by_loss = sorted(stacks, key=loss.__getitem__)
    assert sorted(stacks, key=lambda a: places[a, level]) == by_loss
    assert {places[a, level] for a in stacks} == set(range(6 * level, 6 * level + 6))


def test_any_prefix_is_a_model_and_holds_the_budget(tmp_path):
  m = stacked()
  least = bitstack_cut.cut(m, m.nbytes() - 1)
  sizes, kept = [], []
  while True:
    sizes.append(least.nbytes())
    kept.append({a: len(bitstack.stack(least.leaf(a))) for a in m.addresses()})
    try:
      least = bitstack_cut.cut(m, sizes[-1] - 1)
    except ValueError as error:
      assert f"budget={sizes[-1] - 1:,} bytes cannot be met; with one block" in str(error)
      break
  assert len(sizes) == 12 and (np.diff(sizes) < 0).all()  # 18 blocks, of which 6 always stay
  for more, fewer in zip(kept, kept[1:], strict=False):
    assert sum(more.values()) == sum(fewer.values()) + 1
    assert all(more[a] >= fewer[a] for a in more)
  half = bitstack_cut.cut(m, sizes[5])
  io.save(half, tmp_path / "out")
  again = io.load(tmp_path / "out")
  assert again.nbytes() == sizes[5]
  out = models.forward(SPEC, again.params, BATCHES[0]).logits
  np.testing.assert_allclose(out, models.forward(SPEC, half.params, BATCHES[0]).logits, atol=1e-5)
  assert bitstack_cut.cut(m, m.nbytes()).params is m.params
  assert bitstack_cut.cut(m, 0.9).nbytes() == max(s for s in sizes if s <= 0.9 * m.nbytes())


def test_what_cannot_be_done_is_named():
  m = stacked()
  plain = m.update({a: leaves.dense(m.leaf(a)) for a in m.addresses()})
  with pytest.raises(ValueError, match="no kernel is a stack of blocks; apply compress"):
    bitstack_cut.cut(plain, 10**9)
  with pytest.raises(ValueError, match="layers/0/mlp/up/kernel is no stack of blocks"):
    bitstack_sort.rank(plain, BATCHES, ["layers/0/mlp/up/kernel"])
  with pytest.raises(ValueError, match="on calibration data; there is none"):
    bitstack_sort.rank(m, [], ["layers/0/mlp/up/kernel"])
  with pytest.raises(ValueError, match="rank=0: valid is 1 or more"):
    bitstack.bitstack(rank=0)
  with pytest.raises(ValueError, match="budget=0: valid are bytes, or a fraction above 0"):
    bitstack_cut.bitstack_cut(budget=0)
