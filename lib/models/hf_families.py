# SPDX-License-Identifier: Apache-2.0
"""How each family's `config.json` spells the switches of a spec.

`keys` maps spec fields to config keys, `defaults` holds what a file may leave out, `fixed` what
the family always is, `require` the values of switches that are not modelled. The rest (rotary
parameters, windows, derived scales) is computed in `hf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
  """Describe the config of a family.

  Attributes:
    architecture: class that `transformers` instantiates.
    keys: spec field to config key.
    defaults: config key to the value it has when absent.
    fixed: spec field to value.
    require: config key to the values that are supported, the default first.
    rope: config keys of (theta, rotated fraction), or None.
    layer_types: whether windows are listed layer by layer.
  """

  architecture: str
  keys: Mapping[str, str]
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any]
  require: Mapping[str, tuple[Any, ...]]
  rope: tuple[str, str] | None = None
  layer_types: bool = False


_BASIC = {
  "vocab_size": "vocab_size",
  "d_model": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "d_ff": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "tied": "tie_word_embeddings",
}

_LLAMA = Family(
  architecture="LlamaForCausalLM",
  keys={
    **_BASIC,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
  },
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
  },
  fixed={},
  require={},
  rope=("rope_theta", "partial_rotary_factor"),
)

_NO_MLP_BIAS = {k: v for k, v in _LLAMA.keys.items() if k != "mlp_bias"}
_NO_BIAS = {k: v for k, v in _NO_MLP_BIAS.items() if k not in ("qkv_bias", "o_bias")}

_GEMMA = _LLAMA._replace(
  architecture="GemmaForCausalLM",
  keys=_NO_MLP_BIAS,
  defaults={
    **_LLAMA.defaults,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
  },
  fixed={"norm_plus_one": True},
  require={"use_bidirectional_attention": (None, False)},
)

_GEMMA2 = _GEMMA._replace(
  architecture="Gemma2ForCausalLM",
  keys={
    **_NO_MLP_BIAS,
    "activation": "hidden_activation",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
  },
  defaults={
    **_GEMMA.defaults,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
  },
  fixed={"norm_plus_one": True, "norm_place": "sandwich"},
  layer_types=True,
)

_QWEN2 = _LLAMA._replace(
  architecture="Qwen2ForCausalLM",
  keys={**_NO_BIAS},
  defaults={**_LLAMA.defaults, "sliding_window": 4096, "max_position_embeddings": 32768},
  fixed={"qkv_bias": True},
  layer_types=True,
)

_GPT2 = Family(
  architecture="GPT2LMHeadModel",
  keys={
    "vocab_size": "vocab_size",
    "d_model": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "d_ff": "n_inner",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
    "tied": "tie_word_embeddings",
  },
  defaults={
    "n_inner": None,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
  },
  fixed={
    "norm": "layer",
    "gated": False,
    "positions": "learned",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
  },
  require={
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
  },
)

FAMILIES: Mapping[str, Family] = {
  "bert": Family(
    architecture="BertForMaskedLM",
    keys={
      **_BASIC,
      "norm_eps": "layer_norm_eps",
      "activation": "hidden_act",
      "num_types": "type_vocab_size",
    },
    defaults={
      "max_position_embeddings": 512,
      "layer_norm_eps": 1e-12,
      "hidden_act": "gelu",
      "type_vocab_size": 2,
      "tie_word_embeddings": True,
    },
    fixed={
      "kind": "encoder",
      "positions": "learned",
      "norm": "layer",
      "norm_place": "residual",
      "final_norm": False,
      "embed_norm": True,
      "gated": False,
      "qkv_bias": True,
      "o_bias": True,
      "mlp_bias": True,
    },
    require={
      "is_decoder": (False,),
      "add_cross_attention": (False,),
      "position_embedding_type": ("absolute",),
    },
  ),
  "gemma": _GEMMA,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    defaults={
      **_GEMMA2.defaults,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "max_position_embeddings": 131072,
    },
    fixed={**_GEMMA2.fixed, "qk_norm": "head"},
  ),
  "gpt2": _GPT2,
  "gpt_neox": Family(
    architecture="GPTNeoXForCausalLM",
    keys={
      **_BASIC,
      "norm_eps": "layer_norm_eps",
      "activation": "hidden_act",
      "parallel": "use_parallel_residual",
      "qkv_bias": "attention_bias",
      "o_bias": "attention_bias",
    },
    defaults={
      "max_position_embeddings": 2048,
      "layer_norm_eps": 1e-5,
      "hidden_act": "gelu",
      "use_parallel_residual": True,
      "attention_bias": True,
      "tie_word_embeddings": False,
    },
    fixed={"norm": "layer", "gated": False, "mlp_bias": True},
    require={},
    rope=("rotary_emb_base", "rotary_pct"),
  ),
  "gptj": _GPT2._replace(
    architecture="GPTJForCausalLM",
    keys={**_GPT2.keys, "rope_dim": "rotary_dim"},
    defaults={**_GPT2.defaults, "rotary_dim": 64, "tie_word_embeddings": False},
    fixed={
      "norm": "layer",
      "gated": False,
      "mlp_bias": True,
      "parallel": True,
      "shared_norm": True,
      "rope_interleaved": True,
      "head_bias": True,
    },
    require={},
  ),
  "llama": _LLAMA,
  "mistral": _LLAMA._replace(
    architecture="MistralForCausalLM",
    keys={**_NO_BIAS, "window": "sliding_window"},
    defaults={**_LLAMA.defaults, "sliding_window": 4096, "max_position_embeddings": 131072},
  ),
  "mixtral": _LLAMA._replace(
    architecture="MixtralForCausalLM",
    keys={
      **_NO_BIAS,
      "window": "sliding_window",
      "num_experts": "num_local_experts",
      "experts_per_token": "num_experts_per_tok",
    },
    defaults={
      **_LLAMA.defaults,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131072,
      "sliding_window": None,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
      "rope_theta": 1e6,
    },
  ),
  "olmo2": _LLAMA._replace(
    architecture="Olmo2ForCausalLM",
    keys={k: v for k, v in _NO_MLP_BIAS.items() if k != "head_dim"},
    defaults={**_LLAMA.defaults, "rms_norm_eps": 1e-5},
    fixed={"norm_place": "post", "qk_norm": "full"},
  ),
  "openelm": Family(
    architecture="OpenELMForCausalLM",
    keys={
      "vocab_size": "vocab_size",
      "d_model": "model_dim",
      "num_layers": "num_transformer_layers",
      "num_heads": "num_query_heads",
      "num_kv_heads": "num_kv_heads",
      "head_dim": "head_dim",
      "max_positions": "max_context_length",
      "rope_theta": "rope_freq_constant",
      "activation": "activation_fn_name",
      "gated": "ffn_with_glu",
      "tied": "share_input_output_layers",
    },
    defaults={
      "max_context_length": 2048,
      "rope_freq_constant": 10000,
      "activation_fn_name": "swish",
      "ffn_with_glu": True,
      "share_input_output_layers": True,
      "normalize_qk_projections": True,
      "ffn_dim_divisor": 256,
    },
    fixed={"norm_eps": 1e-6},
    require={"normalization_layer_name": ("rms_norm",)},
  ),
  "opt": Family(
    architecture="OPTForCausalLM",
    keys={
      **{k: v for k, v in _BASIC.items() if k != "d_ff"},
      "d_ff": "ffn_dim",
      "activation": "activation_function",
      "qkv_bias": "enable_bias",
      "o_bias": "enable_bias",
      "mlp_bias": "enable_bias",
    },
    defaults={
      "max_position_embeddings": 2048,
      "activation_function": "relu",
      "enable_bias": True,
      "tie_word_embeddings": True,
    },
    fixed={
      "norm": "layer",
      "norm_eps": 1e-5,
      "gated": False,
      "positions": "learned",
      "position_offset": 2,
    },
    require={"layer_norm_elementwise_affine": (True,)},
  ),
  "qwen2": _QWEN2,
  "qwen3": _QWEN2._replace(
    architecture="Qwen3ForCausalLM",
    keys={**_NO_MLP_BIAS},
    defaults={**_QWEN2.defaults, "head_dim": 128},
    fixed={"qk_norm": "head"},
  ),
  "qwen3_moe": _LLAMA._replace(
    architecture="Qwen3MoeForCausalLM",
    keys={
      **_NO_MLP_BIAS,
      "d_ff": "moe_intermediate_size",
      "num_experts": "num_experts",
      "experts_per_token": "num_experts_per_tok",
      "norm_topk": "norm_topk_prob",
    },
    defaults={
      **_LLAMA.defaults,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "moe_intermediate_size": 768,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "norm_topk_prob": False,
    },
    fixed={"qk_norm": "head"},
    require={
      "decoder_sparse_step": (1,),
      "mlp_only_layers": ([], None),
      "use_sliding_window": (False,),
    },
  ),
}
