# SPDX-License-Identifier: Apache-2.0
"""GWQ: what is kept, by numpy; better than random weights kept, and than none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import gwq, rtn
from treesurgeon.core import leaves

RUN = jax.jit(
  gwq.quantize, static_argnames=("bits", "group_size", "symmetric", "outliers", "scale_dtype")
)


def by_numpy(w, kept, bits, size):
  """Returns what is left of asymmetric rounding, in float64."""
  out = w.astype(np.float64)
  for r in range(0, len(w), size):
    for c in range(w.shape[1]):
      x = np.where(kept, 0, w)[r : r + size, c].astype(np.float64)
      low, high = min(x.min(), 0), max(x.max(), 0)
      s = (high - low) / (2**bits - 1)
      zero = np.clip(np.round(-low / s), 0, 2**bits - 1)
      q = (np.clip(np.round(x / s + zero), 0, 2**bits - 1) - zero) * s
      out[r : r + size, c] = np.where(kept[r : r + size, c], w[r : r + size, c], q)
  return out


def test_it_keeps_the_steepest_and_rounds_the_rest_without_them():
  rng = np.random.default_rng(0)
  w, g = (rng.normal(size=(20, 6)).astype("float32") for _ in range(2))
  leaf = RUN(jnp.asarray(w), jnp.asarray(g), bits=3, group_size=8, outliers=0.1)
  order = np.argsort(-np.abs(g).ravel())[:12]
  assert set(np.asarray(leaf.parts[1].positions)[0].tolist()) == set(order.tolist())
  kept = np.isin(np.arange(120), order).reshape(20, 6)
  np.testing.assert_allclose(leaf.dense(), by_numpy(w, kept, 3, 8), atol=1e-5)
  np.testing.assert_array_equal(np.asarray(leaf.dense())[kept], w[kept])
  assert leaves.bits_per_weight(leaf) == pytest.approx((64 * 6 + 40 * 18 + 64 * 12) / 120)
  none = RUN(jnp.asarray(w), jnp.asarray(g), bits=3, group_size=8, outliers=0.0)
  assert isinstance(none, leaves.QuantizedTensor)


def test_scales_are_stored_as_rtn_stores_them():
  rng = np.random.default_rng(0)
  w, g = (jnp.asarray(rng.normal(size=(20, 6)), jnp.float32) for _ in range(2))
  form = {"bits": 3, "group_size": 8}
  leaf = RUN(w, g, **form, outliers=0.1, scale_dtype="int8")
  rest = jnp.where(leaf.parts[1].dense() != 0, 0, w)
  codes, grid = rtn.quantize(rest, **form, symmetric=False, scale_dtype="int8")
  expected = grids.tensor(codes, grid, **form, store="float32")
  jax.tree.map(np.testing.assert_array_equal, leaf.parts[0], expected)


def test_it_beats_random_weights_kept_and_none():
  # A trained softmax layer whose inputs are as uneven as those of language models.
  rng = np.random.default_rng(1)
  scale = np.exp(1.5 * rng.normal(size=64))
  truth = rng.normal(size=(64, 16)) / scale[:, None] ** 0.5
  x = rng.normal(size=(2000, 64)) * scale / 4
  y = (x @ truth + rng.gumbel(size=(2000, 16))).argmax(axis=1)

  def loss(w, rows):
    logits = jnp.asarray(x[rows], jnp.float32) @ w
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[rows][:, None], axis=1).mean()

  w = jnp.asarray(truth, jnp.float32)
  few, fresh = slice(0, 8), slice(8, 2000)
  g = jax.grad(loss)(w, few)
  how = {"bits": 3, "group_size": 64}
  kept = loss(RUN(w, g, **how, outliers=0.02).dense(), fresh)
  plain = loss(RUN(w, g, **how, outliers=0.0).dense(), fresh)
  draws = [
    loss(RUN(w, jnp.asarray(rng.normal(size=w.shape)), **how, outliers=0.02).dense(), fresh)
    for _ in range(8)
  ]
  assert loss(w, fresh) < kept < min(draws) < plain


def test_what_is_out_of_range_is_named():
  with pytest.raises(ValueError, match=r"outliers=1.5: valid is a fraction"):
    gwq.gwq(outliers=1.5)
  with pytest.raises(ValueError, match="bits=9"):
    gwq.gwq(bits=9)
  with pytest.raises(ValueError, match="scale_dtype='int7'"):
    gwq.gwq(scale_dtype="int7")
