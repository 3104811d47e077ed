# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, paths
from treesurgeon.merge import least_squares, permutations, units, widening
from treesurgeon.models import vision

IMAGE = {"image_size": 4, "num_classes": 3, "d_model": 6, "num_layers": 2}
NETS = {
  "mlp": models.VisionSpec("mlp", **IMAGE, d_ff=(8, 5)),
  "residual": models.VisionSpec("mlp", **IMAGE, residual=True),
  "conv": models.VisionSpec("conv", **IMAGE),
}
LLAMA = models.Spec(
  vocab_size=13, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=6
)
RNG = np.random.default_rng(3)
PIXELS = [
  {
    "inputs": RNG.standard_normal((40, 4, 4, 1)).astype(np.float32),
    "labels": np.zeros(40, np.int32),
  }
  for _ in range(2)
]
NEW = RNG.standard_normal((7, 4, 4, 1)).astype(np.float32)
TEXT = [RNG.integers(0, 13, (6, 12)) for _ in range(2)]


def draw(spec, seed=0):
  rng = np.random.default_rng(seed)
  shapes = models.addresses(spec)
  return {a: jnp.asarray(0.5 * rng.standard_normal(s), jnp.float32) for a, s in shapes.items()}


def model(spec, flat):
  return model_lib.Model(spec, paths.unflatten(flat))


def scramble(spec, flat, seed=1):
  rng, index = np.random.default_rng(seed), permutations.identity(spec)
  for group in permutations.groups(spec):
    index = units.compose(index, group, rng.permutation(group.size))
  return units.apply(flat, index)


def merge(a, b, batches, **arguments):
  (one,) = registry.load("merge.pleas")(**arguments)
  evidence = {"donors": needs.Aligned([b]), "batches": batches}
  return one.apply(a, evidence, jax.random.key(0))


def classify(m, x=NEW):
  return np.asarray(vision.forward(m.spec, m.params, x).logits)


def read(m, tokens=TEXT[0][:2]):
  return np.asarray(models.forward(m.spec, m.params, tokens).logits)


@pytest.mark.parametrize("name", NETS)
def test_with_every_pair_apart_it_is_the_ensemble(name):
  # Exactly, on inputs it never saw: the mean of both networks' logits.
  spec = NETS[name]
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  out = merge(a, b, PIXELS, ratio=1.0)
  assert out.spec.widths() == tuple(2 * w for w in spec.widths())
  want = 0.5 * (classify(a) + classify(b))
  np.testing.assert_allclose(classify(out), want, atol=1e-5 * np.abs(want).max())
  uneven = merge(a, b, PIXELS, ratio=1.0, weights=(0.75, 0.25))
  want = 0.75 * classify(a) + 0.25 * classify(b)
  np.testing.assert_allclose(classify(uneven), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_the_nearer_to_the_ensemble_the_wider():
  spec = NETS["mlp"]
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  seen = PIXELS[0]["inputs"]
  want = 0.5 * (classify(a, seen) + classify(b, seen))
  gaps, widths = [], []
  for ratio in (0.0, 0.6):
    out = merge(a, b, PIXELS, ratio=ratio)
    gaps.append(((classify(out, seen) - want) ** 2).mean())
    widths.append(out.spec.widths())
  assert gaps[0] > gaps[1]
  assert widths == [(6, 8, 5), (9, 13, 8)]


@pytest.mark.parametrize("method", ["activation", "weight"])
@pytest.mark.parametrize(
  "ratio",
  [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)],
)
def test_a_permuted_twin_changes_nothing(method, ratio):
  spec = LLAMA
  flat = draw(spec)
  a, b = model(spec, flat), model(spec, scramble(spec, flat))
  out = merge(a, b, TEXT, ratio=ratio, method=method)
  kv = {0.0: 2, 0.5: 3, 1.0: 4}[ratio]
  wide = {0.0: 6, 0.5: 9, 1.0: 12}[ratio]
  assert (out.spec.num_kv_heads, out.spec.num_heads, out.spec.d_ff) == (kv, 2 * kv, wide)
  want = read(a)
  np.testing.assert_allclose(read(out), want, atol=2e-5 * np.abs(want).max())
  before, after = out.aux["notes"]["squared_error"]
  assert before < 1e-4 and after < 1e-4


@pytest.mark.slow
def test_an_image_twin_changes_nothing_in_a_vision_transformer():
  one = {**IMAGE, "num_layers": 1}
  spec = models.VisionSpec("vit", **one, num_heads=2, patch_size=2, norm="layer")
  flat = draw(spec)
  a, b = model(spec, flat), model(spec, scramble(spec, flat))
  out = merge(a, b, PIXELS, ratio=0.5, method="weight")
  assert (out.spec.num_heads, out.spec.d_ff, out.spec.d_model) == (3, 36, 6)
  want = classify(a)
  np.testing.assert_allclose(classify(out), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_a_block_apart_gives_the_mean_of_both_blocks(part):
  # Two networks that differ in one block: what it adds to the stream is the mean of what both add.
  spec, base, other = LLAMA, draw(LLAMA), draw(LLAMA, seed=1)
  mixed = {n: other[n] if n.startswith(f"layers/0/{part}/") else x for n, x in base.items()}
  a, b = model(spec, base), model(spec, mixed)
  out = merge(a, b, TEXT, ratio=1.0, residual=False)
  seen = [
    np.asarray(
      models.forward(m.spec, m.params, TEXT[0][:2], observe=lambda n, x: x).observed[f"{part}/out"][
        0
      ]
    )
    for m in (a, b, out)
  ]
  want = 0.5 * (seen[0] + seen[1])
  np.testing.assert_allclose(seen[2], want, atol=1e-4 * np.abs(want).max())


def test_the_fit_against_float64_least_squares():
  rng = np.random.default_rng(0)
  x, lack = rng.standard_normal((50, 6)), rng.standard_normal((50, 5))
  kinds_in, kinds_out = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 2])
  f32 = [jnp.asarray(m, jnp.float32) for m in (x.T @ x, x.T @ lack)]
  found = least_squares.solve(
    *f32, kinds_in=jnp.asarray(kinds_in), kinds_out=jnp.asarray(kinds_out), ridge=0.0
  )
  want = np.zeros((6, 5))
  for j, kind in enumerate(kinds_out):
    rows = kinds_in != {0: -1, 1: 2, 2: 1}[int(kind)]
    want[rows, j] = np.linalg.lstsq(x[:, rows], lack[:, j], rcond=None)[0]
  np.testing.assert_allclose(found, want, atol=1e-4)
  assert (np.asarray(found)[want == 0] == 0).all()
  shrunk = least_squares.solve(*f32, ridge=0.5)
  ridge = 0.5 * np.mean(np.diag(x.T @ x))
  np.testing.assert_allclose(
    shrunk, np.linalg.solve(x.T @ x + ridge * np.eye(6), x.T @ lack), atol=1e-4
  )


def test_the_closed_form_is_no_worse_than_descent():
  spec = NETS["mlp"]
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  out = merge(a, b, PIXELS, method="weight", ridge=1e-6)
  (one,) = registry.load("merge.rebasin")()
  evidence = {"donors": needs.Aligned([b])}
  start = one.apply(a, evidence, jax.random.key(0))
  (placed,) = registry.load("merge.rebasin")(weights=(0.0, 1.0))
  moved = placed.apply(a, evidence, jax.random.key(0))
  x = np.concatenate([p["inputs"] for p in PIXELS])
  taps = [
    vision.forward(spec, m.params, x, observe=lambda n, v: v).observed["dense/in"][0]
    for m in (a, moved)
  ]
  at = [f"layers/0/dense/{n}" for n in ("kernel", "bias")]
  inputs = 0.5 * (taps[0] + taps[1])
  target = 0.5 * sum(
    t @ m.leaf(at[0]) + m.leaf(at[1])[None, :] for t, m in zip(taps, (a, moved), strict=True)
  )

  def loss(w):
    return ((inputs @ w[0] + w[1][None, :] - target) ** 2).sum()

  adam = optax.adam(5e-3)

  def update(state, _):
    w, moments = state
    change, moments = adam.update(jax.grad(loss)(w), moments)
    return (optax.apply_updates(w, change), moments), None

  first = [start.leaf(n) for n in at]
  last = jax.jit(
    lambda w: jax.lax.scan(update, (w, adam.init(w)), None, length=1000)[0][0]
  )(first)  # fmt: skip
  closed = float(loss([out.leaf(n) for n in at]))
  assert closed <= float(loss(last)) * (1 + 1e-4) < float(loss(first))


def test_going_through_the_merged_network():
  spec = NETS["mlp"]
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  seen = PIXELS[0]["inputs"]
  want = 0.5 * (classify(a, seen) + classify(b, seen))
  gaps = [
    ((classify(merge(a, b, PIXELS, ratio=0.4, inputs=i), seen) - want) ** 2).mean()
    for i in ("average", "merged")
  ]
  # The last layer is fitted to what reaches it, so the logits can only be nearer.
  assert gaps[1] < gaps[0]


def test_widths_follow_rules_over_groups():
  spec = LLAMA
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  rules = (("layers/1/mlp", 1.0), ("layers/0/heads", 1.0), (".*", 0.0))
  out = merge(a, b, TEXT, ratio=rules, method="weight")
  assert out.spec.d_ff == (6, 12)
  assert (out.spec.num_heads, out.spec.num_kv_heads) == ((8, 4), (4, 2))
  assert np.isfinite(read(out)).all()
  assert out.spec.segments() == ((0, 1), (1, 2))


def test_the_worst_pairs_stay_apart():
  merged, apart = widening.choose(np.array([0.9, 0.2, 0.5, 0.1]), 2)
  assert merged.tolist() == [0, 2] and apart.tolist() == [1, 3]
  score = np.random.default_rng(0).standard_normal(101)
  for ratio in (0.0, 0.13, 0.5, 0.99):
    merged, _ = widening.choose(score, widening.separate(101, ratio))
    assert set(merged) == set(np.flatnonzero(score >= np.quantile(score, ratio)))


def test_mistakes_are_named():
  spec = NETS["mlp"]
  a, b = (model(spec, draw(spec, s)) for s in (0, 1))
  with pytest.raises(ValueError, match=r"ratio=1.5 must lie in \[0, 1\]"):
    registry.load("merge.pleas")(ratio=1.5)
  with pytest.raises(ValueError, match="with one donor; got 2"):
    (one,) = registry.load("merge.pleas")()
    one.apply(a, {"donors": needs.Aligned([b, b]), "batches": PIXELS}, jax.random.key(0))
  with pytest.raises(ValueError, match="needs calibration batches and none was given"):
    merge(a, b, [])
  with pytest.raises(ValueError, match="merge.pleas needs calibration batches and none was given"):
    merge(a, b, [], method="weight")
  with pytest.raises(ValueError, match="sum to zero"):
    merge(a, b, PIXELS, weights=(1.0, -1.0))
