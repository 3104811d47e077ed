# SPDX-License-Identifier: Apache-2.0
"""A model of N:M weights, of kept groups and of vectors runs prepared as it does unprepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels, models, registry
from treesurgeon.core import leaves, model
from treesurgeon.run import drivers

SPEC = models.Spec(vocab_size=32, d_model=64, num_layers=2, num_heads=2, d_ff=128, max_positions=8)
TOKENS = jnp.arange(4)[None]


def vectors(x):
  """Put vectors of four rows in a kernel's place."""
  if getattr(x, "ndim", 0) != 3:
    return x
  layers, rows, cols = x.shape
  codes = jax.random.randint(jax.random.key(1), (layers, rows // 4, cols), 0, 256)
  book = jax.random.normal(jax.random.key(2), (layers, 256, 4)) / 8
  return leaves.Codebook(codes.astype(jnp.uint8), book.astype(x.dtype), rows, cols, 8, 4)


@pytest.mark.slow
def test_a_model_runs_prepared():
  params = models.init(SPEC, jax.random.key(0), dtype=jnp.bfloat16)
  prune = registry.parse("compress.prune.magnitude(pattern='2:4', packed=True)")
  sparse = drivers.run(prune, model.Model(SPEC, params)).params
  forward = jax.jit(lambda params: models.forward(SPEC, params, TOKENS).logits)
  for small, kind in ((sparse, "PreparedSparse"), (jax.tree.map(vectors, params), "Transcoded")):
    ready = kernels.prepare(small, target="tpu-v6e")
    found = jax.tree.leaves(ready, is_leaf=leaves.is_leaf)
    assert {type(x).__name__ for x in found if leaves.is_leaf(x)} == {kind}
    a, b = (np.asarray(forward(p), np.float32) for p in (small, ready))
    np.testing.assert_allclose(b, a, atol=0.05 * np.abs(a).max())
    jax.tree.map(np.testing.assert_array_equal, kernels.restore(ready), small)
