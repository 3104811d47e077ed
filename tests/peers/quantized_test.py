# SPDX-License-Identifier: Apache-2.0
"""What we export quantized transformers loads, and what others quantized loads here, alike.

Tolerances are absolute, on logits whose standard deviation is about 0.6: 1e-4 where the scales are
stored as they are, 0.005 where GPTQ and AWQ round them to float16. 8-bit integer inputs differ
more: a token's largest input lies half way between two codes, so one bit of the input decides.
"""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from treesurgeon import io, models, registry
from treesurgeon.core import leaves
from treesurgeon.io import export
from treesurgeon.run import drivers

torch._dynamo.config.disable = True  # GPTQModel compiles its layers, which takes a minute
transformers.logging.set_verbosity_error()

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "llmcompressor_directories.py"
PEER = runpy.run_path(str(SCRIPT))
SIZES = {
  "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MIXTURES = {
  "Mixtral": {"num_local_experts": 4},
  "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16))
CT = "compressed-tensors"
DENSE = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
GPTQ = {"quantization_config": transformers.GPTQConfig(bits=4, backend="torch")}
AWQ = {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
MIXED = (
  "compress.quantize.rtn(bits=4, select='layers/(0/.*|1/attn/.*)kernel') + "
  "compress.quantize.rtn(bits=8, select='layers/1/mlp/.*kernel')"
)
# name: (family, transform, layout, how transformers loads it, tolerance)
CASES = {
  "w4": ("Llama", "rtn(bits=4, group_size=128)", CT, {}, 1e-4),
  "w4_bias": ("Qwen2", "rtn(bits=4, group_size=64)", CT, {}, 1e-4),
  "w3_channel": ("Qwen2", "rtn(bits=3, group_size=-1)", CT, {}, 1e-4),
  "w8": ("Llama", "rtn(bits=8)", CT, {}, 1e-4),
  "asymmetric": ("Llama", "rtn(bits=4, symmetric=False)", CT, DENSE, 1e-4),
  "fp8": ("Llama", "rtn(bits=8, format='e4m3fn', group_size=-1)", CT, {}, 1e-4),
  "fp8_block": ("Qwen2", "rtn(bits=8, format='e4m3fn', group_cols=128)", CT, {}, 1e-4),
  "mxfp4": (
    "Llama", "rtn(format='e2m1', group_size=32, scale_dtype='float8_e8m0fnu')", CT, DENSE, 1e-4,
  ),
  "nvfp4": (  # its scales pass through bfloat16 there
    "Qwen2", "rtn(format='e2m1', group_size=16, scale_dtype='e4m3fn')", CT, DENSE, 0.02,
  ),
  "gptq": ("Qwen2", "rtn(bits=4, group_size=64)", "gptq", GPTQ, 0.005),
  "gptq_3": ("Llama", "rtn(bits=3, group_size=64)", "gptq", GPTQ, 0.005),
  "gptq_v2": ("Llama", "rtn(bits=8, group_size=64, symmetric=False)", "gptq_v2", GPTQ, 0.005),
  "experts": ("Mixtral", "rtn(bits=4, group_size=64)", CT, {}, 1e-4),
  "experts_fp8": ("Qwen3Moe", "rtn(bits=8, format='e4m3fn', group_size=-1)", CT, {}, 1e-4),
  "awq": ("Qwen2", "rtn(bits=4, group_size=64, symmetric=False)", "awq", AWQ, 0.005),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """Random models of four families, norms and biases included."""
  root = tmp_path_factory.mktemp("dense")
  for family, more in (("Llama", {}), ("Qwen2", {}), *MIXTURES.items()):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
      for p in model.parameters():
        p.copy_((0.08 if p.ndim > 1 else 0.3) * torch.randn(p.shape) + 0.5 * (p.ndim == 1))
    model.save_pretrained(root / family)
  return root


def logits(model, tokens=TOKENS):
  return np.asarray(models.forward(model.spec, model.params, jnp.asarray(tokens)).logits)


def theirs(folder, tokens=TOKENS, **loading):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **loading)
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def check(model, folder, layout, loading, tolerance):
  export.to_layout(model, folder, layout=layout)
  want = logits(model)
  assert want.std() > 0.3
  np.testing.assert_allclose(theirs(folder, **loading), want, atol=tolerance, rtol=0)
  np.testing.assert_allclose(logits(io.load(folder)), want, atol=min(tolerance, 0.005), rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_we_do(dense, tmp_path, name):
  family, transform, layout, loading, tolerance = CASES[name]
  step = registry.parse(f"compress.quantize.{transform}")
  quantized = drivers.run(step, io.load(dense / family))
  check(quantized, tmp_path / "out", layout, loading, tolerance)


@pytest.mark.filterwarnings("ignore")
def test_mixed_widths(dense, tmp_path):
  quantized = io.load(dense / "Llama")
  for one in MIXED.split(" + "):
    quantized = drivers.run(registry.parse(one), quantized)
  assert quantized.leaf("layers/1/mlp/up/kernel").bits == 8
  check(quantized, tmp_path / "out", CT, {}, 1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_order_of_inputs(dense, tmp_path):
  rtn = "compress.quantize.rtn(bits=4, group_size=32)"
  model = drivers.run(registry.parse(rtn), io.load(dense / "Llama"))
  chosen = [a for a in model.addresses() if leaves.is_leaf(model.leaf(a))]
  changes = {}
  for address in chosen:
    leaf = model.leaf(address)
    index = np.random.default_rng(leaf.rows).permutation(leaf.rows).astype(np.int32)[None] // 32
    changes[address] = dataclasses.replace(leaf, group_index=jnp.asarray(index))
  check(model.update(changes), tmp_path / "out", "gptq", GPTQ, 0.005)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["int", "e4m3fn"])
def test_quantized_inputs(dense, tmp_path, form):
  rtn = f"compress.quantize.rtn(bits=8, group_size=-1, format='{form}')"
  weights = drivers.run(registry.parse(rtn), io.load(dense / "Llama"))
  wrap = lambda x: leaves.ActivationQuantized(x, None, format=form) if leaves.is_leaf(x) else x
  model = weights.replace(params=leaves.map_leaves(wrap, weights.params))
  export.to_layout(model, tmp_path / "out", layout=CT)
  want, got = logits(model), theirs(tmp_path / "out")
  np.testing.assert_allclose(got, want, atol=0.03 if form == "int" else 1e-4, rtol=0)
  assert np.abs(got - want).mean() < 0.2 * np.abs(got - logits(weights)).mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [3, 4])
def test_gptqmodels_packer_writes_our_bytes(dense, tmp_path, bits):
  """GPTQModel packs the same weights, scales and order into the same tensors."""
  from gptqmodel.nn_modules.qlinear import torch as linears

  rtn = f"compress.quantize.rtn(bits={bits}, group_size=32, symmetric=False)"
  model = drivers.run(registry.parse(rtn), io.load(dense / "Llama"))
  export.to_layout(model, tmp_path / "out", layout="gptq_v2")
  held = io.Checkpoint(tmp_path / "out")
  found = held.leaf("layers/0/mlp/up/kernel")
  plain = torch.nn.Linear(128, 256, bias=False)
  plain.weight.data = torch.tensor(np.asarray(jax.tree.map(jnp.asarray, found).dense()).T)
  packed = linears.TorchLinear(
    bits=bits, group_size=32, sym=False, desc_act=False, in_features=128, out_features=256
  )
  scales, zeros = (
    torch.tensor(np.array(x).T.astype(np.float32)) for x in (found.scales, found.zeros)
  )
  packed.pack_original(plain, scales, zeros, torch.arange(128, dtype=torch.int32) // 32)
  for part in ("qweight", "qzeros", "scales", "g_idx"):
    ours = held.tensors[f"model.layers.0.mlp.up_proj.{part}"]
    np.testing.assert_array_equal(ours, getattr(packed, part).numpy(), err_msg=part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["gptq4", "gptq3order"])
def test_what_gptqmodel_quantized_loads_here(dense, tmp_path, what):
  np.save(tmp_path / "rows.npy", np.random.default_rng(1).integers(0, 256, (16, 64)))
  command = [sys.executable, str(HERE / "gptqmodel_oneshot.py"), what, str(dense / "Llama")]
  command += [str(tmp_path / "rows.npy"), str(tmp_path / "out"), "32"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-2000:]
  model = io.load(tmp_path / "out")
  leaf = model.leaf("layers/0/mlp/up/kernel")
  assert leaf.bits == int(what[4]) and (leaf.group_index is not None) == what.endswith("order")
  # It saves bfloat16 what it does not quantize, and both then compute in that, not alike.
  wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
  model = dataclasses.replace(model, params=jax.tree.map(wide, model.params))
  want = theirs(tmp_path / "out")
  np.testing.assert_allclose(logits(model), want, atol=0.005, rtol=0)
  assert 0.01 < np.abs(want - theirs(dense / "Llama")).max() < 1.5


@pytest.fixture(scope="module")
def others(tmp_path_factory):
  """Runs llm-compressor, or reads what it once wrote."""
  python, path = os.environ.get("LLMCOMPRESSOR_PYTHON"), SCRIPT.with_suffix(".npz")
  if python:
    path = tmp_path_factory.mktemp("peer") / "directories.npz"
    subprocess.run([python, str(SCRIPT), str(path)], check=True)
  root = tmp_path_factory.mktemp("llmcompressor")
  with np.load(path) as file:
    for name, content in file.items():
      if not name.endswith("logits"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content.tobytes())
    return root, {k.split("/")[0]: v for k, v in file.items() if k.endswith("logits")}


@pytest.mark.parametrize("name", PEER["SCHEMES"])
def test_what_llmcompressor_wrote_loads_here(others, name):
  root, expected = others
  model = io.load(root / name)
  leaf = model.leaf("layers/0/mlp/up/kernel")
  assert isinstance(leaf, leaves.ActivationQuantized) == (name in ("w8a8", "fp8"))
  np.testing.assert_allclose(logits(model, PEER["TOKENS"]), expected[name], atol=1e-4, rtol=0)
