# SPDX-License-Identifier: Apache-2.0
"""The spec as a value: equality, layers, and what it refuses."""

import dataclasses

import pytest

from treesurgeon import models

BASE = {"vocab_size": 11, "d_model": 8, "num_layers": 3, "num_heads": 2, "d_ff": 16}


def test_equal_architectures_are_equal_and_hash_alike():
  a = models.Spec(**BASE)
  b = models.Spec(
    **{**BASE, "num_heads": (2, 2, 2), "d_ff": (16,) * 3},
    num_kv_heads=2,
    head_dim=4,
    rope_dim=4,
    window=(0, 0, 0),
    extra=(("bos_token_id", "1"),),
    name_prefix="model.",
  )
  assert a == b and hash(a) == hash(b)
  assert a != dataclasses.replace(a, window=(0, 0, 4))
  assert dataclasses.replace(a, d_ff=(16, 16, 8)).d_ff == (16, 16, 8)


def test_take_layers_rewrites_every_per_layer_field():
  spec = models.Spec(
    **{**BASE, "num_heads": (2, 4, 2), "d_ff": (1, 2, 3)},
    num_kv_heads=(1, 2, 1),
    head_dim=4,
    window=(0, 8, 0),
    rope_theta=(1e4, 1e6, 1e4),
    rope_factor=(1.0, 2.0, 1.0),
  )
  grown = spec.take_layers([1, 1, 0, 2])
  assert grown.num_layers == 4
  assert grown.num_heads == (4, 4, 2, 2)
  assert grown.num_kv_heads == (2, 2, 1, 1)
  assert grown.d_ff == (2, 2, 1, 3)
  assert grown.window == (8, 8, 0, 0)
  assert grown.rope_theta == (1e6, 1e6, 1e4, 1e4)
  assert grown.rope_factor == (2.0, 2.0, 1.0, 1.0)
  assert grown.segments() == ((0, 2), (2, 3), (3, 4))
  assert spec.take_layers([0, 1, 2]) == spec
  assert spec.at(2).d_ff == 3 and spec.at(2).num_layers == 1
  assert spec.take_layers([0, 2]).window == 0
  assert set(models.PER_LAYER) == {
    f.name for f in dataclasses.fields(spec) if isinstance(getattr(spec, f.name), tuple)
  } - {"extra"}


@pytest.mark.parametrize("layers", [[], [3], [0, -1]])
def test_take_layers_refuses(layers: list):
  with pytest.raises(ValueError, match=r"indices in \[0, 3\); got"):
    models.Spec(**BASE).take_layers(layers)


def test_windows_do_not_split_segments():
  spec = models.Spec(**BASE, window=(4, 0, 4), rope_theta=(1e4, 1e6, 1e4))
  assert spec.segments() == ((0, 3),)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 0}, r"Spec.vocab_size must be a positive integer; got 0"),
    ({"num_layers": True}, r"Spec.num_layers must be a positive integer; got True"),
    ({"num_heads": 3}, r"d_model=8 is not a multiple of num_heads=3; give head_dim"),
    ({"num_heads": (2, 4, 2)}, r"head_dim must be given when num_heads differs"),
    ({"num_kv_heads": 4}, r"num_heads=2 is not a multiple of num_kv_heads=4 in layer 0"),
    ({"d_ff": (4, 4)}, r"Spec.d_ff lists 2 layers; num_layers is 3 \(a scalar means all\)"),
    ({"d_ff": (4, 4, 0)}, r"Spec.d_ff must be >= 1; layer 2 has 0"),
    ({"window": -1}, r"Spec.window must be >= 0; layer 0 has -1"),
    ({"rope_theta": 0.0}, r"Spec.rope_theta must be > 0; layer 0 has 0.0"),
    ({"rope_dim": 3}, r"rope_dim=3 must be even and in \[2, head_dim=4\]"),
    ({"norm": "batch"}, r"Spec.norm is 'batch'; valid: rms, layer"),
    ({"activation": "tanh"}, r"Spec.activation is 'tanh'; valid: silu, gelu, gelu_tanh, relu"),
    ({"kind": "both"}, r"Spec.kind is 'both'; valid: decoder, encoder"),
    ({"parallel": True, "norm_place": "post"}, r"parallel needs norm_place='pre'; got 'post'"),
    ({"shared_norm": True}, r"shared_norm needs parallel=True"),
    ({"mlm_head": True}, r"need kind='encoder'"),
    ({"attn_softcap": 0.0}, r"Spec.attn_softcap must be positive or None; got 0.0"),
    ({"num_experts": 2}, r"Spec.experts_per_token must be a positive integer; got 0"),
    ({"num_experts": 2, "experts_per_token": 3}, r"=3 must not exceed num_experts=2"),
    ({"experts_per_token": 1}, r"experts_per_token=1 must not exceed num_experts=0"),
    ({"norm_eps": -1.0}, r"Spec.norm_eps must be >= 0; got -1.0"),
  ],
)
def test_refuses(changes: dict, message: str):
  with pytest.raises(ValueError, match=message):
    models.Spec(**{**BASE, **changes})


def test_per_layer_refuses_other_fields():
  with pytest.raises(ValueError, match="'norm' is not a per-layer field; valid: num_heads"):
    models.Spec(**BASE).per_layer("norm")
