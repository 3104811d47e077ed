# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from treesurgeon.merge.mergekit import layers


def stack(prefix, count, *rests):
  return [f"{prefix}{i}.{r}" for i in range(count) for r in rests or ("w", "b")]


@pytest.mark.parametrize(
  ("prefix", "key"),
  [
    ("model.layers.", "num_hidden_layers"),
    ("transformer.h.", "n_layer"),
    ("h.", "n_layer"),
    ("gpt_neox.layers.", "num_hidden_layers"),
    ("bert.encoder.layer.", "num_hidden_layers"),
    ("encoder.block.", "num_layers"),
  ],
)
def test_layers_are_found_by_their_numbers(prefix, key):
  names = ["embed.weight", *stack(prefix, 12), "norm.weight"]
  found = layers.layout(names, {key: 12})
  assert [t.prefix for t in found.towers] == [prefix]
  assert len(found.towers[0].layers) == 12 and found.towers[0].layers[11] == ("w", "b")
  assert found.towers[0].name(3, "w") == f"{prefix}3.w"
  assert found.loose == ("embed.weight", "norm.weight")


def test_numbered_tensors_that_are_no_layers_are_loose():
  experts = [f"model.layers.{i}.experts.{j}.w" for i in range(2) for j in range(3)]
  names = [*experts, "projector.0.weight", "projector.2.weight", "score.0.weight"]
  found = layers.layout(names, {"num_hidden_layers": 2})
  assert [len(t.layers) for t in found.towers] == [2]
  assert found.loose == ("projector.0.weight", "projector.2.weight", "score.0.weight")
  assert [t.prefix for t in layers.layout(names, {}).towers] == ["model.layers."]
  assert layers.layout(["a", "b"], {}).towers == ()


def test_several_towers():
  names = stack("visual.blocks.", 3) + stack("model.layers.", 2, "a", "b", "c", "d")
  config = {"num_hidden_layers": 2, "vision_config": {"depth": 3}}
  assert [t.prefix for t in layers.layout(names, config).towers] == [
    "model.layers.", "visual.blocks.",
  ]  # fmt: skip


def test_what_comes_early():
  for name in ("transformer.wte.weight", "wpe.weight", "bert.embeddings.LayerNorm.bias"):
    assert layers.early(name), name
  for name in ("model.norm.weight", "lm_head.weight", "embed_out.weight", "score.weight"):
    assert not layers.early(name), name


def test_the_config_follows_its_layers():
  config = {
    "num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [1],
    "eos_token_id": [1, 2, 3], "text_config": {"num_hidden_layers": 7},
  }  # fmt: skip
  made = layers.update(config, "model.layers.", 3, [0, 1, 1, 2])
  assert made == config | {
    "num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"], "mlp_only_layers": [1, 2],
  }  # fmt: skip
  assert config["num_hidden_layers"] == 3
  assert layers.update(config, "model.layers.", 3, [0, 1, 2]) == config


@pytest.mark.parametrize(
  ("config", "prefix", "path"),
  [
    ({"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 2}}, "vision_tower.l.", "v"),
    ({"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 2}}, "model.layers.", "t"),
    ({"encoder_layers": 2, "decoder_layers": 2}, "model.decoder.layers.", "decoder_layers"),
    ({"encoder_layers": 2, "decoder_layers": 2}, "model.encoder.layers.", "encoder_layers"),
  ],
)
def test_the_right_count_is_changed(config, prefix, path):
  made = layers.update(config, prefix, 2, [0])
  if path == "v":
    assert made == {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 1}}
  elif path == "t":
    assert made == {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 2}}
  else:
    assert made[path] == 1 and sum(made.values()) == 3


def test_a_config_that_counts_no_layers_cannot_follow():
  with pytest.raises(ValueError, match=re.escape("no key that counts the 2 layers of 'h.'")):
    layers.update({"depth_of_field": 2}, "h.", 2, [0])
  with pytest.raises(ValueError, match="layer_types has no entry"):
    layers.update({"n_layer": 2, "layer_types": ["a", "b"]}, "h.", 2, [0, 1, 2])
