# SPDX-License-Identifier: Apache-2.0
"""GGUF files that we write give transformers our logits, and hold our codes."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from treesurgeon import io, models, registry
from treesurgeon.io import gguf as ours
from treesurgeon.run import drivers

transformers.logging.set_verbosity_error()
SIZES = {
  "vocab_size": 64, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16))
CASES = {
  "dense": ("Llama", None, {"F32"}, 1e-4),
  "q4_0": ("Llama", "rtn(bits=4, group_size=32)", {"F32", "Q4_0"}, 0.005),
  "q8_0_channel": ("Qwen2", "rtn(bits=8, group_size=-1)", {"F32", "Q8_0"}, 0.005),
  "q4_k": ("Llama", "rtn(bits=4, group_size=32, symmetric=False)", {"F32", "Q4_K", "Q8_0"}, 0.5),
  "other": ("Llama", "rtn(bits=3, group_size=32)", {"F32", "Q8_0"}, 0.05),
}


def source(family, folder):
  torch.manual_seed(0)
  config = getattr(transformers, f"{family}Config")(**SIZES)
  model = getattr(transformers, f"{family}ForCausalLM")(config)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_((0.1 if p.ndim > 1 else 0.3) * torch.randn(p.shape) + 0.5 * (p.ndim == 1))
  model.save_pretrained(folder)
  return io.load(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_we_do(tmp_path, name):
  family, transform, kinds, tolerance = CASES[name]
  model = source(family, tmp_path / "theirs")
  if transform:
    model = drivers.run(registry.parse(f"compress.quantize.{transform}"), model)
  report = ours.save(model, tmp_path / "out")
  held = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / ours.FILE).tensors}
  assert {t.tensor_type.name for t in held.values()} == kinds
  assert sum(t.n_bytes for t in held.values()) == report.nbytes
  again = any("quantized to Q8_0 by gguf" in n for n in report.notes)
  assert again == (name in ("other", "q4_k"))  # 256 does not divide the rows of mlp/down
  if name == "q4_k":
    up = held["blk.0.ffn_up.weight"]
    dense = gguf.quants.dequantize(up.data, up.tensor_type).T
    leaf = model.leaf("layers/0/mlp/up/kernel")
    step = np.repeat(np.asarray(leaf.scales), 32, 0)
    # Half a step of the codes, and half of the 6-bit steps of scale and minimum (15 codes of each).
    assert (np.abs(dense - leaf.dense()) < 0.8 * step.max()).all()
    assert np.abs(dense - leaf.dense()).mean() < 0.15 * step.mean()
  elif transform and name != "other":
    up = held["blk.0.ffn_up.weight"]
    dense = gguf.quants.dequantize(up.data, up.tensor_type)
    leaf = model.leaf("layers/0/mlp/up/kernel")
    half = dataclasses.replace(leaf, scales=leaf.scales.astype(jnp.float16))
    np.testing.assert_array_equal(dense.T, half.dense())
  want = np.asarray(models.forward(model.spec, model.params, jnp.asarray(TOKENS)).logits)
  back = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", gguf_file=ours.FILE, dtype=torch.float32
  )
  with torch.no_grad():
    got = back(torch.tensor(TOKENS)).logits.numpy()
  assert want.std() > 0.2
  np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


def test_what_ggml_lacks_is_refused(tmp_path):
  model = source("Llama", tmp_path / "theirs")
  other = dataclasses.replace(model.spec, family="gpt_neox")
  with pytest.raises(
    ValueError, match="'gpt_neox' is not supported; llama, mistral|cannot express"
  ):
    ours.save(model.replace(spec=other), tmp_path / "out")
  scaled = dataclasses.replace(model.spec, rope_scaling="linear", rope_factor=4.0)
  with pytest.raises(ValueError, match="rope_scaling='linear' is not written"):
    ours.save(model.replace(spec=scaled), tmp_path / "out")
  assert not (tmp_path / "out").exists()
