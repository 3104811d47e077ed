# SPDX-License-Identifier: Apache-2.0
"""Signatures against linear algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import model
from treesurgeon.merge import robust_weight_signatures as rws

RNG = np.random.default_rng(0)


def draw(count, scale=1.0, shape=(6, 7)):
  return [(scale * RNG.standard_normal(shape)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_a_signature_is_orthogonal_to_the_standard_change(scale):
  pretrained, standard, robust = draw(3, scale)
  got = rws.extract(*map(jnp.asarray, (robust, pretrained, standard)))
  r, s = (x.astype(np.float64) - pretrained for x in (robust, standard))
  wanted = r - (r * s).sum() / (s * s).sum() * s
  np.testing.assert_allclose(got, wanted, atol=1e-6 * scale)
  got = np.asarray(got, np.float64)
  cosine = (got * s).sum() / np.linalg.norm(got) / np.linalg.norm(s)
  assert abs(cosine) < 1e-6


def test_without_a_standard_change_the_whole_robust_change_is_left():
  pretrained, robust = (jnp.asarray(x) for x in draw(2))
  np.testing.assert_array_equal(rws.extract(robust, pretrained, pretrained), robust - pretrained)


def test_several_are_averaged_or_weighted():
  standard, pretrained, a, b = map(jnp.asarray, draw(4))
  first, second = (np.asarray(rws.extract(x, pretrained, standard), np.float64) for x in (a, b))
  got = rws.patch(standard, (pretrained, a, b), alpha=0.5)
  np.testing.assert_allclose(got, standard + 0.25 * (first + second), atol=1e-6)
  got = rws.patch(standard, (pretrained, a, b), weights=(2.0, -1.0))
  np.testing.assert_allclose(got, standard + 2 * first - second, atol=2e-6)


def test_only_the_first_layers_are_patched():
  names = ["layers/0/w", "layers/1/w", "layers/10/w", "embed/w"]
  (one,) = rws.robust_weight_signatures(layers=1)
  assert one.units(names) == [("layers/0/w",)]
  (one,) = rws.robust_weight_signatures(select="embed/.*")
  assert one.units(names) == [("embed/w",)]


def test_bfloat16_and_mistakes():
  one = jnp.ones(2, jnp.bfloat16)
  got = rws.patch(one, (one, 2 * one))
  assert got.dtype == jnp.bfloat16
  assert got.tolist() == [2.0, 2.0]
  with pytest.raises(ValueError, match="layers=0 must be at least 1"):
    registry.parse("merge.robust_weight_signatures(layers=0)")
  m = model.Part(None, {"layers/0/w": one})
  (step,) = rws.robust_weight_signatures()
  with pytest.raises(ValueError, match="1 donors: give the pretrained model first"):
    step.apply(m, {"donors": {"layers/0/w": (one,)}}, jax.random.key(0))
  (step,) = rws.robust_weight_signatures(weights=(1.0, 1.0))
  with pytest.raises(ValueError, match=r"has 2 entries for 1 robust models"):
    step.apply(m, {"donors": {"layers/0/w": (one, one)}}, jax.random.key(0))
