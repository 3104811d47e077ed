# SPDX-License-Identifier: Apache-2.0
"""Formulations of `chunked` that only large matrices, or few tokens, lead to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.kernels.matmul import arg_specs, xla

KEY = jax.random.key(0)


def check(spec):
  x, leaf = arg_specs.operands(spec, KEY)
  y = jax.jit(xla.chunked)(x, leaf)
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  np.testing.assert_allclose(y, expected, rtol=3e-5, atol=3e-5)
  return x, leaf


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", ["even", "remainder", "long group", "one bit", "odd rows"])
def test_blocks_of_columns(name, tokens, monkeypatch):
  monkeypatch.setattr(xla, "COLUMNS", 4)
  check(dataclasses.replace(arg_specs.TESTS[name], tokens=tokens, cols=12))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bfloat16_inputs_are_multiplied_exactly(tokens, bits):
  check(arg_specs.ArgSpec(tokens, 300, 8, bits=bits, dtype="bfloat16"))


@pytest.mark.parametrize("tokens", [1, 2])
def test_gradients_through_blocks_of_columns(tokens, monkeypatch):
  monkeypatch.setattr(xla, "COLUMNS", 4)
  x, leaf = check(arg_specs.ArgSpec(tokens, 256, 12, symmetric=False))
  g = jax.random.normal(KEY, (tokens, 12))

  def loss(x, scales):
    return (xla.chunked(x, dataclasses.replace(leaf, scales=scales)) * g).sum()

  def dense_loss(x, scales):
    return (jnp.dot(x, dataclasses.replace(leaf, scales=scales).dense()) * g).sum()

  got = jax.jit(jax.grad(loss, (0, 1)))(x, leaf.scales)
  wanted = jax.grad(dense_loss, (0, 1))(x, leaf.scales)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
