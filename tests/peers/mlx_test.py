# SPDX-License-Identifier: Apache-2.0
"""MLX opens what we export and computes our weights and logits; what mlx-lm quantized opens here.

Logits have a standard deviation of about one; ours and theirs were within 6e-6 of each other. MLX
runs on the CPU here.
"""

import json

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils

from treesurgeon import io, models, registry
from treesurgeon.core import leaves, model
from treesurgeon.io import export
from treesurgeon.models import hf
from treesurgeon.run import drivers

SIZES = {
  "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
  "torch_dtype": "float32",
}  # fmt: skip
EXPERTS = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16))
Q = "compress.quantize."
# name: (family, transform)
CASES = {
  "w4": ("llama", f"{Q}rtn(bits=4, group_size=64)"),
  "w2": ("llama", f"{Q}rtn(bits=2, group_size=32, symmetric=False)"),
  "w3": ("qwen2", f"{Q}rtn(bits=3, group_size=32, symmetric=False)"),
  "w5_column": ("qwen2", f"{Q}rtn(bits=5, group_size=-1)"),
  "w6": ("qwen2", f"{Q}rtn(bits=6, group_size=128, symmetric=False)"),
  "w8": ("llama", f"{Q}rtn(bits=8, group_size=32)"),
  "float_zero_points": ("llama", f"{Q}hqq(bits=4, group_size=64)"),
  "experts": ("mixtral", f"{Q}rtn(bits=4, group_size=64)"),
  "mixed_and_dense": (
    "llama",
    f"{Q}rtn(bits=3, group_size=32, select='layers/0/attn/.*kernel') + "
    f"{Q}rtn(bits=8, group_size=64, select='layers/1/mlp/.*kernel')",
  ),
}


def fresh(family):
  """Draws a model whose norms and biases do something too."""
  spec = hf.from_config({"model_type": family, **SIZES, **EXPERTS.get(family, {})})
  m = model.Model(spec, models.init(spec, jax.random.key(0)))
  rng, changes = np.random.default_rng(1), {}
  for address in m.addresses():
    x = m.leaf(address)
    noise = rng.normal(size=x.shape).astype(np.float32)
    changes[address] = 0.08 * noise if address.endswith("kernel") else x + 0.3 * noise
  return m.update({a: jnp.asarray(x) for a, x in changes.items()})


def made(name):
  family, transform = CASES[name]
  m = fresh(family)
  for one in registry.parse(transform):
    m = drivers.run((one,), m)
  return m


def logits(m):
  return np.asarray(models.forward(m.spec, m.params, jnp.asarray(TOKENS)).logits)


def theirs(folder):
  net, _ = utils.load_model(folder)
  return np.array(net(mx.array(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize("name", CASES)
def test_mlx_computes_what_we_do(tmp_path, name):
  m = made(name)
  export.to_layout(m, tmp_path / "out", layout="mlx")
  held = mx.load(str(tmp_path / "out" / "model.safetensors"))
  config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
  count = 0
  for entry in hf.entries(m.spec):
    layer, leaf = entry.name.removesuffix(".weight"), m.leaf(entry.address[0])
    if leaves.is_leaf(leaf):
      own = {k: {**config, **config.get(layer, {})}[k] for k in ("bits", "group_size")}
      parts = [held[f"{layer}.{p}"] for p in ("weight", "scales", "biases")]
      dense = np.array(mx.dequantize(*parts, **own))
      np.testing.assert_allclose(dense.T, leaf.dense(), atol=1e-6, rtol=0, err_msg=layer)
      count += 1
  alike = 2 * (4 + 3 * max(1, m.spec.num_experts))
  assert count == (7 if name == "mixed_and_dense" else alike)
  want = logits(m)
  assert want.std() > 0.3
  np.testing.assert_allclose(theirs(tmp_path / "out"), want, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("bits", "size"), [(4, 64), (3, 32), (8, 128)])
def test_what_mlx_quantized_loads_here(tmp_path, bits, size):
  io.save(fresh("qwen2"), tmp_path / "dense")
  net, config = utils.load_model(tmp_path / "dense")
  net, config = utils.quantize_model(net, config, size, bits)
  utils.save_model(tmp_path / "out", net)
  utils.save_config(config, tmp_path / "out" / "config.json")
  m = io.load(tmp_path / "out")
  leaf = m.leaf("layers/1/mlp/up/kernel")
  assert (leaf.bits, leaf.group_size) == (bits, size)
  want = theirs(tmp_path / "out")
  np.testing.assert_allclose(logits(m), want, atol=5e-5, rtol=0)
  assert np.abs(want - logits(fresh("qwen2"))).max() > (0.1 if bits < 8 else 1e-3)
