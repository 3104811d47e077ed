# SPDX-License-Identifier: Apache-2.0
"""Passing a model through, scaled by rules."""

import jax.numpy as jnp
import numpy as np

from treesurgeon.core import model
from treesurgeon.merge import passthrough
from treesurgeon.run import drivers


def test_scales_by_rules():
  m = model.Model(None, {"a": jnp.full(2, 3.0), "b": jnp.full(2, 0.1, jnp.bfloat16)})
  out = drivers.run(passthrough.passthrough(scale=(("a", -0.5), (".*", 1.0))), m)
  assert out.leaf("a").tolist() == [-1.5, -1.5]
  assert out.leaf("b").dtype == jnp.bfloat16
  assert (out.leaf("b") == m.leaf("b")).all()


def test_scale_one_is_the_identity_to_the_bit():
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    w = jnp.asarray(np.random.default_rng(0).standard_normal(99), dtype).at[0].set(-0.0)
    got = passthrough.scaled(w)
    assert np.asarray(got).tobytes() == np.asarray(w).tobytes()
