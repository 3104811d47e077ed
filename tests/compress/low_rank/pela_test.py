# SPDX-License-Identifier: Apache-2.0
"""PELA: its loss against its terms, and a network that comes nearer to its original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.distill import losses, student
from treesurgeon.compress.low_rank import pela, svd
from treesurgeon.core import leaves, model, paths
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=7, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=16)
TEXT = [np.random.default_rng(0).integers(0, 7, (4, 9)).astype(np.int32)]
KEY = jax.random.key(0)


def net():
  return model.Model(SPEC, jax.tree.map(lambda x: 5 * x, models.init(SPEC, KEY)))


def test_the_bound_is_on_the_largest_change_of_an_entry():
  rng = np.random.default_rng(1)
  a, b, w = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2, 5)), rng.normal(size=(3, 4, 5))
  expected = np.mean((np.abs(a @ b - w).max(axis=(1, 2)) - 0.1) ** 2)
  thin = leaves.LowRank(jnp.asarray(a), jnp.asarray(b))
  found = pela.perturbation({"w": thin}, {"w": jnp.asarray(w)}, bound=0.1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_terms_also_where_some_layers_are_factorized():
  m = net()
  thin = svd.svd(rank=2, select="layers/1/mlp/.*/kernel")[0].apply(m, {}, KEY)
  train, rest = student.masters(thin)
  originals = pela._originals(m, train)
  assert list(originals) == [n for n in train if "1:2/mlp" in n and n.endswith("kernel")]
  given = m.params, originals, (jnp.float32(2.0), jnp.float32(3.0))
  found = pela.loss((SPEC, 0.01), train, TEXT[0], KEY, rest, given)
  params = paths.nest({**rest, **train})
  factors = {n: train[n] for n in originals}
  expected = (
    models.nll(SPEC, params, TEXT[0])
    + 2 * losses.difference(SPEC, params, m.params, jnp.asarray(TEXT[0]))
    + 3 * pela.perturbation(factors, originals, bound=0.01)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_training_brings_the_blocks_nearer_and_keeps_the_factors():
  m = net()
  given = collect.Materials(batches=TEXT)
  start = drivers.run(svd.svd(rank=2), m, given)
  # The network is untrained and the text random, so the task itself would lead away from it.
  out = drivers.run(pela.pela(rank=2, features=100.0, steps=25, rate=0.01), m, given)
  apart = [losses.difference(SPEC, x.params, m.params, jnp.asarray(TEXT[0])) for x in (start, out)]
  assert float(apart[1]) < 0.9 * float(apart[0])
  leaf = out.leaf("layers/0/attn/q/kernel")
  assert isinstance(leaf, leaves.LowRank) and leaf.rank == 2
  note = out.lineage[0].notes
  assert note["last_loss"] < note["first_loss"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"ratio": 0.0}, "ratio=0.0: factors hold"),
    ({"features": -1.0}, "features=-1.0 must not be negative"),
    ({"rate": 0.0}, "rate=0.0 must be above 0"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    pela.pela(**arguments)
