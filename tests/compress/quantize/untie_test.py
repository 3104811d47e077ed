# SPDX-License-Identifier: Apache-2.0
"""A head of its own: the same logits, and the embedding stays when the head is quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.core import leaves, model
from treesurgeon.run import drivers

SPEC = models.Spec(
  family="llama", vocab_size=11, d_model=8, num_layers=1, num_heads=2, d_ff=16, tied=True
)
HEAD = "compress.quantize.rtn(bits=3, group_size=8, select='lm_head/kernel')"


def tied():
  return model.Model(SPEC, models.init(SPEC, jax.random.key(0)))


def test_one_use_is_quantized_and_the_other_stays(tmp_path):
  m, tokens = tied(), jnp.array([[1, 2, 3]])
  apart = drivers.run(registry.parse("compress.quantize.untie()"), m)
  logits = [models.forward(x.spec, x.params, tokens).logits for x in (m, apart)]
  np.testing.assert_allclose(*logits, rtol=1e-6, atol=1e-6)
  done = drivers.run(registry.parse("compress.quantize.untie() + " + HEAD), m)
  table = "embed/tokens/embedding"
  np.testing.assert_array_equal(done.leaf(table), m.leaf(table))
  assert leaves.is_leaf(done.leaf("lm_head/kernel"))
  io.save(done, tmp_path / "out")
  again = io.load(tmp_path / "out")
  assert not again.spec.tied and again.leaf("lm_head/kernel").bits == 3


def test_a_tied_head_is_told_when_it_is_selected():
  for go in (drivers.run, drivers.run_blockwise):
    with pytest.raises(
      ValueError, match=r"lm_head/kernel: the head is tied .* chain compress.quan"
    ):
      go(registry.parse(HEAD), tied())
  with pytest.raises(ValueError, match="no address matches 'lm_hed/kernel'"):
    drivers.run(registry.parse(HEAD.replace("lm_head", "lm_hed")), tied())


def test_what_reads_no_tokens_is_refused():
  spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
  m = model.Model(spec, models.init(spec, jax.random.key(0)))
  with pytest.raises(ValueError, match="a VisionSpec has no token embedding"):
    drivers.run(registry.parse("compress.quantize.untie()"), m)
