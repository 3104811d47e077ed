# SPDX-License-Identifier: Apache-2.0
"""Inputs are rounded as numpy rounds them, and weights stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels, registry
from treesurgeon.compress.quantize import activations, rtn
from treesurgeon.core import leaves, model, step
from treesurgeon.stats import folds

ADDRESS = "layers/0/mlp/up/kernel"


def problem():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
  return model.Part(None, {ADDRESS: w}), rng.normal(size=(7, 12)).astype(np.float32)


def apply(m, transform, x=None):
  evidence = {}
  if x is not None:
    evidence = {"inputs": {ADDRESS: folds.PerFeature(jnp.abs(x).max(axis=0), jnp.float32(7))}}
  for one in transform:
    m = one.apply(m, evidence, jax.random.key(0))
  return m


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("static", [False, True])
def test_integers_against_numpy(per, static):
  m, x = problem()
  if static and per == "token":
    with pytest.raises(ValueError, match="static=True: a token's scale is known when it comes"):
      activations.activations(per=per, static=True)
    return
  leaf = apply(m, activations.activations(bits=4, per=per, static=static), 2 * x).leaf(ADDRESS)
  top = np.abs(x).max(axis=1, keepdims=True) if per == "token" else np.abs(x).max()
  scale = (2 * top if static else top) / 7.5
  rounded = np.clip(np.round(x / scale), -8, 7) * scale
  expected = rounded @ np.asarray(m.leaf(ADDRESS))
  np.testing.assert_allclose(kernels.matmul(jnp.asarray(x), leaf), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(leaf.dense(), m.leaf(ADDRESS))


def test_it_wraps_what_is_quantized_and_knows_itself():
  m, x = problem()
  m = apply(m, rtn.rtn(bits=4, group_size=4))
  once = apply(m, activations.activations())
  assert isinstance(once.leaf(ADDRESS).weight, leaves.QuantizedTensor)
  again = apply(once, activations.activations())
  jax.tree.map(np.testing.assert_array_equal, again.leaf(ADDRESS), once.leaf(ADDRESS))
  fp8 = apply(once, activations.activations(format="e4m3fn")).leaf(ADDRESS)
  assert fp8.format == "e4m3fn" and isinstance(fp8.weight, leaves.QuantizedTensor)


def test_recipes_are_chains():
  fp8 = registry.parse("compress.quantize.w8a8_fp()")
  assert step.spell(registry.parse(step.spell(fp8))) == step.spell(fp8)
  names = [one.info["name"].rsplit(".", 1)[1] for one in fp8]
  assert names == ["rtn", "activations"]
  chained = registry.parse("compress.quantize.smoothquant() + compress.quantize.w8a8_int()")
  names = [one.info["name"].rsplit(".", 1)[1] for one in chained]
  assert names == ["smoothquant", "gptq", "activations"]
  with pytest.raises(ValueError, match="quantize.w4a16 is a recipe and takes no arguments; write"):
    registry.parse("compress.quantize.w4a16(bits=3)")


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="bits=9"):
    activations.activations(bits=9)
  with pytest.raises(ValueError, match="per='channel': valid are token, tensor"):
    activations.activations(per="channel")
