# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant and equalization: formulas in numpy, outputs kept, what follows quantizes better."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.compress.quantize import equalize, rtn, smoothquant
from treesurgeon.core import leaves, model
from treesurgeon.run import collect, drivers

SPEC = models.Spec(
  vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_positions=16
)
TEXT = [np.random.default_rng(0).integers(0, 32, (4, 16))]
KERNELS = ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up")
forward = jax.jit(models.forward, static_argnames=("spec", "observe"))


def seen(name, x):
  """Keeps the largest magnitude of each input."""
  return jnp.abs(x).max(axis=(0, 1)) if name.endswith("/in") and x.ndim == 3 else None


@functools.cache
def planted():
  """Draws a model, two of whose channels are outliers after every norm."""
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  m = m.replace(params=jax.tree.map(lambda x: x * (5 if x.ndim == 3 else 1), m.params))
  gains = {a: m.leaf(a).at[jnp.array([3, 9])].set(20.0) for a in m.addresses() if "norm/scale" in a}
  gains.pop("final_norm/scale")
  return m.update(gains)


def apply(transform):
  return drivers.run(transform, planted(), collect.Materials(batches=TEXT))


def run(m):
  return forward(SPEC, m.params, TEXT[0], observe=seen)


@pytest.mark.parametrize(
  "transform",
  [
    smoothquant.smoothquant(),
    smoothquant.smoothquant(linear=True),
    equalize.equalize(),
    equalize.equalize(kind="log"),
  ],
  ids=["smooth", "linear", "cross", "log"],
)
def test_outputs_are_kept_and_fixed_points_fixed(transform):
  out = apply(transform)
  before, after = run(planted()).logits, run(out).logits
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * float(jnp.abs(before).max()))
  if repr(transform) in ("(compress.quantize.smoothquant(),)", "(compress.quantize.equalize(),)"):
    again = drivers.run(transform, out, collect.Materials(batches=TEXT))
    for a in out.addresses():
      np.testing.assert_array_equal(again.leaf(a), out.leaf(a), err_msg=a)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_formula(alpha):
  out, top = apply(smoothquant.smoothquant(alpha=alpha)), run(planted()).observed["attn/in"][1]
  rows = [np.abs(planted().leaf(f"layers/1/attn/{k}/kernel")).max(axis=1) for k in "qkv"]
  s = np.asarray(top) ** alpha / np.max(rows, axis=0) ** (1 - alpha)
  norm = "layers/1/attn_norm/scale"
  np.testing.assert_allclose(out.leaf(norm), planted().leaf(norm) / s, rtol=1e-5)
  kernel = "layers/1/attn/k/kernel"
  np.testing.assert_allclose(out.leaf(kernel), planted().leaf(kernel) * s[:, None], rtol=1e-5)


def test_ranges_after_equalization():
  out = apply(equalize.equalize())
  up, down = (np.abs(out.leaf(f"layers/0/mlp/{k}/kernel")) for k in ("up", "down"))
  np.testing.assert_allclose(up.max(axis=0), down.max(axis=1), rtol=1e-4)
  v, o = (np.abs(out.leaf(f"layers/0/attn/{k}/kernel")) for k in "vo")
  np.testing.assert_allclose(
    v.max(axis=0), o.max(axis=1).reshape(2, 2, 4).max(axis=1).ravel(), rtol=1e-4
  )
  logs, top = apply(equalize.equalize(kind="log")), np.asarray(run(planted()).observed["mlp/in"][0])
  s = top / np.log2(2 + top)
  norm = "layers/0/mlp_norm/scale"
  np.testing.assert_allclose(logs.leaf(norm), planted().leaf(norm) / s, rtol=1e-5)


def test_inputs_and_weights_in_8_bits_lose_less():
  """Rounds inputs to 8 bits a tensor and weights to 8 bits a column; then to 4 for a control."""

  def loss(m, bits):
    def rounded(name, x, layer):
      del layer
      scale = jnp.abs(x).max() / (2 ** (bits - 1) - 0.5)
      return jnp.round(x / scale) * scale if name in ("attn/in", "mlp/in") else x

    q = drivers.run(rtn.rtn(bits=bits, group_size=-1), m)
    params = jax.tree.map(leaves.dense, q.params, is_leaf=leaves.is_leaf)
    return float(
      jnp.square(models.forward(SPEC, params, TEXT[0], patch=rounded).logits - want).mean()
    )

  want = run(planted()).logits
  smooth = apply(smoothquant.smoothquant())
  for bits in (8, 6):
    assert loss(smooth, bits) < 0.5 * loss(planted(), bits)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="alpha=2: valid is 0"):
    smoothquant.smoothquant(alpha=2)
  with pytest.raises(ValueError, match="kind='both': valid are cross, log"):
    equalize.equalize(kind="both")
  with pytest.raises(ValueError, match="tears a feed apart; these take one scale: layers/0/attn/q"):
    apply(smoothquant.smoothquant(select=".*/q/kernel"))
  with pytest.raises(ValueError, match="attn/q/kernel is compressed; fold scales before"):
    apply(rtn.rtn(bits=4, group_size=8) + smoothquant.smoothquant())
