# SPDX-License-Identifier: Apache-2.0
"""Directories that transformers wrote load here, and directories we wrote load there."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from treesurgeon import io, models

transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
CASES = {
  "Llama": {**SIZES, "intermediate_size": 48},
  "Qwen2": {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
  },
  "GPT2": GPT,
  "GPTNeoX": {**SIZES, "intermediate_size": 48},
}


@pytest.mark.parametrize("shard", [5e9, 2e4])
@pytest.mark.parametrize("name", CASES)
def test_both_ways(tmp_path, name, shard):
  torch.manual_seed(0)
  config = getattr(transformers, f"{name}Config")(**CASES[name])
  theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
  theirs.save_pretrained(tmp_path / "theirs")
  ours = io.load(tmp_path / "theirs")
  out = io.save(ours, tmp_path / "ours", max_shard_bytes=shard, tokenizer_from=tmp_path / "theirs")
  assert (out / "model.safetensors.index.json").exists() == (shard < 5e9)
  back, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
  assert not any(report.values()), report
  tokens = np.arange(12).reshape(2, 6)
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits
    assert torch.equal(back.eval()(torch.tensor(tokens)).logits, want)
  got = models.forward(ours.spec, ours.params, jnp.asarray(tokens)).logits
  np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_half_precision_is_kept_bit_for_bit(tmp_path):
  config = transformers.LlamaConfig(**CASES["Llama"])
  theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
  theirs.save_pretrained(tmp_path / "theirs")
  out = io.save(io.load(tmp_path / "theirs"), tmp_path / "ours")
  back = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert back.dtype == torch.bfloat16
  for (n, a), (m, b) in zip(theirs.named_parameters(), back.named_parameters(), strict=True):
    assert n == m and torch.equal(a, b)
