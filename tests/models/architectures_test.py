# SPDX-License-Identifier: Apache-2.0
"""Laws that hold for every switch of the spec: storage, scanning, hooks and caching."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import leaves, paths
from treesurgeon.models import generation, layers, taps

BASE = {"vocab_size": 13, "d_model": 16, "num_layers": 4, "num_heads": 4, "d_ff": 24}
GPT = {
  **BASE,
  "positions": "learned",
  "norm": "layer",
  "gated": False,
  "activation": "gelu_tanh",
  "max_positions": 32,
  "tied": True,
  "qkv_bias": True,
  "o_bias": True,
  "mlp_bias": True,
}
SPECS = {
  "llama": models.Spec(**BASE, num_kv_heads=2),
  "gpt": models.Spec(**GPT, window=(2, 2, 0, 0)),
  "gemma": models.Spec(
    **BASE,
    num_kv_heads=1,
    head_dim=6,
    norm_plus_one=True,
    norm_place="sandwich",
    qk_norm="head",
    window=(3, 0, 3, 0),
    rope_theta=(1e4, 1e6, 1e4, 1e6),
    rope_scaling="linear",
    rope_factor=(1.0, 8.0, 1.0, 8.0),
    embed_scale=4.0,
    tied=True,
    attn_softcap=2.0,
    final_softcap=3.0,
  ),
  "olmo": models.Spec(**BASE, norm_place="post", qk_norm="full"),
  "neox": models.Spec(**BASE, norm="layer", gated=False, parallel=True, rope_dim=2),
  "gptj": models.Spec(
    **BASE,
    norm="layer",
    gated=False,
    parallel=True,
    shared_norm=True,
    rope_interleaved=True,
    head_bias=True,
  ),
  "mixtral": models.Spec(**BASE, num_kv_heads=2, num_experts=3, experts_per_token=2),
  "unequal": models.Spec(
    **{**BASE, "num_heads": (2, 2, 4, 4), "d_ff": (8, 8, 8, 20)},
    num_kv_heads=(1, 1, 2, 2),
    head_dim=4,
    window=(0, 2, 0, 2),
  ),
}
ENCODER = models.Spec(
  **{**GPT, "tied": True},
  kind="encoder",
  norm_place="residual",
  final_norm=False,
  embed_norm=True,
  num_types=2,
  mlm_head=True,
  head_bias=True,
  pooler=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 9)))


@functools.cache
def params_of(spec: models.Spec) -> dict:
  """Draws parameters, biases and norm scales included, large enough to matter."""
  shapes = models.init(spec, jax.random.key(1))
  flat, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(2), len(flat))
  noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, flat, strict=True)]
  return jax.tree.unflatten(tree, [x + n for x, n in zip(flat, noise, strict=True)])


# Compiled as one program: op by op, these tests would take minutes.
forward = jax.jit(models.forward, static_argnames=("spec", "observe", "patch", "remat", "dtype"))
block = jax.jit(models.block, static_argnames=("spec",))


@functools.cache
def logits_of(spec: models.Spec) -> jax.Array:
  """Runs the plain forward pass, once for all tests."""
  return forward(spec, params_of(spec), TOKENS).logits


def resegment(params: dict, cut: int) -> dict:
  """Splits the first segment that holds `cut` in two."""
  layers = {}
  for start, stop, tree in paths.segments(params):
    if start < cut < stop:
      layers[f"{start}:{cut}"] = jax.tree.map(lambda x, n=cut - start: x[:n], tree)
      layers[f"{cut}:{stop}"] = jax.tree.map(lambda x, n=cut - start: x[n:], tree)
    else:
      layers[f"{start}:{stop}"] = tree
  # Out of order on purpose: segments run by their numbers.
  return {**params, "layers": dict(reversed(layers.items()))}


@pytest.fixture(params=[*SPECS, "encoder"])
def spec(request: pytest.FixtureRequest) -> models.Spec:
  """Gives every architecture."""
  return ENCODER if request.param == "encoder" else SPECS[request.param]


@pytest.fixture(params=["unequal", "encoder"])
def some_spec(request: pytest.FixtureRequest) -> models.Spec:
  """Gives a few, for laws that do not depend on the inside of a block."""
  return ENCODER if request.param == "encoder" else SPECS[request.param]


def test_init_matches_the_address_table(spec: models.Spec):
  params = models.init(spec, jax.random.key(0), jnp.bfloat16)
  flat = paths.flatten(params)
  assert {k: v.shape for k, v in flat.items()} == models.addresses(spec)
  assert {v.dtype for v in flat.values()} == {jnp.dtype(jnp.bfloat16)}
  assert len(paths.segments(params)) == len(spec.segments())


def test_init_does_not_depend_on_segments():
  """A leaf draws from its address, so a model of another shape elsewhere keeps it."""
  uniform = models.init(SPECS["llama"], jax.random.key(0))
  other = dataclasses.replace(SPECS["llama"], d_ff=(24, 24, 24, 8))
  for address in ("layers/2/attn/q/kernel", "embed/tokens/embedding", "layers/1/mlp/up/kernel"):
    again = paths.get(models.init(other, jax.random.key(0)), address)
    np.testing.assert_array_equal(paths.get(uniform, address), again)


def test_scan_equals_a_loop_over_blocks(spec: models.Spec):
  params = params_of(spec)
  h = models.embed(spec, params, TOKENS)
  for start, stop, tree in paths.segments(params):
    for i in range(start, stop):
      one = jax.tree.map(lambda x, n=i - start: x[n], tree)
      h, seen = block(spec, one, h, layer=jnp.int32(i))
      assert seen == {}
  logits = models.head(spec, params, h)
  np.testing.assert_allclose(logits, logits_of(spec), atol=1e-5, rtol=1e-5)


def test_a_traced_layer_index_equals_an_int(some_spec: models.Spec):
  spec = some_spec
  params = params_of(spec)
  start, stop, tree = paths.segments(params)[-1]
  one = jax.tree.map(lambda x: x[-1], tree)
  h = jax.random.normal(jax.random.key(3), (1, 5, 16))
  traced, _ = block(spec, one, h, layer=jnp.int32(stop - 1))
  static, _ = jax.jit(lambda p: models.block(spec, p, h, layer=stop - 1))(one)
  np.testing.assert_allclose(traced, static, atol=1e-5)


def test_segments_do_not_change_the_logits(some_spec: models.Spec):
  spec = some_spec
  params = params_of(spec)
  again = forward(spec, resegment(params, 3), TOKENS).logits
  np.testing.assert_allclose(again, logits_of(spec), atol=1e-6, rtol=1e-6)


def test_observations_come_back_stacked_over_layers(some_spec: models.Spec):
  spec = some_spec
  params = resegment(params_of(spec), 3)

  def observe(name: str, x: jax.Array) -> dict | None:
    return None if name == "mlp/out" else {"mean": x.mean(), "sum": x.sum(axis=(0, 1))[:2]}

  out = forward(spec, params, TOKENS, observe=observe)
  for name in set(models.BLOCK_TAPS) - {"mlp/out"}:
    assert out.observed[name]["mean"].shape == (4,)
    assert out.observed[name]["sum"].shape == (4, 2)
  assert "mlp/out" not in out.observed
  for name in models.OUTER_TAPS:
    assert out.observed[name]["mean"].shape == ()
  assert len(set(out.observed["in"]["mean"].tolist())) == 4


def test_observed_inputs_feed_the_kernels_they_are_named_for(some_spec: models.Spec):
  """The tap of `o`, times the kernel of `o`, is the tap behind it."""
  spec = some_spec
  params = params_of(spec)
  out = forward(spec, params, TOKENS, observe=lambda name, x: x)
  for inner, outer, module in (
    ("attn/o/in", "attn/out", "attn/o"),
    ("mlp/down/in", "mlp/out", "mlp/down"),
  ):
    assert models.tap_of(f"layers/2/{module}/kernel") == inner
    got = out.observed[inner][2] @ paths.get(params, f"layers/2/{module}/kernel")
    if f"layers/2/{module}/bias" in models.addresses(spec):
      got = got + paths.get(params, f"layers/2/{module}/bias")[None, None, :]
    np.testing.assert_allclose(got, out.observed[outer][2], atol=1e-5)


def test_a_patch_that_changes_nothing_is_bit_exact(some_spec: models.Spec):
  spec = some_spec
  params = params_of(spec)
  patched = forward(spec, params, TOKENS, patch=lambda name, x, layer: x).logits
  np.testing.assert_array_equal(logits_of(spec), patched)


@pytest.mark.parametrize("tap", ["attn/out", "mlp/down/in", "in"])
def test_a_patch_changes_one_layer(some_spec: models.Spec, tap: str):
  spec = some_spec
  params = params_of(spec)

  def patch(name: str, x: jax.Array, layer: jax.Array) -> jax.Array:
    return jnp.where((layer == 2) & (name == tap), 0.0, x)

  seen = [
    forward(spec, params, TOKENS, patch=p, observe=lambda n, x: x[:, :, :2]).observed
    for p in (None, patch)
  ]
  for name in ("in", "attn/out"):
    np.testing.assert_allclose(seen[0][name][:2], seen[1][name][:2], atol=1e-6)
  np.testing.assert_array_equal(seen[1][tap][2], 0.0)
  assert np.abs(seen[0]["out"][2] - seen[1]["out"][2]).max() > 1e-3


def test_a_patch_sees_minus_one_outside_blocks():
  layers = []

  def patch(name: str, x: jax.Array, layer: jax.Array) -> jax.Array:
    if name in models.OUTER_TAPS:
      layers.append((name, int(layer)))
    return x

  models.forward(SPECS["llama"], params_of(SPECS["llama"]), TOKENS, patch=patch)
  assert layers == [("embed/out", -1), ("lm_head/in", -1)]


def test_remat_gives_the_same_gradient():
  spec = SPECS["gpt"]
  params = params_of(spec)

  def loss(params: dict, remat: bool) -> jax.Array:
    return models.forward(spec, params, TOKENS, remat=remat).logits.var()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  plain, again = (gradient(params, remat) for remat in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_compute_dtype():
  params = params_of(SPECS["gpt"])
  out = forward(SPECS["gpt"], params, TOKENS, dtype=jnp.bfloat16)
  full = forward(SPECS["gpt"], params, TOKENS)
  assert (out.hidden.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)
  assert full.hidden.dtype == jnp.float32
  assert 0 < np.abs(out.logits - full.logits).max() < 1.0


def test_compressed_leaves_run_in_place_of_arrays():
  spec = SPECS["llama"]
  params = params_of(spec)
  a, b = jax.random.normal(jax.random.key(5), (2, 4, 16, 3))
  factors = leaves.LowRank(a, jnp.swapaxes(b, 1, 2)[:, :, :8])
  dense = jax.tree.map(lambda x: x, params)
  dense["layers"]["0:4"]["attn"]["k"]["kernel"] = leaves.dense(factors)
  thin = jax.tree.map(lambda x: x, params)
  thin["layers"]["0:4"]["attn"]["k"]["kernel"] = factors
  table = params["embed"]["tokens"]["embedding"]
  zero = leaves.LowRank(jnp.zeros((13, 1)), jnp.zeros((1, 16)))
  thin["embed"] = {"tokens": {"embedding": leaves.Sum((table, zero))}}
  expected = forward(spec, dense, TOKENS).logits
  np.testing.assert_allclose(forward(spec, thin, TOKENS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_the_cache_gives_the_logits_of_the_full_pass(name: str):
  spec = SPECS[name]
  params = resegment(params_of(spec), 1)
  full = logits_of(spec)
  cache = models.init_cache(spec, params, 2, 12)
  got, at = [], 0
  extend = jax.jit(models.extend, static_argnums=0)
  for size in (4, 1, 4):
    logits, cache = extend(spec, params, TOKENS[:, at : at + size], cache, jnp.int32(at))
    got.append(logits)
    at += size
  np.testing.assert_allclose(jnp.concatenate(got, axis=1), full, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt"])
def test_greedy_generation_is_argmax_of_the_full_pass(name: str):
  spec = SPECS[name]
  params = params_of(spec)
  expected = TOKENS[:, :4]
  for _ in range(5):
    logits = forward(spec, params, expected).logits
    expected = jnp.concatenate([expected, logits[:, -1:].argmax(-1)], axis=1)
  out = models.generate(spec, params, TOKENS[:, :4], max_new_tokens=5)
  np.testing.assert_array_equal(out, expected)


def test_generation_fills_with_the_end_token():
  spec = SPECS["llama"]
  params = params_of(spec)
  plain = np.asarray(models.generate(spec, params, TOKENS[:, :3], max_new_tokens=8))
  eos = int(plain[0, 4])
  ended = np.asarray(models.generate(spec, params, TOKENS[:, :3], max_new_tokens=8, eos_id=eos))
  for row, free in zip(ended, plain, strict=True):
    hits = np.flatnonzero(free[3:] == eos)
    stop = 3 + (hits[0] if len(hits) else 8)
    np.testing.assert_array_equal(row[:stop], free[:stop])
    assert (row[stop:] == eos).all()


def test_sampling_follows_its_key_and_stays_in_the_top_k():
  spec = SPECS["llama"]
  params = params_of(spec)
  kwargs = {"max_new_tokens": 6, "temperature": 2.0}
  draws = [
    np.asarray(models.generate(spec, params, TOKENS[:, :2], key=jax.random.key(k), **kwargs))
    for k in (0, 0, 1)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert (draws[0] != draws[2]).any()
  one = models.generate(spec, params, TOKENS[:, :2], key=jax.random.key(0), top_k=1, **kwargs)
  greedy = models.generate(spec, params, TOKENS[:, :2], max_new_tokens=6)
  np.testing.assert_array_equal(one, greedy)
  logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0]])
  ids = {int(generation.sample(logits, jax.random.key(k), top_k=2)[0]) for k in range(40)}
  assert ids == {1, 3}


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"max_new_tokens": 0}, r"max_new_tokens=0"),
    ({"max_new_tokens": 30}, r"39 tokens; max_positions is 32"),
    ({"max_new_tokens": 1, "temperature": 1.0}, r"temperature=1.0 samples, which needs a key"),
    ({"max_new_tokens": 1, "top_k": 99}, r"top_k in \[0, 13\]; got 0.0, 99"),
  ],
)
def test_generation_refuses(kwargs: dict, message: str):
  spec = SPECS["gpt"]
  with pytest.raises(ValueError, match=message):
    models.generate(spec, models.init(spec, jax.random.key(0)), TOKENS, **kwargs)


def test_misuse_is_named():
  spec, params = SPECS["gpt"], params_of(SPECS["gpt"])
  with pytest.raises(ValueError, match=r"40 tokens exceeds max_positions=32"):
    forward(spec, params, jnp.zeros((1, 40), int))
  with pytest.raises(ValueError, match=r"mask has shape \(2, 4\); valid: \[batch, 9\]"):
    forward(spec, params, TOKENS, mask=jnp.ones((2, 4)))
  with pytest.raises(ValueError, match=r"segments 0:4; they must cover 0:3 without gaps"):
    forward(dataclasses.replace(spec, num_layers=3, window=0), params, TOKENS)
  with pytest.raises(ValueError, match="needs a decoder"):
    models.generate(ENCODER, params_of(ENCODER), TOKENS, max_new_tokens=1)
  bare = dataclasses.replace(ENCODER, mlm_head=False, head_bias=False)
  with pytest.raises(ValueError, match="no language-model head"):
    models.head(bare, params_of(bare), jnp.zeros((1, 2, 16)))
  for address in ("layers/0/attn_norm/scale", "layers/0/attn/x/kernel", "embed/tokens/embedding"):
    with pytest.raises(ValueError, match=f"no tap feeds '{address}'; valid: layers/<i>/attn/q"):
      models.tap_of(address)


def test_an_unknown_token_shows():
  spec = SPECS["llama"]
  logits = forward(spec, params_of(spec), jnp.array([[1, 13], [1, 12]])).logits
  assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()


def test_an_encoder_reads_both_ways_and_a_decoder_does_not():
  changed = TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % 13)
  for spec, same in ((ENCODER, False), (SPECS["llama"], True)):
    params = params_of(spec)
    a, b = (forward(spec, params, t).logits[:, 0] for t in (TOKENS, changed))
    assert bool(jnp.allclose(a, b, atol=1e-6)) == same


@pytest.mark.parametrize("norm_topk", [True, False])
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(norm_topk: bool):
  spec = models.Spec(
    vocab_size=5, d_model=6, num_layers=1, num_heads=1, d_ff=4, num_experts=5, experts_per_token=2,
    norm_topk=norm_topk,
  )  # fmt: skip
  params = jax.tree.map(lambda x: x[0], params_of(spec)["layers"]["0:1"])["mlp"]
  x = np.random.default_rng(0).normal(size=(1, 7, 6))
  got = layers.Mixture(spec).apply(
    {"params": params}, jnp.asarray(x, jnp.float32), taps.Tap(None, None), layer=0
  )
  wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  share = np.exp(x[0] @ wide["router"]["kernel"])
  share /= share.sum(-1, keepdims=True)
  for token, p, out in zip(x[0], share, np.asarray(got)[0], strict=True):
    chosen = np.argsort(-p)[:2]
    expected = np.zeros(6)
    for i in chosen:
      w = wide["experts"][str(i)]
      gate = token @ w["gate"]["kernel"]
      y = (gate / (1 + np.exp(-gate)) * (token @ w["up"]["kernel"])) @ w["down"]["kernel"]
      expected += p[i] / (p[chosen].sum() if norm_topk else 1.0) * y
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_equal_experts_are_one_dense_block():
  dense = SPECS["llama"]
  spec = dataclasses.replace(dense, num_experts=3, experts_per_token=2)
  flat = paths.flatten(params_of(dense))
  for address, shape in models.addresses(spec).items():
    at, _, inside = address.partition("/mlp/experts/")
    if inside:
      flat[address] = flat[f"{at}/mlp/{inside.split('/', 1)[1]}"]
    elif address.endswith("router/kernel"):
      flat[address] = jax.random.normal(jax.random.key(0), shape)
  mixed = paths.unflatten({a: flat[a] for a in models.addresses(spec)})
  logits = forward(spec, mixed, TOKENS).logits
  np.testing.assert_allclose(logits, logits_of(dense), atol=1e-4, rtol=1e-4)


def test_padding_is_not_seen():
  for spec in (ENCODER, SPECS["olmo"]):
    params = params_of(spec)
    mask = jnp.ones_like(TOKENS).at[:, 6:].set(0)
    padded = forward(spec, params, TOKENS, mask=mask).logits[:, :6]
    short = forward(spec, params, TOKENS[:, :6]).logits
    np.testing.assert_allclose(padded, short, atol=1e-5)


def test_unused_depth_is_taken_like_any_gather():
  spec = SPECS["gemma"]
  params = params_of(spec)
  picked = [0, 1, 1, 3]
  deep = {
    **params,
    "layers": {"0:4": jax.tree.map(lambda x: x[jnp.array(picked)], params["layers"]["0:4"])},
  }
  out = forward(spec.take_layers(picked), deep, TOKENS).hidden
  h = models.embed(spec, params, TOKENS)
  for i in picked:
    one = jax.tree.map(lambda x, n=i: x[n], params["layers"]["0:4"])
    h, _ = block(spec, one, h, layer=jnp.int32(i))
  np.testing.assert_allclose(out, h, atol=1e-5)
