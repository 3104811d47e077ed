# SPDX-License-Identifier: Apache-2.0
"""Folding norms and turning the stream leave every logit where it was, in every kind of network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress import residual
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import model

PLAIN = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=16)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6))
SPECS = {
  "llama": {"num_kv_heads": 1},
  "tied gemma": {"tied": True, "norm_plus_one": True, "embed_scale": 3.0, "qk_norm": "head"},
  "gpt2": {
    "norm": "layer", "positions": "learned", "tied": True, "qkv_bias": True, "o_bias": True,
    "mlp_bias": True, "gated": False, "activation": "gelu",
  },
  "no biases": {"norm": "layer", "norm_bias": False, "gated": False},
  "mixtral": {"num_experts": 3, "experts_per_token": 2},
  "biases appear": {"norm": "layer", "d_ff": (12, 8)},
  "gptj": {"norm": "layer", "parallel": True, "shared_norm": True, "head_bias": True},
}  # fmt: skip

QUICK = ("tied gemma", "gpt2", "mixtral")


def draw(spec, seed=1):
  """A model whose norms and biases are not neutral."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  fill = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape) + 0.3, x.dtype)
  return model.Model(spec, jax.tree.map(fill, shapes))


def logits(m):
  return np.asarray(models.forward(m.spec, m.params, TOKENS).logits)


def orthogonal(n):
  return jnp.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(n, n)))[0], jnp.float32)


def shapes_of(m):
  return {a: tuple(m.leaf(a).shape) for a in m.addresses()}


@pytest.mark.parametrize(
  "kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in SPECS]
)
def test_the_function_stays(kind):
  m = draw(dataclasses.replace(PLAIN, **SPECS[kind]))
  turned = residual.rotate(m, orthogonal(8))
  before, after = logits(m), logits(turned)
  np.testing.assert_allclose(after, before, rtol=2e-4, atol=2e-4 * np.abs(before).max())
  assert shapes_of(turned) == models.addresses(turned.spec)
  gain = 0.0 if m.spec.norm_plus_one else 1.0
  norms = ("attn_norm/scale", "mlp_norm/scale", "final_norm/scale")
  for address in turned.addresses():
    assert not address.endswith(norms) or (np.asarray(turned.leaf(address)) == gain).all()
  assert turned.spec.norm == "rms" and not turned.spec.tied


def test_folding_twice_changes_nothing_more():
  once = residual.fold_norms(draw(PLAIN))
  twice = residual.fold_norms(once)
  assert once.spec == twice.spec
  for a in once.addresses():
    np.testing.assert_array_equal(once.leaf(a), twice.leaf(a))


def test_storage_dtypes_stay_and_shapes_are_known_beforehand():
  m = draw(PLAIN)
  m = m.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), m.params))
  out = jax.eval_shape(lambda p: residual.rotate(m.replace(params=p), jnp.eye(8)).params, m.params)
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"norm_place": "sandwich"}, "norm_place='sandwich' cannot be folded"),
    ({"norm_place": "post"}, "norm_place='post' cannot be folded"),
    ({"kind": "encoder", "embed_norm": True}, "a norm after the embeddings cannot be folded"),
    ({"norm": "layer", "final_norm": False}, "without a final norm"),
    ({"num_experts": 2, "experts_per_token": 1, "norm": "layer"}, "biases, which a router has not"),
    ({"kind": "encoder", "mlm_head": True}, "heads of an encoder"),
  ],
)
def test_other_networks_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    residual.fold_norms(draw(dataclasses.replace(PLAIN, **change)))


def test_compressed_leaves_and_odd_matrices_are_refused():
  m = draw(PLAIN)
  packed = rtn.rtn(bits=4, group_size=4)[0].apply(m, {}, jax.random.key(0))
  with pytest.raises(ValueError, match="attn/k/kernel is compressed"):
    residual.fold_norms(packed)
  with pytest.raises(ValueError, match="a matrix 4 x 4 cannot turn a stream of width 8"):
    residual.rotate(m, jnp.eye(4))
