# SPDX-License-Identifier: Apache-2.0
"""OutlierTune and Agile-Quant: shifts and factors leave no trace, and less is lost to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress import feeds
from treesurgeon.compress.quantize import activations, agile_quant, outliertune, rtn
from treesurgeon.core import model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(
  vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=24, max_positions=16, gated=False,
  activation="relu", norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
TEXT = [np.random.default_rng(0).integers(0, 32, (4, 16))]
forward = jax.jit(models.forward, static_argnames=("spec",))


@functools.cache
def planted():
  """Draws a model two of whose channels are far off centre after every norm."""
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  m = m.replace(params=jax.tree.map(lambda x: x * (5 if x.ndim == 3 else 1), m.params))
  some = jnp.array([3, 9])
  changes = {a: m.leaf(a).at[some].set(60.0) for a in m.addresses() if "_norm/bias" in a}
  return m.update({a: x for a, x in changes.items() if a.startswith("layers")})


def loss(transform):
  m = drivers.run(transform, planted(), collect.Materials(batches=TEXT))
  want = forward(SPEC, planted().params, TEXT[0]).logits
  return float(jnp.square(forward(SPEC, m.params, TEXT[0]).logits - want).mean()), m


def test_channels_lose_less_than_tokens():
  by_token = rtn.rtn(bits=8, group_size=-1) + activations.activations(bits=8)
  plain, _ = loss(by_token)
  tuned, m = loss(outliertune.outliertune())
  assert tuned < 0.3 * plain
  leaf = m.leaf("layers/0/attn/q/kernel")
  np.testing.assert_allclose(leaf.scale, [[1 / 127.5]], rtol=1e-6)
  refined, m = loss(agile_quant.agile_quant(bits=8, group_size=8, low=""))
  assert refined < plain
  widths = {n: m.leaf(f"layers/0/{n}/kernel").bits for n in ("attn/o", "mlp/up")}
  assert widths == {"attn/o": 8, "mlp/up": 8}


def test_shifting_keeps_the_logits():
  m, rng = planted(), np.random.default_rng(0)
  for feed in feeds.of_layer(SPEC, 0)[:3]:
    names = [*feed.reads, *feed.writes, *(n.removesuffix("kernel") + "bias" for n in feed.reads)]
    own = {n: m.leaf(f"layers/0/{n}") for n in names}
    out = outliertune.shift(feed, own, jnp.asarray(rng.normal(size=16), jnp.float32))
    m = m.update({f"layers/0/{n}": x for n, x in out.items()})
  want = forward(SPEC, planted().params, TEXT[0]).logits
  np.testing.assert_allclose(forward(SPEC, m.params, TEXT[0]).logits, want, rtol=1e-3, atol=1e-3)


def test_factors_against_brute_force():
  top = np.exp(np.random.default_rng(0).normal(size=50) * 2).astype(np.float32)
  top[:4] = top.max() / np.array([2, 4, 8, 16])
  got = np.asarray(agile_quant.factors(jnp.asarray(top), refine=3))
  base = top.max() / 8
  expected = [next(2.0**a for a in range(4) if 2.0**a * base >= t) for t in top]
  np.testing.assert_array_equal(got, expected)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="weight_bits=1: valid is"):
    outliertune.outliertune(weight_bits=1)
  with pytest.raises(ValueError, match="low_bits=9: valid is"):
    agile_quant.agile_quant(low_bits=9)
  with pytest.raises(ValueError, match="refine=9: valid is 0"):
    agile_quant.agile_quant(refine=9)
