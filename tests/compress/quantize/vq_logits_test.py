# SPDX-License-Identifier: Apache-2.0
"""VQ-Logits: columns are their clusters' means, logits are gathered, as many clusters are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.compress.quantize import vq_logits
from treesurgeon.core import leaves, model
from treesurgeon.run import drivers

KEY = jax.random.key(0)
SPEC = models.Spec(
  family="llama", vocab_size=40, d_model=8, num_layers=1, num_heads=2, d_ff=16, tied=True
)


def test_columns_become_the_means_of_their_clusters():
  w = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
  leaf = jax.jit(lambda w: vq_logits.quantize(w, key=KEY, clusters=5))(w)
  index = np.asarray(leaf.index[0])
  assert index.dtype == np.uint8 and set(index) == set(range(5))
  for c in range(5):
    want = w[:, index == c].mean(axis=1)
    np.testing.assert_allclose(leaf.centroids[:, c], want, rtol=1e-5, atol=1e-6)
  errors = [
    np.linalg.norm(vq_logits.quantize(jnp.asarray(w), key=KEY, clusters=k).dense() - w)
    for k in (5, 20, 40)
  ]
  assert errors[0] > errors[1] > errors[2] == 0


def test_a_tied_model_gets_a_clustered_head_of_its_own():
  m = model.Model(SPEC, models.init(SPEC, KEY))
  tokens = jnp.array([[1, 2, 3]])
  step = "compress.quantize.untie() + compress.quantize.vq_logits(clusters={})"
  few, all_ = (drivers.run(registry.parse(step.format(k)), m) for k in (7, 40))
  logits = [models.forward(x.spec, x.params, tokens).logits for x in (m, all_, few)]
  np.testing.assert_allclose(logits[1], logits[0], rtol=1e-6, atol=1e-6)
  head = few.leaf("lm_head/kernel")
  dense = few.update({"lm_head/kernel": head.dense()})
  want = models.forward(dense.spec, dense.params, tokens).logits
  np.testing.assert_allclose(logits[2], want, rtol=1e-5, atol=1e-5)
  same = head.index[0][:, None] == head.index[0][None]
  assert (np.asarray(logits[2][0, 0][:, None] == logits[2][0, 0][None]) >= np.asarray(same)).all()
  assert isinstance(head, leaves.ClusteredColumns)
  again = drivers.run(registry.parse("compress.quantize.vq_logits(clusters=7)"), few)
  jax.tree.map(np.testing.assert_array_equal, again.leaf("lm_head/kernel"), head)


def test_clusters_are_checked():
  with pytest.raises(ValueError, match="clusters=0: valid is 1 or more"):
    vq_logits.vq_logits(clusters=0)
