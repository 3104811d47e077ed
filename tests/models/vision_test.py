# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.core import model, needs, paths, step
from treesurgeon.io import orbax
from treesurgeon.models import hf, vision
from treesurgeon.run import collect, drivers, gradients, statistics
from treesurgeon.train import feed, flops, loop

IMAGE = {"image_size": 4, "num_classes": 3, "d_model": 6, "num_layers": 2, "channels": 2}
SPECS = {
  "mlp": models.VisionSpec("mlp", **IMAGE),
  "mlp_uneven": models.VisionSpec("mlp", **{**IMAGE, "num_layers": 3}, d_ff=(6, 6, 5), norm="rms"),
  "mlp_residual": models.VisionSpec("mlp", **IMAGE, norm="layer", residual=True),
  "conv": models.VisionSpec("conv", **IMAGE, patch_size=2),
  "vit": models.VisionSpec("vit", **IMAGE, norm="layer", num_heads=2, patch_size=2),
}
every = pytest.mark.parametrize("name", SPECS)
RNG = np.random.default_rng(0)
BATCHES = [
  {"inputs": RNG.standard_normal((n, 4, 4, 2)).astype(np.float32), "labels": np.arange(n) % 3}
  for n in (5, 5, 4)
]


def make(name, seed=0):
  return model.Model(SPECS[name], models.init(SPECS[name], jax.random.key(seed)))


def flat64(m):
  return {a: np.asarray(m.leaf(a), np.float64) for a in m.addresses()}


def relu(x):
  return np.maximum(x, 0)


def convolve(x, kernel, bias, size, stride):
  """Correlates image by image and pixel by pixel, with zeros around."""
  batch, high, wide, _ = x.shape
  padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
  weights = kernel.reshape(size, size, x.shape[-1], -1)
  out = np.zeros((batch, -(-high // stride), -(-wide // stride), weights.shape[-1]))
  for i in range(out.shape[1]):
    for j in range(out.shape[2]):
      window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
      out[:, i, j] = np.einsum("brcx,rcxo->bo", window, weights) + bias
  return out


def oracle(m, x):
  w, spec = flat64(m), m.spec
  x = np.asarray(x, np.float64)
  layers = range(spec.num_layers)
  if spec.kind == "mlp":
    h = relu(x.reshape(len(x), -1) @ w["embed/input/kernel"] + w["embed/input/bias"])
    for i in layers:
      h = relu(h @ w[f"layers/{i}/dense/kernel"] + w[f"layers/{i}/dense/bias"])
  else:
    h = relu(convolve(x, w["embed/input/kernel"], w["embed/input/bias"], 3, spec.patch_size))
    for i in layers:
      h = relu(convolve(h, w[f"layers/{i}/conv/kernel"], w[f"layers/{i}/conv/bias"], 3, 1))
    h = h.mean((1, 2))
  return h @ w["head/kernel"] + w["head/bias"]


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_it_is_what_float64_loops_compute(name):
  m, x = make(name), BATCHES[0]["inputs"]
  found = models.forward(m.spec, m.params, x).logits
  np.testing.assert_allclose(found, oracle(m, x), rtol=1e-4, atol=1e-5)


@every
def test_the_tree_has_the_addresses_and_shapes_it_says(name):
  m = make(name)
  assert {a: tuple(m.leaf(a).shape) for a in m.addresses()} == models.addresses(m.spec)
  spans = [(a, b) for a, b, _ in paths.segments(m.params)]
  assert tuple(spans) == m.spec.segments()
  again = models.init(m.spec, jax.random.key(0), jnp.bfloat16)
  assert {x.dtype.name for x in jax.tree.leaves(again)} == {"bfloat16"}
  out = models.forward(m.spec, again, BATCHES[0]["inputs"])
  assert (out.logits.dtype, out.hidden.dtype) == (jnp.float32, jnp.bfloat16)


@every
def test_block_by_block_is_the_whole(name):
  m, x = make(name), BATCHES[0]["inputs"]
  h = models.embed(m.spec, m.params, x)
  for i in range(m.spec.num_layers):
    prefix = f"layers/{i}/"
    one = paths.nest({a[len(prefix) :]: m.leaf(a) for a in m.addresses() if a.startswith(prefix)})
    h, _ = models.block(m.spec, one, h, layer=i)
  logits = models.head(m.spec, m.params, h)
  whole = models.forward(m.spec, m.params, x, remat=True).logits
  np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-6)


@every
def test_images_may_come_flat(name):
  m, x = make(name), BATCHES[0]["inputs"]
  flat = models.forward(m.spec, m.params, x.reshape(len(x), -1)).logits
  np.testing.assert_array_equal(flat, models.forward(m.spec, m.params, x).logits)


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n == "vit" else n for n in SPECS]
)
def test_every_kernel_is_fed_by_its_tap(name):
  """What a tap shows has as many columns as its kernel has rows, and yields the moments."""
  m = make(name)
  wants = {"h": needs.Statistic("second_moment", ".*kernel")}
  one = step.Step(wants, lambda m, e, k: m, "model", {"name": "demo", "given": {}}, lambda n: [n])
  found = collect.evidence(one, m, collect.Materials(batches=BATCHES))["h"]
  kernels = [a for a in m.addresses() if a.endswith("kernel")]
  assert sorted(found) == sorted(kernels)
  for address in kernels:
    seen = []
    for batch in BATCHES:
      x = observed(m, batch["inputs"], models.tap_of(address), statistics.layer_of(address))
      seen.append(np.asarray(x, np.float64).reshape(-1, m.leaf(address).shape[0]))
    x = np.concatenate(seen)
    assert found[address].count == len(x)
    np.testing.assert_allclose(found[address].moment, x.T @ x, rtol=1e-4, atol=1e-4)


def observed(m, x, tap, layer):
  held = {}

  def look(name, value):
    if name == tap and layer < 0:
      held[name] = value
    return value if name == tap else None

  out = models.forward(m.spec, m.params, x, observe=look)
  return held[tap] if layer < 0 else out.observed[tap][layer]


@every
def test_what_a_tap_is_patched_with_is_used(name):
  m, x = make(name), BATCHES[0]["inputs"]

  def patch(tap, value, layer):
    return jnp.where(layer == 1, 0.0, value) if tap == "out" else value

  out = models.forward(m.spec, m.params, x, patch=patch)
  at_zero = models.head(m.spec, m.params, jnp.zeros_like(out.hidden))
  if m.spec.num_layers == 2:
    np.testing.assert_allclose(out.logits, at_zero, rtol=1e-6)


def test_the_patches_of_a_vit_are_squares():
  m, x = make("vit"), BATCHES[0]["inputs"]
  found = observed(m, x, "embed/in", -1)
  np.testing.assert_array_equal(found[0, 1].reshape(2, 2, 2), x[0, :2, 2:])
  np.testing.assert_array_equal(found[0, 2].reshape(2, 2, 2), x[0, 2:, :2])


@pytest.mark.filterwarnings("ignore:.*calibration tokens for:UserWarning")
@pytest.mark.parametrize(
  "name", ["conv", *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "conv")]
)
def test_drivers_and_methods_take_it(name):
  m = make(name)
  given = collect.Materials(batches=BATCHES)
  cut = registry.parse("compress.quantize.gptq(bits=8, group_size=2, select='.*kernel')")
  for drive in (drivers.run, drivers.run_blockwise):
    small = drive(cut, m, given)
    assert small.nbytes() < m.nbytes()
    before, after = (
      models.forward(x.spec, x.params, BATCHES[0]["inputs"]).logits for x in (m, small)
    )
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
  assert drivers.run(registry.parse("compress.prune.wanda()"), m, given).lineage[0].inputs


def test_fisher_is_of_the_labels():
  m = make("mlp")
  found = gradients.fisher(m, BATCHES, select="head/bias")["head/bias"]
  want = np.zeros(3)
  for batch in BATCHES:
    p = np.asarray(jax.nn.softmax(models.forward(m.spec, m.params, batch["inputs"]).logits))
    want += ((p - np.eye(3)[batch["labels"]]) ** 2).sum(0)
  np.testing.assert_allclose(found, want / 14, rtol=1e-4)


def test_losses_read_labels_and_weights():
  m = make("mlp")
  batch = BATCHES[0]
  logits = np.asarray(models.forward(m.spec, m.params, batch["inputs"]).logits, np.float64)
  each = np.log(np.exp(logits).sum(-1)) - logits[np.arange(5), batch["labels"]]
  np.testing.assert_allclose(models.nll(m.spec, m.params, batch), each.mean(), rtol=1e-5)
  weighted = {**batch, "weights": np.array([1.0, 0, 0, 2, 0], np.float32)}
  want = (each[0] + 2 * each[3]) / 3
  np.testing.assert_allclose(models.nll(m.spec, m.params, weighted), want, rtol=1e-5)
  with pytest.raises(ValueError, match="a batch holds images; valid: an array of tokens, or a"):
    models.nll(m.spec, m.params, {"images": batch["inputs"]})


def test_a_digest_tells_images_and_labels_apart():
  batch = BATCHES[0]
  other = {**batch, "labels": (batch["labels"] + 1) % 3}
  assert collect.digest([batch]) != collect.digest([other])
  assert collect.digest([batch]) == collect.digest([dict(reversed(batch.items()))])


def test_unequal_layers_are_taken_and_refused():
  spec = SPECS["mlp_uneven"]
  assert spec.segments() == ((0, 2), (2, 3))
  assert spec.take_layers([1, 1, 2]).widths() == (6, 6, 6, 5)
  with pytest.raises(ValueError, match="layer 0 takes a width of 6; the one before gives 5"):
    spec.take_layers([2, 0])
  with pytest.raises(ValueError, match=r"indices in \[0, 3\); got \[3\]"):
    spec.take_layers([3])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "rnn"}, "VisionSpec.kind is 'rnn'; valid: mlp, conv, vit"),
    ({"kind": "vit"}, "VisionSpec.norm is 'none', but a ViT needs"),
    ({"kind": "vit", "norm": "layer", "num_heads": 4}, "d_model=6 is not a multiple of num_heads"),
    ({"kind": "vit", "norm": "layer", "patch_size": 3}, "image_size=4 is not a multiple of patch"),
    ({"kind": "conv", "kernel_size": 2}, "kernel_size=2 must be odd"),
    ({"patch_size": 2}, "an MLP has no patches"),
    ({"d_ff": (1, 2, 3)}, "VisionSpec.d_ff lists 3 layers; num_layers is 2"),
    ({"residual": True, "d_ff": 5}, r"residual needs layers of equal width; got \(6, 5, 5\)"),
    ({"num_classes": 0}, "VisionSpec.num_classes must be a positive integer; got 0"),
    ({"norm_eps": -1.0}, "norm_eps must be >= 0"),
  ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SPECS["mlp"], **changes)


def test_images_of_another_size_are_refused():
  m = make("conv")
  with pytest.raises(ValueError, match=r"valid: \[batch, 4, 4, 2\] or \[batch, 32\]"):
    models.forward(m.spec, m.params, np.zeros((1, 5, 5, 2), np.float32))


def test_only_a_vit_has_transformer_blocks():
  with pytest.raises(ValueError, match="'mlp' has no transformer blocks"):
    SPECS["mlp"].transformer()
  with pytest.raises(ValueError, match="'window' is not a per-layer field"):
    SPECS["mlp"].per_layer("window")


@every
def test_orbax_keeps_it(name, tmp_path):
  m = make(name)
  orbax.save(m, tmp_path / "out")
  back = orbax.restore(tmp_path / "out")
  assert back.spec == m.spec
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), m.params, back.params))


@every
def test_safetensors_keep_it(name, tmp_path):
  m = make(name)
  io.save(m, tmp_path / "out")
  back = io.load(tmp_path / "out")
  assert back.spec == m.spec
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), m.params, back.params))
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["treesurgeon"]["kind"] == m.spec.kind
  del config["treesurgeon"]["num_classes"]
  with pytest.raises(ValueError, match=r"lacks treesurgeon\.num_classes"):
    hf.from_config(config)
  config["treesurgeon"] |= {"num_classes": 3, "depth": 2}
  with pytest.raises(ValueError, match="holds the unknown field 'depth'"):
    hf.from_config(config)


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_it_learns_by_the_loop(name):
  m = make(name)
  data = [BATCHES[0]] * 40
  trained = loop.fit(m, data, steps=40, optimizer={"lr": 0.02, "warmup": 0}, accumulate=5)
  before, after = (float(models.nll(m.spec, x.params, BATCHES[0])) for x in (m, trained))
  assert after < 0.5 * before


def test_the_feed_refuses_labels_that_do_not_fit():
  batch = BATCHES[0]
  with pytest.raises(ValueError, match="as many integer labels"):
    feed.Feed([{**batch, "labels": batch["labels"][:2]}], vocab_size=3)
  with pytest.raises(ValueError, match="holds the label 2; the classes are 0 to 1"):
    next(feed.Feed([batch], vocab_size=2))


def test_training_is_counted():
  small = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=5, num_layers=1)
  assert flops.train_flops(small, 10, 1) == 10 * 6 * (4 * 5 + 5 * 5 + 5 * 3)
  conv = models.VisionSpec("conv", image_size=2, num_classes=3, d_model=5, num_layers=1)
  assert flops.train_flops(conv, 1, 1) == 6 * (4 * (9 * 5 + 45 * 5) + 15)
  vit = models.VisionSpec(
    "vit", image_size=2, num_classes=3, d_model=4, num_layers=1, d_ff=8, norm="rms"
  )
  assert flops.train_flops(vit, 1, 1) == 6 * (4 * (4 + 64 + 64) + 12) + 12 * 4 * 16


def test_windows_are_what_a_convolution_sees():
  x = np.arange(16.0).reshape(1, 4, 4, 1)
  found = np.asarray(vision.windows(jnp.asarray(x, jnp.float32), size=3, stride=2))
  assert found[0, 1, 1].tolist() == [5, 6, 7, 9, 10, 11, 13, 14, 15]
