# SPDX-License-Identifier: Apache-2.0
"""Names and configs both ways, for every family, without torch."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.models import hf, hf_families

SMALL = {
  "vocab_size": 11,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "bos_token_id": 1,
  "initializer_range": 0.02,
}
GPT = {"vocab_size": 11, "n_embd": 8, "n_layer": 3, "n_head": 2, "rotary_dim": 4}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
OPENELM = {
  "model_dim": 8,
  "vocab_size": 11,
  "num_transformer_layers": 3,
  "head_dim": 4,
  "num_query_heads": [2, 4, 4],
  "num_kv_heads": [1, 2, 2],
  "ffn_multipliers": [0.5, 1.0, 4.0],
  "ffn_dim_divisor": 4,
}
GQA = {**SMALL, "num_key_value_heads": 1, "head_dim": 4}
CONFIGS = {
  "bert": {**SMALL, "architectures": ["BertForMaskedLM"], "type_vocab_size": 2},
  "gemma": {**GQA, "hidden_act": "gelu"},
  "gemma2": GQA,
  "gemma3_text": {**GQA, "num_hidden_layers": 7, "sliding_window": 4},
  "gpt2": GPT,
  "gpt_neox": {**SMALL, "rotary_pct": 0.5, "rotary_emb_base": 5000},
  "gptj": GPT,
  "llama": {**GQA, "rope_theta": 5e5, "rope_scaling": LLAMA3},
  "mistral": {**GQA, "sliding_window": 4},
  "mixtral": {**GQA, "num_local_experts": 3},
  "olmo2": SMALL,
  "openelm": OPENELM,
  "opt": {**SMALL, "ffn_dim": 12, "do_layer_norm_before": False},
  "qwen2": {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
  "qwen3": GQA,
  "qwen3_moe": {**GQA, "moe_intermediate_size": 6, "num_experts": 3, "num_experts_per_tok": 2},
}


def config_of(family: str) -> dict:
  return {"model_type": family, **CONFIGS[family]}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
  return request.param


def test_every_family_is_here():
  assert set(CONFIGS) == set(hf_families.FAMILIES)


def test_configs_come_back_word_for_word(family: str):
  config = config_of(family)
  spec = hf.from_config(config)
  assert hf.to_config(spec) == config
  assert list(hf.to_config(spec)) == list(config)
  assert hf.unsupported(spec) == ()


def test_a_config_made_from_the_spec_alone_says_the_same(family: str):
  spec = hf.from_config(config_of(family))
  bare = hf.to_config(dataclasses.replace(spec, extra=()))
  assert hf.from_config(bare) == spec
  assert "treesurgeon" not in bare


def test_fewer_layers_reach_the_config(family: str):
  spec = hf.from_config(config_of(family)).take_layers([2, 0])
  config = hf.to_config(spec)
  assert hf.from_config(config) == spec
  assert hf.unsupported(spec) == ()
  assert hf.to_config(hf.from_config(config)) == config


def test_what_a_family_cannot_say_is_kept_and_named(family: str):
  spec = hf.from_config(config_of(family))
  odd = dataclasses.replace(spec, d_ff=tuple(range(2, 2 + spec.num_layers)), final_softcap=7.0)
  config = hf.to_config(odd)
  assert hf.from_config(config) == odd
  named = set(hf.unsupported(odd))
  gemma = family in ("gemma2", "gemma3_text")
  assert ("final_softcap" in named) != gemma
  assert ("d_ff" in named) == (family != "openelm")
  assert hf.to_config(hf.from_config(config)) == config
  # Back to the original, nothing of it is left.
  undone = dataclasses.replace(
    hf.from_config(config), d_ff=spec.d_ff, final_softcap=spec.final_softcap
  )
  assert hf.from_config(hf.to_config(undone)) == spec
  assert "treesurgeon" not in hf.to_config(undone)


def test_new_rope_spelling_is_read_and_kept():
  old = hf.from_config(config_of("llama"))
  config = {k: v for k, v in config_of("llama").items() if not k.startswith("rope")}
  config["rope_parameters"] = {"rope_theta": 5e5, **LLAMA3}
  spec = hf.from_config(config)
  assert spec == old and spec.rope_original == 32
  assert hf.to_config(spec) == config
  faster = hf.to_config(dataclasses.replace(spec, rope_factor=2.0))
  assert faster["rope_parameters"]["factor"] == 2.0 and "rope_theta" not in faster


def test_gemma3_alternates():
  spec = hf.from_config(config_of("gemma3_text"))
  assert spec.window == (4, 4, 4, 4, 4, 0, 4)
  assert spec.rope_theta == (1e4,) * 5 + (1e6, 1e4)
  scaled = config_of("gemma3_text") | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
  spec = hf.from_config(scaled)
  assert spec.rope_factor == (1.0,) * 5 + (8.0, 1.0)
  assert hf.to_config(spec) == scaled
  cut = hf.to_config(spec.take_layers([5, 6]))
  assert cut["layer_types"] == ["full_attention", "sliding_attention"]
  assert hf.from_config(cut) == spec.take_layers([5, 6])


def test_both_spellings_of_the_number_of_experts_are_read_and_kept():
  old = config_of("qwen3_moe")
  new = {**old, "num_local_experts": old["num_experts"]}
  del new["num_experts"]
  spec = hf.from_config(new)
  assert spec == hf.from_config(old) and spec.num_experts == 3
  assert hf.to_config(spec) == new
  fewer = hf.to_config(dataclasses.replace(spec, num_experts=2))
  assert fewer["num_local_experts"] == 2 and "num_experts" not in fewer
  names = [e.name for e in hf.entries(spec) if e.address[0].startswith("layers/1/mlp/")]
  assert names[0] == "model.layers.1.mlp.gate.weight"
  assert names[-1] == "model.layers.1.mlp.experts.2.down_proj.weight" and len(names) == 10


def test_our_own_family_keeps_every_field():
  spec = models.Spec(
    vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=(8, 6), window=(2, 0), tied=True
  )
  config = hf.to_config(spec)
  assert hf.from_config(config) == spec
  assert [e.name for e in hf.entries(spec)][-1] == "final_norm.scale"


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"model_type": "mamba"}, r"model_type 'mamba' is not supported; valid: bert, gemma"),
    ({}, r"model_type None is not supported"),
    ({"model_type": "gpt2"}, r"config.json of a gpt2 model lacks 'vocab_size'"),
    (
      {**config_of("llama"), "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
      r"rope type 'yarn' of a llama model is not supported; valid: default, linear, llama3",
    ),
    ({**config_of("llama"), "rope_scaling": {"type": "linear"}}, r"'linear' needs a 'factor'"),
    (
      {**config_of("llama"), "rope_scaling": {"type": "llama3", "factor": 2.0}},
      r"'llama3' needs 'low_freq_factor'",
    ),
    ({**config_of("llama"), "hidden_act": "relu2"}, r"activation 'relu2' is not supported"),
    (
      {**config_of("gpt2"), "scale_attn_by_inverse_layer_idx": True},
      r"scale_attn_by_inverse_layer_idx=True of a gpt2 model is not supported; valid: False",
    ),
    ({**config_of("bert"), "is_decoder": True}, r"is_decoder=True"),
    ({**config_of("opt"), "word_embed_proj_dim": 4}, r"word_embed_proj_dim=4 .* valid: 8"),
    ({**config_of("openelm"), "num_kv_heads": 2}, r"num_kv_heads of an openelm .* list 3 layers"),
    (
      {**config_of("gemma2"), "layer_types": ["chunked_attention"] * 3},
      r"layer_types holds 'chunked_attention'; valid: full_attention, sliding_attention",
    ),
    ({**config_of("qwen3_moe"), "decoder_sparse_step": 2}, r"decoder_sparse_step=2 .* valid: 1"),
    ({**config_of("qwen3_moe"), "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] of a qwen3_moe"),
    ({**config_of("qwen3_moe"), "use_sliding_window": True}, r"use_sliding_window=True"),
    ({**config_of("llama"), "treesurgeon": {"depth": 2}}, r"holds the unknown field 'depth'"),
    ({"model_type": "treesurgeon"}, r"lacks treesurgeon.vocab_size"),
  ],
)
def test_configs_that_are_refused(config: dict, message: str):
  with pytest.raises(ValueError, match=message):
    hf.from_config(config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tensors_and_leaves_are_inverse(family: str, dtype: type):
  spec = hf.from_config(config_of(family))
  rng = np.random.default_rng(0)
  leaves, names = {}, set()
  for entry in hf.entries(spec):
    assert entry.name not in names
    names.add(entry.name)
    tensor = rng.normal(size=hf.shape(spec, entry)).astype(dtype)
    part = hf.to_leaves(spec, entry, tensor)
    assert {a: x.shape for a, x in part.items()} == {
      a: hf.address_shape(spec, a) for a in entry.address
    }
    assert not set(part) & set(leaves)
    leaves.update(part)
    back = hf.to_tensor(spec, entry, leaves)
    np.testing.assert_array_equal(back, tensor, strict=True)
  assert set(leaves) == set(models.addresses(spec))
  assert not any(hf.ignored(n) for n in names)


def test_plain_linears_are_views():
  spec = hf.from_config(config_of("llama"))
  entry = next(e for e in hf.entries(spec) if e.kind == "transpose")
  tensor = np.zeros(hf.shape(spec, entry), np.float32)
  (leaf,) = hf.to_leaves(spec, entry, tensor).values()
  assert np.shares_memory(leaf, tensor)
  assert np.shares_memory(hf.to_tensor(spec, entry, {entry.address[0]: leaf}), tensor)


def test_neox_interleaves_by_head():
  spec = hf.from_config(config_of("gpt_neox"))
  entry = next(e for e in hf.entries(spec) if e.name.endswith("0.attention.query_key_value.bias"))
  bias = np.arange(24, dtype=np.float32)
  leaves = hf.to_leaves(spec, entry, bias)
  assert leaves["layers/0/attn/q/bias"].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
  assert leaves["layers/0/attn/v/bias"].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]


def test_names_settle_prefix_aliases_and_heads():
  spec = hf.from_config(config_of("gpt2"))
  bare = {e.name.removeprefix("transformer.") for e in hf.entries(spec)}
  refined = hf.refine(spec, bare)
  assert {e.name for e in hf.entries(refined)} == bare
  assert refined == spec
  repeated = [*bare, "lm_head.weight"]
  alias = hf.entries(spec, repeated)[-1]
  assert alias == hf.Entry("lm_head.weight", ("embed/tokens/embedding",), "alias")
  table = np.ones(hf.shape(spec, alias), np.float32)
  assert hf.to_leaves(spec, alias, table) == {}
  np.testing.assert_array_equal(hf.to_tensor(spec, alias, {alias.address[0]: table}), table)
  with pytest.raises(ValueError, match="no token embedding of a gpt2 checkpoint: expected one of"):
    hf.refine(spec, ["model.embed_tokens.weight"])


def test_an_old_bert_file_is_understood():
  """The first BERT files hold both heads and spell layer norms gamma and beta."""
  spec = hf.from_config(config_of("bert"))
  both = dataclasses.replace(spec, pooler=True)
  names = {
    e.name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
      "LayerNorm.bias", "LayerNorm.beta"
    )
    for e in hf.entries(both)
  } | {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
  assert {e.name for e in hf.entries(spec, names)} == names
  assert hf.refine(spec, names).pooler
  assert hf.to_config(hf.refine(spec, names)) == config_of("bert")
  plain = {e.name for e in hf.entries(spec) if not e.name.startswith("cls.")}
  assert not hf.refine(spec, plain).mlm_head


@pytest.mark.parametrize(
  ("name", "drop"),
  [
    ("transformer.h.0.attn.bias", True),
    ("h.11.attn.masked_bias", True),
    ("gpt_neox.layers.0.attention.bias", True),
    ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", True),
    ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
    ("bert.embeddings.position_ids", True),
    ("cls.seq_relationship.weight", True),
    ("transformer.h.0.attn.c_attn.bias", False),
    ("gpt_neox.layers.0.attention.dense.bias", False),
    ("model.layers.0.self_attn.q_proj.bias", False),
  ],
)
def test_buffers_are_ignored(name: str, drop: bool):
  assert hf.ignored(name) == drop


def test_wrong_shapes_are_named():
  spec = hf.from_config(config_of("llama"))
  entry = hf.entries(spec)[0]
  with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(3, 2\); .* \(11, 8\)"):
    hf.to_leaves(spec, entry, np.zeros((3, 2), np.float32))
  with pytest.raises(ValueError, match=r"leaf embed/tokens/embedding has shape \(3, 2\)"):
    hf.to_tensor(spec, entry, {entry.address[0]: np.zeros((3, 2), np.float32)})
  with pytest.raises(ValueError, match="needs the leaf embed/tokens/embedding, which is missing"):
    hf.to_tensor(spec, entry, {})
  with pytest.raises(ValueError, match="'embed/x' is not a leaf of this llama model"):
    hf.address_shape(spec, "embed/x")
