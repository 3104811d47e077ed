# SPDX-License-Identifier: Apache-2.0
"""Where Hugging Face checkpoints keep each leaf: one table of names a family.

A row is (tensor name, addresses, kind). `{p}` is the backbone's prefix, `{i}` the layer index,
`{e}` the expert: each has tensors of its own (`transformers` 5 fuses them in memory only). `*` at
the end stands for `weight` and, where the spec has one, `bias`. Rows whose addresses the spec does
not have are left out, so that one table covers a family's variants.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Family(NamedTuple):
  """Name the tensors of a family.

  Attributes:
    prefixes: prefixes of the backbone's names, the usual one first.
    before: rows in front of the layers.
    layer: rows of every layer.
    after: rows behind the layers.
    aliases: (name, address) of tensors that repeat a tied leaf in some files.
  """

  prefixes: tuple[str, ...]
  before: tuple[tuple[str, str, str], ...]
  layer: tuple[tuple[str, str, str], ...]
  after: tuple[tuple[str, str, str], ...]
  aliases: tuple[tuple[str, str], ...] = ()


_LLAMA = Family(
  prefixes=("model.", ""),
  before=(("{p}embed_tokens.weight", "embed/tokens/embedding", "copy"),),
  layer=(
    ("{p}layers.{i}.self_attn.q_proj.*", "attn/q", "linear"),
    ("{p}layers.{i}.self_attn.k_proj.*", "attn/k", "linear"),
    ("{p}layers.{i}.self_attn.v_proj.*", "attn/v", "linear"),
    ("{p}layers.{i}.self_attn.o_proj.*", "attn/o", "linear"),
    ("{p}layers.{i}.self_attn.q_norm.weight", "attn/q_norm/scale", "copy"),
    ("{p}layers.{i}.self_attn.k_norm.weight", "attn/k_norm/scale", "copy"),
    ("{p}layers.{i}.mlp.gate_proj.*", "mlp/gate", "linear"),
    ("{p}layers.{i}.mlp.up_proj.*", "mlp/up", "linear"),
    ("{p}layers.{i}.mlp.down_proj.*", "mlp/down", "linear"),
    ("{p}layers.{i}.input_layernorm.*", "attn_norm", "norm"),
    ("{p}layers.{i}.post_attention_layernorm.*", "mlp_norm", "norm"),
  ),
  after=(
    ("{p}norm.*", "final_norm", "norm"),
    ("lm_head.*", "lm_head", "linear"),
  ),
  aliases=(("lm_head.weight", "embed/tokens/embedding"),),
)

_QWEN_MOE = _LLAMA._replace(
  layer=(
    *_LLAMA.layer[:6],
    ("{p}layers.{i}.mlp.gate.weight", "mlp/router/kernel", "transpose"),
    ("{p}layers.{i}.mlp.experts.{e}.gate_proj.*", "mlp/experts/{e}/gate", "linear"),
    ("{p}layers.{i}.mlp.experts.{e}.up_proj.*", "mlp/experts/{e}/up", "linear"),
    ("{p}layers.{i}.mlp.experts.{e}.down_proj.*", "mlp/experts/{e}/down", "linear"),
    *_LLAMA.layer[-2:],
  )
)

_MIXTRAL = _LLAMA._replace(
  layer=(
    *_LLAMA.layer[:4],
    ("{p}layers.{i}.block_sparse_moe.gate.weight", "mlp/router/kernel", "transpose"),
    ("{p}layers.{i}.block_sparse_moe.experts.{e}.w1.*", "mlp/experts/{e}/gate", "linear"),
    ("{p}layers.{i}.block_sparse_moe.experts.{e}.w3.*", "mlp/experts/{e}/up", "linear"),
    ("{p}layers.{i}.block_sparse_moe.experts.{e}.w2.*", "mlp/experts/{e}/down", "linear"),
    *_LLAMA.layer[-2:],
  )
)

# The same names with other meanings: here the norm called post_attention follows the branch.
_SANDWICH = _LLAMA._replace(
  layer=(
    *_LLAMA.layer[:-1],
    ("{p}layers.{i}.post_attention_layernorm.*", "post_attn_norm", "norm"),
    ("{p}layers.{i}.pre_feedforward_layernorm.*", "mlp_norm", "norm"),
    ("{p}layers.{i}.post_feedforward_layernorm.*", "post_mlp_norm", "norm"),
  )
)

_GPT2 = Family(
  prefixes=("transformer.", ""),
  before=(
    ("{p}wte.weight", "embed/tokens/embedding", "copy"),
    ("{p}wpe.weight", "embed/positions/embedding", "copy"),
  ),
  layer=(
    ("{p}h.{i}.ln_1.*", "attn_norm", "norm"),
    ("{p}h.{i}.attn.c_attn.*", "attn/q attn/k attn/v", "split"),
    ("{p}h.{i}.attn.c_proj.*", "attn/o", "conv"),
    ("{p}h.{i}.ln_2.*", "mlp_norm", "norm"),
    ("{p}h.{i}.mlp.c_fc.*", "mlp/up", "conv"),
    ("{p}h.{i}.mlp.c_proj.*", "mlp/down", "conv"),
  ),
  after=(
    ("{p}ln_f.*", "final_norm", "norm"),
    ("lm_head.*", "lm_head", "linear"),
  ),
  aliases=(("lm_head.weight", "embed/tokens/embedding"),),
)

_GPTJ = _GPT2._replace(
  before=(("{p}wte.weight", "embed/tokens/embedding", "copy"),),
  layer=(
    ("{p}h.{i}.ln_1.*", "attn_norm", "norm"),
    ("{p}h.{i}.attn.k_proj.*", "attn/k", "linear"),
    ("{p}h.{i}.attn.v_proj.*", "attn/v", "linear"),
    ("{p}h.{i}.attn.q_proj.*", "attn/q", "linear"),
    ("{p}h.{i}.attn.out_proj.*", "attn/o", "linear"),
    ("{p}h.{i}.mlp.fc_in.*", "mlp/up", "linear"),
    ("{p}h.{i}.mlp.fc_out.*", "mlp/down", "linear"),
  ),
)

_NEOX = Family(
  prefixes=("gpt_neox.", ""),
  before=(("{p}embed_in.weight", "embed/tokens/embedding", "copy"),),
  layer=(
    ("{p}layers.{i}.input_layernorm.*", "attn_norm", "norm"),
    ("{p}layers.{i}.post_attention_layernorm.*", "mlp_norm", "norm"),
    ("{p}layers.{i}.attention.query_key_value.*", "attn/q attn/k attn/v", "interleave"),
    ("{p}layers.{i}.attention.dense.*", "attn/o", "linear"),
    ("{p}layers.{i}.mlp.dense_h_to_4h.*", "mlp/up", "linear"),
    ("{p}layers.{i}.mlp.dense_4h_to_h.*", "mlp/down", "linear"),
  ),
  after=(
    ("{p}final_layer_norm.*", "final_norm", "norm"),
    ("embed_out.*", "lm_head", "linear"),
  ),
  aliases=(("embed_out.weight", "embed/tokens/embedding"),),
)

_OPT = Family(
  prefixes=("model.decoder.", "decoder.", ""),
  before=(
    ("{p}embed_tokens.weight", "embed/tokens/embedding", "copy"),
    ("{p}embed_positions.weight", "embed/positions/embedding", "copy"),
  ),
  layer=(
    ("{p}layers.{i}.self_attn.k_proj.*", "attn/k", "linear"),
    ("{p}layers.{i}.self_attn.v_proj.*", "attn/v", "linear"),
    ("{p}layers.{i}.self_attn.q_proj.*", "attn/q", "linear"),
    ("{p}layers.{i}.self_attn.out_proj.*", "attn/o", "linear"),
    # Which of the two places a norm has depends on the spec (do_layer_norm_before).
    ("{p}layers.{i}.self_attn_layer_norm.*", "attn_norm", "norm"),
    ("{p}layers.{i}.self_attn_layer_norm.*", "post_attn_norm", "norm"),
    ("{p}layers.{i}.fc1.*", "mlp/up", "linear"),
    ("{p}layers.{i}.fc2.*", "mlp/down", "linear"),
    ("{p}layers.{i}.final_layer_norm.*", "mlp_norm", "norm"),
    ("{p}layers.{i}.final_layer_norm.*", "post_mlp_norm", "norm"),
  ),
  after=(
    ("{p}final_layer_norm.*", "final_norm", "norm"),
    ("lm_head.*", "lm_head", "linear"),
  ),
  aliases=(("lm_head.weight", "embed/tokens/embedding"),),
)

_OPENELM = Family(
  prefixes=("transformer.", ""),
  before=(("{p}token_embeddings.weight", "embed/tokens/embedding", "copy"),),
  layer=(
    ("{p}layers.{i}.attn.qkv_proj.*", "attn/q attn/k attn/v", "rows"),
    ("{p}layers.{i}.attn.q_norm.weight", "attn/q_norm/scale", "copy"),
    ("{p}layers.{i}.attn.k_norm.weight", "attn/k_norm/scale", "copy"),
    ("{p}layers.{i}.attn.out_proj.*", "attn/o", "linear"),
    ("{p}layers.{i}.ffn.proj_1.*", "mlp/gate mlp/up", "rows"),
    ("{p}layers.{i}.ffn.proj_2.*", "mlp/down", "linear"),
    ("{p}layers.{i}.ffn_norm.*", "mlp_norm", "norm"),
    ("{p}layers.{i}.attn_norm.*", "attn_norm", "norm"),
  ),
  after=(
    ("{p}norm.*", "final_norm", "norm"),
    ("lm_head.*", "lm_head", "linear"),
  ),
  aliases=(("lm_head.weight", "embed/tokens/embedding"),),
)

_BERT = Family(
  prefixes=("bert.", ""),
  before=(
    ("{p}embeddings.word_embeddings.weight", "embed/tokens/embedding", "copy"),
    ("{p}embeddings.position_embeddings.weight", "embed/positions/embedding", "copy"),
    ("{p}embeddings.token_type_embeddings.weight", "embed/types/embedding", "copy"),
    ("{p}embeddings.LayerNorm.*", "embed/norm", "norm"),
  ),
  layer=(
    ("{p}encoder.layer.{i}.attention.self.query.*", "attn/q", "linear"),
    ("{p}encoder.layer.{i}.attention.self.key.*", "attn/k", "linear"),
    ("{p}encoder.layer.{i}.attention.self.value.*", "attn/v", "linear"),
    ("{p}encoder.layer.{i}.attention.output.dense.*", "attn/o", "linear"),
    ("{p}encoder.layer.{i}.attention.output.LayerNorm.*", "post_attn_norm", "norm"),
    ("{p}encoder.layer.{i}.intermediate.dense.*", "mlp/up", "linear"),
    ("{p}encoder.layer.{i}.output.dense.*", "mlp/down", "linear"),
    ("{p}encoder.layer.{i}.output.LayerNorm.*", "post_mlp_norm", "norm"),
  ),
  after=(
    ("{p}pooler.dense.*", "pooler", "linear"),
    ("cls.predictions.bias", "lm_head/bias", "copy"),
    ("cls.predictions.transform.dense.*", "mlm_head/dense", "linear"),
    ("cls.predictions.transform.LayerNorm.*", "mlm_head/norm", "norm"),
    ("cls.predictions.decoder.weight", "lm_head/kernel", "transpose"),
  ),
  aliases=(
    ("cls.predictions.decoder.weight", "embed/tokens/embedding"),
    ("cls.predictions.decoder.bias", "lm_head/bias"),
  ),
)

FAMILIES = {
  "bert": _BERT,
  "gemma": _LLAMA,
  "gemma2": _SANDWICH,
  "gemma3_text": _SANDWICH,
  "gpt2": _GPT2,
  "gpt_neox": _NEOX,
  "gptj": _GPTJ,
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "mixtral": _MIXTRAL,
  "olmo2": _SANDWICH,
  "openelm": _OPENELM,
  "opt": _OPT,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA,
  "qwen3_moe": _QWEN_MOE,
}

# Buffers that old versions saved, and the next-sentence head, which nothing here uses.
_IGNORED = re.compile(
  r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids"
  r"|h\.\d+\.attn\.(bias|masked_bias|embed_positions)"
  r"|attention\.(bias|masked_bias)|cls\.seq_relationship\.(weight|bias))"
)


def ignored(name: str) -> bool:
  """Tell whether a tensor is a buffer that carries no learned weight of the model.

  Args:
    name: tensor name.

  Returns:
    True for causal masks, rotary tables, position ids, and BERT's next-sentence head.

  Example:
    >>> from treesurgeon.models import hf
    >>> hf.ignored("transformer.h.0.attn.bias"), hf.ignored("transformer.h.0.attn.c_attn.bias")
    (True, False)
  """
  return _IGNORED.fullmatch(name) is not None
