# SPDX-License-Identifier: Apache-2.0
"""Folding scales changes no output, whatever the switches of the architecture."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress import feeds
from treesurgeon.core import model, paths

_SPEC = importlib.util.spec_from_file_location(
  "architectures_test", pathlib.Path(__file__).parents[1] / "models" / "architectures_test.py"
)
known = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(known)

SPECS = {
  **known.SPECS,
  "encoder": known.ENCODER,
  "opt": models.Spec(**{**known.GPT, "activation": "relu"}),
}
# Which feeds there are: a for norm -> q, k, v; o for v -> o; m for norm -> gate, up; d for down.
FEEDS = {
  "llama": "aomd", "gpt": "aom", "gemma": "aomd", "olmo": "od", "neox": "aom", "gptj": "ao",
  "mixtral": "aoddd", "unequal": "aomd", "encoder": "o", "opt": "aomd",
}  # fmt: skip
KIND = {"attn/q/kernel": "a", "attn/o/kernel": "o", "mlp/gate/kernel": "m", "mlp/up/kernel": "m",
        "mlp/down/kernel": "d"}  # fmt: skip


QUICK = ("gpt", "gptj", "gemma")  # between them every kind of feed; each compiles for seconds


@pytest.mark.parametrize(
  "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPECS]
)
def test_folding_keeps_the_logits(name):
  spec = SPECS[name]
  params = known.params_of(spec)
  out = jax.jit(scaled, static_argnames="spec")(spec, params)
  reads = [f.reads[0] for f in feeds.of_layer(spec, spec.num_layers - 1)]
  kinds = "".join(KIND[re.sub(r"experts/\d/", "", n)] for n in reads)
  assert kinds == FEEDS[name]
  expected = known.logits_of(spec)
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
    assert a.dtype == b.dtype
  kernel = "layers/0/attn/o/kernel"
  assert float(jnp.abs(paths.get(out, kernel) / paths.get(params, kernel) - 1).min()) > 1e-4
  out = known.forward(spec, out, known.TOKENS).logits
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


def scaled(spec, params):
  """Folds random scales into all feeds of the first and the last layer."""
  m = model.Model(spec, params)
  for i in (0, spec.num_layers - 1):
    at = f"layers/{i}/"
    for n, feed in enumerate(feeds.of_layer(spec, i)):
      leaves = {n: m.leaf(at + n) for n in (*feed.reads, *feed.writes)}
      wide = leaves[feed.writes[0]].shape[-1]
      s = jnp.exp(jax.random.normal(jax.random.key(n), (wide,)))
      changed = feeds.fold(feed, leaves, s, plus_one=spec.norm_plus_one)
      assert set(changed) == set(leaves)
      m = m.update({at + n: x for n, x in changed.items()})
  return m.params


def test_shared_heads_are_pooled_and_spread():
  feed = feeds.Feed(("attn/o/kernel",), ("attn/v/kernel",), False, heads=2, groups=3)
  x = jax.random.uniform(jax.random.key(0), (2 * 3 * 4,))
  pooled = feeds.pool(feed, x, jnp.mean)
  np.testing.assert_allclose(pooled, np.asarray(x).reshape(2, 3, 4).mean(axis=1).ravel(), rtol=1e-6)
  spread = np.asarray(feeds.spread(feed, pooled)).reshape(2, 3, 4)
  assert (spread == np.asarray(pooled).reshape(2, 1, 4)).all()


def test_image_classifiers():
  vit = models.VisionSpec(
    "vit", image_size=8, num_classes=3, d_model=8, num_layers=1, patch_size=4, num_heads=2,
    norm="layer",
  )  # fmt: skip
  assert [KIND[f.reads[0]] for f in feeds.of_layer(vit, 0)][:3] == ["a", "o", "m"]
  mlp = models.VisionSpec("mlp", image_size=8, num_classes=3, d_model=8, num_layers=1)
  assert feeds.of_layer(mlp, 0) == ()
