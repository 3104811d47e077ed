# SPDX-License-Identifier: Apache-2.0
"""LoRA against a float64 formula, on arrays and on quantized bases, through the forward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import adapt, models
from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, model, packing, paths
from treesurgeon.train import objectives, optimizers, partition
from treesurgeon.train import step as train_step

SPEC = models.Spec(
  vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=12, max_positions=16
)
TOKENS = jnp.arange(12).reshape(2, 6) % 11


@pytest.fixture(scope="module")
def base():
  # Wider than an initialization, so that adapters in the blocks can move the logits.
  params = models.init(SPEC, jax.random.key(0))
  return model.Model(SPEC, jax.tree.map(lambda x: 5 * x if x.std() > 0 else x, params))


def apply(transform, m, seed=1):
  for i, step in enumerate(transform):
    m = step.apply(m, {}, jax.random.fold_in(jax.random.key(seed), i))
  return m


def logits(m):
  return models.forward(m.spec, m.params, TOKENS).logits


def perturbed(m, seed=2):
  """Gives every adapter a B that is not zero, as training would."""
  found = {}
  for i, (address, low) in enumerate(adapters.extract(m).items()):
    noise = 0.3 * jax.random.normal(jax.random.key(seed + i), low.b.shape)
    found[address] = leaves.LowRank(low.a, noise.astype(low.b.dtype), low.scale)
  return adapters.attach(adapters.strip(m), found)


def quantized(w, bits=4, group=4):
  """Rounds to the nearest of 2**bits levels; a stand-in for any quantization method."""
  rows, cols = w.shape
  grouped = np.asarray(w, np.float32).reshape(-1, group, cols)
  scale = np.abs(grouped).max(1, keepdims=True) / (2 ** (bits - 1) - 1) + 1e-9
  codes = np.clip(np.round(grouped / scale) + 2 ** (bits - 1), 0, 2**bits - 1)
  codes = jnp.asarray(codes.reshape(rows, cols), jnp.uint8)
  return leaves.QuantizedTensor(
    packing.pack(codes, bits=bits), jnp.asarray(scale[:, 0]), None, None, rows, cols, bits, group
  )


def on_four_bits(m):
  kernels = [a for a in m.addresses() if a.startswith("layers/") and a.endswith("kernel")]
  return m.update({a: quantized(m.leaf(a)) for a in kernels})


def test_fresh_adapters_change_nothing(base):
  tuned = apply(adapt.lora(), base)
  found = adapters.extract(tuned)
  assert set(found) == {a for a in base.addresses() if "/attn/" in a or "/mlp/" in a}
  for address, low in found.items():
    w = base.leaf(address)
    assert low.a.shape == (w.shape[0], 8) and low.b.shape == (8, w.shape[1])
    assert low.scale == 2.0 and not low.b.any()
    np.testing.assert_array_equal(leaves.dense(tuned.leaf(address)), w)
  np.testing.assert_array_equal(logits(tuned), logits(base))
  assert [s[:2] for s in paths.segments(tuned.params)] == [(0, 2)]


def test_a_is_uniform_within_peft_bounds():
  m = model.Model(None, {"w": {"kernel": jnp.zeros((64, 32))}})
  (low,) = adapters.extract(apply(adapt.lora(rank=200, select="w/kernel"), m)).values()
  a = np.asarray(low.a)
  assert np.abs(a).max() <= 1 / 8 and abs(a.mean()) < 2e-3
  assert math.isclose(a.std(), 1 / 8 / math.sqrt(3), rel_tol=0.02)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_value_is_the_formula_in_float64(base, rslora, scale):
  tuned = perturbed(apply(adapt.lora(rank=4, alpha=12.0, rslora=rslora), base))
  for address, low in adapters.extract(tuned).items():
    w, a, b = (np.asarray(x, np.float64) for x in (base.leaf(address), low.a, low.b))
    np.testing.assert_allclose(leaves.dense(tuned.leaf(address)), w + scale * a @ b, atol=1e-6)


def test_draws_depend_on_address_and_seed_alone(base):
  whole = adapters.extract(apply(adapt.lora(rank=2), base))
  some = adapters.extract(apply(adapt.lora(rank=2, select="layers/1/attn/.*"), base))
  assert set(some) == {f"layers/1/attn/{n}/kernel" for n in "qkvo"}
  for address, low in some.items():
    np.testing.assert_array_equal(low.a, whole[address].a)
  a = np.asarray(some["layers/1/attn/q/kernel"].a)
  assert not np.array_equal(a, whole["layers/0/attn/q/kernel"].a)
  other = adapters.extract(apply(adapt.lora(rank=2, select="layers/1/attn/.*"), base, seed=5))
  assert not np.array_equal(a, other["layers/1/attn/q/kernel"].a)


def test_quantized_base_stays_and_runs(base):
  small = on_four_bits(base)
  tuned = apply(adapt.lora(rank=2), small)
  np.testing.assert_array_equal(logits(tuned), logits(small))
  tuned = perturbed(tuned)
  address = "layers/1/mlp/up/kernel"
  held, low = adapters.split(tuned.leaf(address))
  assert isinstance(held, leaves.QuantizedTensor)
  np.testing.assert_array_equal(held.codes, small.leaf(address).codes)
  as_arrays = tuned.replace(params=leaves.map_leaves(leaves.dense, tuned.params))
  np.testing.assert_allclose(logits(tuned), logits(as_arrays), atol=1e-5)
  assert np.abs(logits(tuned) - logits(small)).max() > 1e-3
  assert low.dtype == jnp.float32


def test_factors_have_the_dtype_asked_for_whatever_the_base(base):
  half = base.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
  for dtype in ("float32", "bfloat16"):
    tuned = apply(adapt.lora(dtype=dtype), half)
    assert {str(x.a.dtype) for x in adapters.extract(tuned).values()} == {dtype}
    assert tuned.leaf("layers/0/mlp/up/kernel").dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits(tuned), logits(half))


def test_a_second_adapter_stacks_on_the_first(base):
  once = perturbed(apply(adapt.lora(rank=2), base))
  twice = apply(adapt.lora(rank=3, select="layers/0/mlp/.*"), once, seed=7)
  address = "layers/0/mlp/up/kernel"
  assert [type(p).__name__ for p in twice.leaf(address).parts[1:]] == ["LowRank"] * 2
  assert adapters.extract(twice)[address].rank == 3
  np.testing.assert_allclose(logits(twice), logits(once), atol=1e-6)


def test_shapes_are_known_without_computing(base):
  (step,) = adapt.lora(rank=3)
  key = jax.random.key(0)
  out = jax.eval_shape(lambda p: step.apply(base.replace(params=p), {}, key).params, base.params)
  real = step.apply(base, {}, key).params
  assert jax.tree.map(lambda x: x.shape, out) == jax.tree.map(lambda x: x.shape, real)


@pytest.mark.parametrize("quantize", [False, True])
def test_training_moves_adapters_alone_and_merges(base, quantize):
  m = on_four_bits(base) if quantize else base
  m = apply(adapt.lora(rank=4), m)
  mask = partition.trainable(m.params, types=["LowRank"])
  train, frozen = partition.split(m.params, mask)
  optimizer = optimizers.build(lr=0.05, schedule="constant", weight_decay=0.1)
  state = train_step.init(train, optimizer.direction)
  factors = sum(x.a.size + x.b.size for x in adapters.extract(m).values())
  assert partition.count(train) == factors
  moments = [x.size for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert sum(moments) == 2 * factors
  run = jax.jit(
    train_step.build(SPEC, objective=objectives.next_token(), optimizer=optimizer, mask=mask)
  )
  batch = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 9)))
  losses = []
  for _ in range(10):
    state, metrics = run(state, frozen, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.05
  tuned = m.replace(params=partition.join(state.train, frozen, mask))
  before, after = adapters.strip(m), adapters.strip(tuned)
  assert jax.tree.structure(before.params) == jax.tree.structure(after.params)
  for x, y in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  merged = apply(adapt.merge(dense=quantize), tuned)
  assert not adapters.extract(merged)
  np.testing.assert_allclose(logits(merged), logits(tuned), atol=1e-5)
  assert np.abs(logits(merged) - logits(m)).max() > 1e-2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rank": 0}, r"rank=0 must be an integer of 1 or more"),
    ({"alpha": 0.0}, r"alpha=0.0 must be a positive number"),
    ({"alpha": math.nan}, r"alpha=nan must be"),
    ({"dtype": "int8"}, r"dtype='int8' must be one of float32, bfloat16, float16"),
    ({"ranks": 3}, r"adapt.lora has no argument 'ranks'; it takes rank, alpha"),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    adapt.lora(**arguments)


def test_a_selection_without_kernels_is_an_error(base):
  (step,) = adapt.lora(select="final_norm/scale")
  with pytest.raises(ValueError, match="no address matches"):
    step.units(base.addresses())
