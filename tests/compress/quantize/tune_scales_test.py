# SPDX-License-Identifier: Apache-2.0
"""Scales trained end to end: one step by hand, a lower loss, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.compress.quantize import tune_scales
from treesurgeon.core import leaves, model, paths
from treesurgeon.models import losses
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=16, d_model=8, num_layers=2, num_heads=2, d_ff=16, family="llama")
BATCHES = [np.random.default_rng(0).integers(0, 16, (2, 8))]
MATERIALS = collect.Materials(batches=BATCHES)
UP = "layers/.*/mlp/up/kernel"


@functools.cache
def quantized():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  return drivers.run(registry.parse("compress.quantize.rtn(bits=2, group_size=8)"), m)


def loss(m):
  return float(losses.nll(SPEC, m.params, BATCHES[0]))


def test_the_loss_falls_and_only_scales_change():
  m = quantized()
  step = f"compress.quantize.tune_scales(steps=30, rate=0.01, select='{UP}')"
  out = drivers.run(registry.parse(step), m, MATERIALS)
  assert loss(out) < loss(m) - 1e-3
  for address in m.addresses():
    old, new = m.leaf(address), out.leaf(address)
    if address.endswith("up/kernel"):
      np.testing.assert_array_equal(new.codes, old.codes)
      assert (new.scales != old.scales).any()
    else:
      jax.tree.map(np.testing.assert_array_equal, new, old)


@pytest.mark.slow
def test_a_first_step_is_adams():
  m = quantized()
  (one,) = tune_scales.tune_scales(steps=1, rate=1e-3, select=UP)
  out = one.apply(m, {"batches": BATCHES}, jax.random.key(0))
  flat = paths.walk(m.params)
  (name,) = [n for n in flat if n.endswith("up/kernel")]

  def value(scales):
    leaf = leaves.QuantizedTensor(**{**vars(flat[name]), "scales": scales})
    return losses.nll(SPEC, paths.nest({**flat, name: leaf}), BATCHES[0])

  slope = jax.grad(value)(flat[name].scales)
  moved = paths.walk(out.params)[name].scales - flat[name].scales
  np.testing.assert_allclose(moved, -1e-3 * jnp.sign(slope), atol=2e-5)


def test_what_cannot_be_done_is_named():
  plain = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  with pytest.raises(ValueError, match="layers/0/.* is not compressed, nor is any other"):
    drivers.run(registry.parse("compress.quantize.tune_scales()"), plain, MATERIALS)
  with pytest.raises(ValueError, match="steps=-1 must not be negative"):
    tune_scales.tune_scales(steps=-1)
