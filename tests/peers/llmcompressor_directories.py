# SPDX-License-Identifier: Apache-2.0
"""Quantize a tiny model with llm-compressor, and save the directories and what they compute.

Runs in llm-compressor's own environment (see `llmcompressor_codes.py`):

  python tests/peers/llmcompressor_directories.py tests/peers/llmcompressor_directories.npz

wrote the committed file, with llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers
5.17.0 and torch 2.13.0 on a CPU. `quantized_test.py` runs it again where the environment is there
and reads the file otherwise. The file holds other files, by name, as bytes.
"""

import pathlib
import sys
import tempfile

import numpy as np

SIZES = {
  "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
  "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
GROUP = {"type": "int", "strategy": "group", "group_size": 32}
SCHEMES = {
  "w4": {"weights": {"num_bits": 4, **GROUP}},
  "w3_asymmetric": {"weights": {"num_bits": 3, "symmetric": False, **GROUP}},
  "w8a8": {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
  },
  "fp8": {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
  },
}
TOKENS = np.arange(16).reshape(2, 8) * 7 % 48


def write(name, folder):
  """Quantizes, saves, and returns the logits that transformers computes of what was saved."""
  import tokenizers
  import torch
  import transformers
  from llmcompressor import oneshot
  from llmcompressor.modifiers.quantization import QuantizationModifier

  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(0.1 * torch.randn(p.shape) + (p.ndim == 1))
  dense = folder.with_name("dense")  # llm-compressor wants the model to have a place
  model.save_pretrained(dense)
  model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
  group = {"targets": ["Linear"], **SCHEMES[name]}
  recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
  oneshot(
    model=model, recipe=recipe,
    tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=words),
  )  # fmt: skip
  model.save_pretrained(folder, save_compressed=True)
  back = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    return back(torch.tensor(TOKENS)).logits.numpy()


def main(path):
  """Writes every scheme's directory and logits to one compressed file."""
  found = {}
  with tempfile.TemporaryDirectory() as root:
    for name in SCHEMES:
      folder = pathlib.Path(root, name)
      found[f"{name}/logits"] = write(name, folder)
      for file in ("config.json", "model.safetensors"):
        found[f"{name}/{file}"] = np.frombuffer((folder / file).read_bytes(), np.uint8)
  np.savez_compressed(path, **found)


if __name__ == "__main__":
  main(sys.argv[1])
