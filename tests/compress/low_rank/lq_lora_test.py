# SPDX-License-Identifier: Apache-2.0
"""LQ-LoRA: the turns against numpy, the error against either part alone, and a budget."""

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.compress.low_rank import lq_lora
from treesurgeon.core import formats, leaves, model
from treesurgeon.run import budget, collect, drivers

ROWS, COLS, RANK = 16, 12, 2
ADDRESS = "layers/0/mlp/up/kernel"
RNG = np.random.default_rng(0)
W = RNG.normal(size=(ROWS, COLS)) * 0.2 + np.outer(RNG.normal(size=ROWS), RNG.normal(size=COLS))
LEVELS = formats.levels("nf", 3).astype(float)
FORM = {"rank": RANK, "bits": 3, "group_size": 8}


def rounded(w):
  """NF3 in groups of 8 rows."""
  parts = w.reshape(2, 8, COLS)
  scale = np.abs(parts).max(axis=1, keepdims=True)
  near = np.abs((parts / scale)[..., None] - LEVELS).argmin(-1)
  return (LEVELS[near] * scale).reshape(ROWS, COLS)


def turns(w, fisher):
  """The alternation of the paper in float64; returns the errors until they rise."""
  r, c = (np.sqrt(fisher.mean(axis=i, keepdims=True)) for i in (1, 0))
  q, errors = np.zeros_like(w), []
  while len(errors) < 2 or errors[-1] < errors[-2]:
    u, s, vt = np.linalg.svd(r * (w - q) * c, full_matrices=False)
    low = (u[:, :RANK] * s[:RANK]) @ vt[:RANK] / r / c
    q = rounded(w - low)
    errors.append(np.linalg.norm(np.sqrt(fisher) * (w - q - low)))
  return errors


@pytest.mark.parametrize("weighted", [False, True])
def test_turns_are_the_papers_and_stop_before_the_error_rises(weighted):
  fisher = RNG.random((ROWS, COLS)) ** 3 if weighted else np.ones((ROWS, COLS))
  given = jnp.asarray(fisher, jnp.float32) if weighted else None
  parts = lq_lora.decompose(jnp.asarray(W, jnp.float32), given, **FORM)
  errors = turns(W, fisher)
  np.testing.assert_allclose(parts.error, errors[-2], rtol=1e-3)
  once = lq_lora.decompose(jnp.asarray(W, jnp.float32), given, **FORM, iterations=1)
  np.testing.assert_allclose(once.error, errors[0], rtol=1e-3)
  assert parts.error <= once.error < np.linalg.norm(np.sqrt(fisher) * (W - rounded(W)))


def single():
  w = jnp.asarray(W, jnp.float32)
  return model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": w[None]}}}}})


def test_the_leaf_is_a_sum_that_runs_and_is_its_own_fixed_point():
  m = single()
  out = drivers.run(lq_lora.lq_lora(**FORM), m)
  leaf = out.leaf(ADDRESS)
  base, low = leaf.parts
  assert (base.format, base.bits, low.rank) == ("nf", 3, RANK)
  assert isinstance(base.scales, leaves.QuantizedTensor)  # integers, in their turn
  probe = jnp.asarray(RNG.normal(size=(3, ROWS)), jnp.float32)
  np.testing.assert_allclose(
    kernels.matmul(probe, leaf), probe @ leaf.dense(), rtol=1e-4, atol=1e-4
  )
  again = drivers.run(lq_lora.lq_lora(**FORM), out)
  np.testing.assert_array_equal(again.leaf(ADDRESS).parts[1].a, low.a)


def test_weights_without_any_information_are_all_alike():
  plain = lq_lora.decompose(jnp.asarray(W, jnp.float32), **FORM)
  zeros = lq_lora.decompose(jnp.asarray(W, jnp.float32), jnp.zeros((ROWS, COLS)), **FORM)
  np.testing.assert_allclose(zeros.error, plain.error, rtol=1e-5)


@pytest.mark.slow
def test_a_budget_chooses_among_configurations():
  def build(**form):
    return lq_lora.lq_lora(rank=RANK, **form)

  choices = budget.configurations(build, bits=(2, 3, 8), group_sizes=(8,))
  m, sizes = single(), []
  for limit in (400, 10_000):
    out = drivers.run(budget.plan(choices, m, collect.Materials(), limit), m)
    sizes.append(out.nbytes())
    assert sizes[-1] <= limit
  assert sizes[0] < sizes[1] and out.leaf(ADDRESS).parts[0].bits == 8


@pytest.mark.parametrize(
  ("arguments", "message"),
  [({"rank": 0}, "rank=0 must be at least 1"), ({"bits": 1}, "has codes of 2, 3"),
   ({"group_size": 0}, "group_size=0: groups have 1 row or more")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    lq_lora.lq_lora(**arguments)
