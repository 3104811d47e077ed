# SPDX-License-Identifier: Apache-2.0
"""CPTQuant: correlations by numpy, slopes by autodiff, budgets, and ranks on a planted model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from treesurgeon import models, registry
from treesurgeon.compress.quantize import cptquant, rtn
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, model, paths
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=32, d_model=16, num_layers=5, num_heads=2, d_ff=32, max_positions=16)
SHARES = (0.5, 2.0, 0.25, 1.0, 0.1)  # of what a layer adds to the stream
LAYERS = {i: [f"layers/{i}/{n}/kernel" for n in ("attn/o", "mlp/up", "mlp/down")] for i in range(5)}
LOGITS = jax.jit(lambda params, x: models.forward(SPEC, params, x).logits)


def test_correlation_by_numpy():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 4)) + 2
  y = np.concatenate([x[:, :2] @ [[1, 0.5], [-0.5, 1]] - 5, rng.normal(size=(300, 2))], axis=1)
  both = np.concatenate([x, y, np.ones((300, 1))], axis=1)
  got = float(cptquant.correlation(jnp.asarray(both.T @ both, jnp.float32)))
  half = [np.linalg.qr(a - a.mean(axis=0))[0] for a in (x, y)]
  assert got == pytest.approx(np.linalg.svd(half[0].T @ half[1])[1].mean(), abs=1e-3)
  assert 0.5 < got < 0.7  # two of four are shared


@functools.cache
def planted(shares):
  """Returns a network whose layers matter as planted, and text that it wrote itself."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))

  def draw(name, x):
    if "kernel" not in name and "embedding" not in name:
      return jnp.full(x.shape, name.endswith("scale"), jnp.float32)
    w = rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if "kernel" in name else 1)
    by_layer = np.reshape(shares, (5, 1, 1)) if name.endswith(("o/kernel", "down/kernel")) else 1
    return jnp.asarray(by_layer * w, jnp.float32)

  m = model.Model(SPEC, paths.nest({n: draw(n, x) for n, x in paths.walk(shapes).items()}))
  text = rng.integers(0, 32, (64, 16))
  for t in range(15):
    noise = rng.gumbel(size=(64, 32))
    text[:, t + 1] = (np.asarray(LOGITS(m.params, text))[:, t] + noise).argmax(axis=1)
  return m, [text[:32], text[32:]]


@jax.jit
def rounded(w):
  codes, grid = rtn.quantize(w, bits=3, group_size=32)
  return grids.tensor(codes, grid, bits=3, group_size=32, store="float32").dense()


def damage(m, text):
  """Returns what quantizing a layer by itself adds to the loss, in expectation over text of m."""
  flat = paths.walk(m.params)
  other = {
    n: np.asarray(rounded(x)) for n, x in flat.items() if n.endswith("kernel") and "/0:5/" in n
  }
  logp = []
  for i in range(6):
    at = np.arange(5).reshape(5, 1, 1) == i  # none at last
    params = paths.nest({**flat, **{n: np.where(at, x, flat[n]) for n, x in other.items()}})
    logp.append(scipy.special.log_softmax(LOGITS(params, np.concatenate(text)), axis=-1))
  return [(np.exp(logp[-1]) * (logp[-1] - x)).sum(axis=-1).mean() for x in logp[:-1]]


def ranks(x):
  return np.argsort(np.argsort(x))


@pytest.mark.parametrize("shares", [SHARES, SHARES[::-1]])
def test_ranks_agree_with_the_true_loss_of_each_layer(shares):
  """0.6 or more of both plantings: weak layers of the second lose alike, and trade places."""
  m, text = planted(shares)
  truth = damage(m, text)
  for way in cptquant.WAYS:
    found = cptquant.WAYS[way](m, text, *([LAYERS] if way == "pmpq" else []))
    assert np.corrcoef(ranks(found), ranks(truth))[0, 1] >= 0.6 - 1e-6


def test_slopes_by_brute_force():
  """The variance over perturbations of one layer's kernels' inputs, by small steps on each axis."""
  m, text = planted(SHARES)
  x = text[0][:1, :3]
  taps = {"attn/in": 16, "attn/o/in": 16, "mlp/in": 16, "mlp/down/in": 32}

  @jax.jit
  def loss(nudges):
    def patch(name, value, layer):
      if name not in nudges:
        return value
      size = jnp.sqrt(jnp.square(value).mean(axis=-1, keepdims=True))
      return value + jnp.where(layer == 2, nudges[name] * size, 0)

    return models.nll(SPEC, m.params, x, patch=patch)

  total = 0.0
  for tap, width in taps.items():
    for place in np.ndindex(1, 2, width):
      nudges = {n: np.zeros((1, 2, w), np.float32) for n, w in taps.items()}
      nudges[tap][place] = 1e-2
      back = {n: -x for n, x in nudges.items()}
      total += float((loss(nudges) - loss(back)) / 2e-2) ** 2
  assert cptquant.tdmpq(m, [x])[2] == pytest.approx(total**0.5, rel=0.01)


def test_equal_sensitivities_give_equal_widths():
  for average in (2, 3, 4, 8):
    got = cptquant.widths([0.7] * 6, [64] * 6, average=average, choices=(2, 3, 4, 8))
    assert got == [average] * 6
  assert cptquant.widths([0.0, -1.0], [64, 64], average=3, choices=(2, 3, 4)) == [3, 3]


def test_widths_are_the_best_of_all_within_the_budget():
  rng = np.random.default_rng(0)
  sizes, choices = [10, 30, 20, 10], (2, 3, 4, 6)
  for _ in range(5):
    s = (rng.exponential(size=4) ** 2).tolist()

    def lost(bits, s=s):
      return sum(x * 4.0**-b for x, b in zip(s, bits, strict=True))

    got = cptquant.widths(s, sizes, average=3.5, choices=choices)
    fits = [b for b in itertools.product(choices, repeat=4) if np.dot(b, sizes) <= 3.5 * 70]
    assert np.dot(got, sizes) <= 3.5 * 70
    assert lost(got) == pytest.approx(min(map(lost, fits)), rel=1e-5)


def test_layers_get_their_widths_and_lineage_tells_why():
  m, text = planted(SHARES)
  given = collect.Materials(batches=text)
  ask = "compress.quantize.cptquant(sensitivity='cmpq', average=3.0, choices=(2, 3, 4, 8))"
  out = drivers.run(registry.parse(ask), m, given)
  notes = out.lineage[-1].notes
  bits = [out.leaf(f"layers/{i}/mlp/up/kernel").bits for i in range(5)]
  assert bits == list(notes["bits"].values()) == cptquant.widths(
    list(notes["sensitivity"].values()), [1] * 5, average=3, choices=(2, 3, 4, 8)
  )  # fmt: skip
  assert np.mean(bits) <= 3 and bits[1] == max(bits) > min(bits) == bits[4]
  again = drivers.run(registry.parse(ask), out, given)
  for a in out.addresses():
    np.testing.assert_array_equal(leaves.dense(again.leaf(a)), leaves.dense(out.leaf(a)))


def test_what_is_out_of_range_is_named():
  with pytest.raises(ValueError, match="sensitivity='hessian': valid are cmpq, pmpq, tdmpq"):
    cptquant.cptquant(sensitivity="hessian")
  with pytest.raises(ValueError, match=r"average=1.5: the least of choices=\(2, 3\) is more"):
    cptquant.cptquant(average=1.5, choices=(2, 3))
  with pytest.raises(ValueError, match="bits=9"):
    cptquant.cptquant(choices=(4, 9))
  m, _ = planted(SHARES)
  (one,) = cptquant.cptquant()
  with pytest.raises(ValueError, match="cptquant measures sensitivities on calibration data"):
    one.apply(m, {"batches": []}, jax.random.key(0))
