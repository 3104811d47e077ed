# SPDX-License-Identifier: Apache-2.0
"""SliceGPT: exact where nothing is lost, the best of its rank, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress import residual
from treesurgeon.compress.prune import principal, slicegpt
from treesurgeon.core import model
from treesurgeon.models import hf
from treesurgeon.run import collect, drivers

PLAIN = models.Spec(
  vocab_size=19, d_model=16, num_layers=2, num_heads=2, d_ff=12, max_positions=16, family="llama"
)
TEXT = [np.random.default_rng(i).integers(0, 19, (3, 10)).astype(np.int32) for i in range(2)]
SPECS = {
  "llama": {},
  "gpt2": {
    "norm": "layer", "positions": "learned", "tied": True, "o_bias": True, "gated": False,
    "activation": "gelu",
  },
  "mixtral": {"num_experts": 3, "experts_per_token": 2, "family": "mixtral"},
  "gptj": {"norm": "layer", "parallel": True, "shared_norm": True},
}  # fmt: skip


def draw(spec=PLAIN, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  fill = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + 0.2, x.dtype)
  return model.Model(spec, jax.tree.map(fill, shapes))


def logits(m):
  return np.asarray(models.forward(m.spec, m.params, TEXT[0]).logits)


def fits(m):
  assert {a: tuple(m.leaf(a).shape) for a in m.addresses()} == models.addresses(m.spec)


@pytest.mark.parametrize(
  ("kind", "shortcuts"),
  [
    ("llama", True),
    pytest.param("llama", False, marks=pytest.mark.slow),
    pytest.param("gpt2", True, marks=pytest.mark.slow),
    pytest.param("mixtral", True, marks=pytest.mark.slow),
    pytest.param("gptj", True, marks=pytest.mark.slow),
  ],
)
def test_turning_alone_keeps_the_function(kind, shortcuts):
  m = draw(dataclasses.replace(PLAIN, **SPECS[kind]))
  out = slicegpt.cut(m, TEXT, width=16, shortcuts=shortcuts)
  fits(out)
  np.testing.assert_allclose(logits(out), logits(m), atol=2e-3 * np.abs(logits(m)).max())


def narrow(m, width):
  """The model written in a basis of which it uses the first channels, turned at random."""
  keep = np.arange(16) < width
  small = {}
  for a in m.addresses():
    if a.endswith(("embedding", "attn/o/kernel", "mlp/down/kernel")):
      small[a] = jnp.where(keep[None, :], m.leaf(a), 0)
  q = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]
  return residual.rotate(m.update(small), jnp.asarray(q, jnp.float32))


@pytest.mark.parametrize("shortcuts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stream_of_few_directions_is_cut_to_them_without_loss(shortcuts):
  m = narrow(draw(), 8)
  out = drivers.run(
    slicegpt.slicegpt(slicing=0.5, shortcuts=shortcuts), m, collect.Materials(batches=TEXT)
  )
  fits(out)
  assert out.spec.d_model == 8 and out.lineage[0].notes["width"] == [16, 8]
  np.testing.assert_allclose(logits(out), logits(m), atol=2e-3 * np.abs(logits(m)).max())
  # Without shortcuts it stays a model that transformers reads.
  assert out.spec.family == ("treesurgeon" if shortcuts else "llama")
  assert shortcuts or hf.unsupported(out.spec) == ()


def test_components_are_the_best_of_their_number():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
  q = np.asarray(principal.components(jnp.asarray(x.T @ x), width=3))
  np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-5)
  singular = np.linalg.svd(x, compute_uv=False)
  np.testing.assert_allclose(np.square(x - x @ q @ q.T).sum(), (singular[3:] ** 2).sum(), rtol=1e-3)


def test_widths_are_multiples_of_eight():
  assert [slicegpt.new_width(64, s) for s in (0.0, 0.1, 0.25, 0.9)] == [64, 56, 48, 8]


def test_what_cannot_be_sliced_is_named():
  with pytest.raises(ValueError, match=r"slicing=1.0: valid is 0"):
    slicegpt.slicegpt(slicing=1.0)
  post = draw(dataclasses.replace(PLAIN, norm_place="post", family="treesurgeon"))
  with pytest.raises(ValueError, match="norm_place='post' cannot be folded"):
    drivers.run(slicegpt.slicegpt(), post, collect.Materials(batches=TEXT))
  with pytest.raises(ValueError, match="Spec.shortcuts needs norm_place='pre'"):
    dataclasses.replace(PLAIN, shortcuts=True, norm_place="post")
