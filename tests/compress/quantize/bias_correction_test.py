# SPDX-License-Identifier: Apache-2.0
"""Bias correction: mean outputs become the original's, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.quantize import bias_correction, rtn
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(
  vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, max_positions=16, gated=False,
  activation="relu", norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
TEXT = [np.random.default_rng(0).integers(0, 32, (4, 16))]
forward = jax.jit(models.forward, static_argnames=("spec", "observe"))


def means(name, x):
  return x.mean(axis=(0, 1)) if name in ("attn/out", "mlp/out") else None


def test_mean_outputs_are_the_originals():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  m = m.replace(params=jax.tree.map(lambda x: x * 5 + 0.1, m.params))
  coarse = drivers.run(rtn.rtn(bits=3, group_size=8), m)
  materials = collect.Materials(batches=TEXT, donors=[m])
  fixed = drivers.run(bias_correction.bias_correction(), coarse, materials)
  want, had, have = (
    forward(SPEC, x.params, TEXT[0], observe=means).observed for x in (m, coarse, fixed)
  )
  # Not quite: what the errors do to attention and to the activation is not linear.
  for tap in want:
    wrong = [float(jnp.abs(x[tap] - want[tap]).mean()) for x in (had, have)]
    assert wrong[1] < (0.5 if tap == "attn/out" else 0.9) * wrong[0], tap
  none = drivers.run(bias_correction.bias_correction(strength=0.0), coarse, materials)
  for a in coarse.addresses():
    if a.endswith("bias"):
      np.testing.assert_array_equal(none.leaf(a), coarse.leaf(a))


def test_one_bias_against_numpy():
  rng = np.random.default_rng(1)
  w, q, bias = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=3)
  x = rng.normal(size=6)
  got = bias_correction.corrected(
    *(jnp.asarray(a, jnp.float32) for a in (bias, w, x, q)), strength=0.5
  )
  np.testing.assert_allclose(got, bias + 0.5 * (x @ (w - q)), rtol=1e-5)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="strength=2.0: valid is 0"):
    bias_correction.bias_correction(strength=2.0)
  with pytest.raises(ValueError, match="no selected layer has a bias"):
    bias_correction.bias_correction()[0].units(["layers/0/mlp/up/kernel"])
