# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import paths
from treesurgeon.merge import permutations, units
from treesurgeon.models import vision

SMALL = {"vocab_size": 13, "d_model": 12, "num_layers": 2, "d_ff": 10, "max_positions": 16}
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm": "layer", "gated": False}
BERT = {
  **BIASES, "kind": "encoder", "positions": "learned", "norm_place": "residual",
  "final_norm": False, "embed_norm": True, "mlm_head": True, "head_bias": True, "num_types": 2,
}  # fmt: skip
TEXT = {
  "llama": models.Spec(**SMALL, num_heads=4, head_dim=4, num_kv_heads=2),
  "gpt2": models.Spec(**SMALL, **BIASES, num_heads=3, positions="learned", tied=True),
  "neox": models.Spec(**SMALL, **BIASES, num_heads=2, rope_dim=2, parallel=True),
  "qwen3": models.Spec(**SMALL, num_heads=4, num_kv_heads=2, head_dim=6, rope_dim=2,
                       qk_norm="head"),
  "olmo2": models.Spec(**SMALL, num_heads=4, head_dim=4, num_kv_heads=2, qk_norm="full",
                       norm_place="post"),
  "mixtral": models.Spec(**SMALL, num_heads=2, num_experts=3, experts_per_token=2),
  "bert": models.Spec(**SMALL, **BERT, num_heads=3, tied=True, pooler=True, activation="gelu"),
  "bert_untied": models.Spec(**SMALL, **BERT, num_heads=3),
  "uneven": models.Spec(**{**SMALL, "d_ff": (8, 10)}, num_heads=(2, 4), head_dim=4,
                        num_kv_heads=(2, 2)),
}  # fmt: skip
IMAGE = {"image_size": 4, "num_classes": 3, "d_model": 6, "num_layers": 2}
IMAGES = {
  "mlp": models.VisionSpec("mlp", **IMAGE, d_ff=(8, 5)),
  "mlp_residual": models.VisionSpec("mlp", **IMAGE, residual=True, norm="rms"),
  "conv": models.VisionSpec("conv", **IMAGE, d_ff=(8, 5), norm="layer"),
  "vit": models.VisionSpec("vit", **IMAGE, num_heads=2, patch_size=2, norm="layer"),
}
ALL = {**TEXT, **IMAGES}


def draw(spec, seed=0):
  rng = np.random.default_rng(seed)
  shapes = models.addresses(spec)
  return {a: (0.5 * rng.standard_normal(s)).astype(np.float32) for a, s in shapes.items()}


def scramble(spec, seed=1):
  """Returns a random element of the network's symmetry group."""
  rng = np.random.default_rng(seed)
  index = permutations.identity(spec)
  for group in permutations.groups(spec):
    index = units.compose(index, group, rng.permutation(group.size))
  return index


def logits(spec, flat):
  rng, flat = np.random.default_rng(2), jax.tree.map(jnp.asarray, dict(flat))
  if isinstance(spec, models.VisionSpec):
    x = rng.standard_normal((2, 4, 4, 1)).astype(np.float32)
    return np.asarray(vision.forward(spec, paths.unflatten(flat), x).logits)
  tokens = rng.integers(0, spec.vocab_size, (2, 8))
  return np.asarray(models.forward(spec, paths.unflatten(flat), tokens).logits)


@pytest.mark.parametrize("name", ALL)
def test_the_function_is_unchanged(name):
  spec, flat = ALL[name], draw(ALL[name])
  moved = units.apply(flat, scramble(spec))
  changed = [a for a in flat if not np.array_equal(flat[a], moved[a])]
  assert len(changed) >= 0.8 * len(flat)
  before, after = logits(spec, flat), logits(spec, moved)
  np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", ["llama", "bert", "mlp_residual"])
def test_one_member_too_few_changes_the_function(name):
  # The groups are complete: leaving any one leaf behind is seen in the logits. (A key's bias is
  # not: it adds the same to all scores of a query.)
  spec, flat = ALL[name], draw(ALL[name])
  before = logits(spec, flat)
  for group in [g for g in permutations.groups(spec) if "1" not in g.name][:4]:
    addresses = {m.address for m in group.members}
    if group.name == "residual":
      addresses = {"layers/0/attn/o/kernel", "layers/1/mlp/down/kernel"} & addresses
    for skipped in sorted(addresses - {"pooler/kernel", "layers/0/attn/k/bias"}):
      rest = tuple(m for m in group.members if m.address != skipped)
      index = units.compose(
        permutations.identity(spec), dataclasses.replace(group, members=rest),
        np.roll(np.arange(group.size), 1),
      )  # fmt: skip
      after = logits(spec, units.apply(flat, index))
      assert np.abs(after - before).max() > 1e-4, (group.name, skipped)


@pytest.mark.parametrize("name", ["llama", "gpt2", "conv"])
def test_indices_are_permutations_and_compose(name):
  spec = ALL[name]
  one, flat = scramble(spec), draw(spec)
  for address, axes in one.items():
    for axis, order in axes.items():
      assert sorted(order) == list(range(flat[address].shape[axis])), (address, axis)
  twice = one
  for group in permutations.groups(spec):
    twice = units.compose(twice, group, np.roll(np.arange(group.size), 1))
  step = flat
  for index in (one, *[units.compose(permutations.identity(spec), g, np.roll(np.arange(g.size), 1))
                       for g in permutations.groups(spec)]):  # fmt: skip
    step = units.apply(step, index)
  whole = units.apply(flat, twice)
  assert all(np.array_equal(step[a], whole[a]) for a in flat)


def test_what_rotation_ties_is_left_alone():
  names = {n: {g.name for g in permutations.groups(TEXT[n])} for n in TEXT}
  assert not any("/keys/" in g for g in names["llama"])
  assert {"layers/0/keys/0", "layers/0/keys/1"} <= names["neox"]
  assert "layers/0/keys" in names["qwen3"]
  by_name = {g.name: g for g in permutations.groups(TEXT["neox"])}
  assert by_name["layers/0/keys/0"].size == 4
  assert {g.size for g in permutations.groups(TEXT["llama"]) if "queries" in g.name} == {2}


def test_the_residual_stream_is_optional():
  assert "residual" not in {g.name for g in permutations.groups(TEXT["llama"], residual=False)}
  assert "embed/tokens/embedding" not in permutations.identity(TEXT["llama"], residual=False)
  assert permutations.groups(IMAGES["mlp_residual"], residual=False) == ()


def test_places_cover_runs_blocks_and_strides():
  m = units.Member("w", 0, start=1, repeat=2, block=2, stride=7)
  assert m.places(3).tolist() == [[[1, 2], [3, 4], [5, 6]], [[8, 9], [10, 11], [12, 13]]]
  flat = list(itertools.chain(*itertools.chain(*m.places(3).tolist())))
  assert len(set(flat)) == len(flat)


def test_an_unknown_architecture_is_named():
  with pytest.raises(ValueError, match="str is no architecture whose symmetries are known"):
    permutations.groups.__wrapped__("resnet")
