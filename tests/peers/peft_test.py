# SPDX-License-Identifier: Apache-2.0
"""Adapters cross between peft and here with equal logits, both ways, and merge to equal weights.

Models are tiny, random and float32; every B is randomized, as if trained.
"""

import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from treesurgeon import adapt, io, models
from treesurgeon.adapt import adapters
from treesurgeon.adapt import peft as ours

transformers.logging.set_verbosity_error()

TOL = 1e-5
TOKENS = np.arange(2 * 9).reshape(2, 9) * 7 % 61
LLAMA = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
BASES = {
  "llama": ("Llama", LLAMA),
  "gpt2": ("GPT2", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}),
  "neox": ("GPTNeoX", NEOX),
}
ATTENTION = ["q_proj", "v_proj", "k_proj", "o_proj"]
CASES = {
  "llama_plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
  "llama_all_linear": ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
  "llama_regex": ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
  "llama_rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "r": 6}),
  "llama_patterns": (
    "llama",
    {
      "target_modules": [*ATTENTION, "gate_proj", "down_proj"],
      # The second key matches layer 0's q_proj too, but comes later.
      "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 5, "mlp.down_proj": 1},
      "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "mlp.down_proj": 2.5},
    },
  ),
  "llama_patterns_rslora": (
    "llama",
    {"target_modules": ATTENTION, "rank_pattern": {"k_proj": 7}, "use_rslora": True},
  ),
  "llama_one_layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
  "llama_head_and_embedding": (
    "llama",
    {"target_modules": ["lm_head", "embed_tokens", "up_proj"], "init_lora_weights": "gaussian"},
  ),
  "gpt2_fused": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
  "gpt2_patterns_rslora": (
    "gpt2",
    {
      "target_modules": ["c_attn", "c_proj", "c_fc"],
      "fan_in_fan_out": True,
      # peft writes the keys sorted, so in the file the wider one comes first.
      "rank_pattern": {"mlp.c_proj": 2, "c_proj": 3},
      "alpha_pattern": {"h.0.attn.c_attn": 5},
      "use_rslora": True,
    },
  ),
  "neox_interleaved": ("neox", {"target_modules": ["query_key_value", "dense_4h_to_h", "lm_head"]}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Saves every base once."""
  folder = tmp_path_factory.mktemp("bases")
  for name, (family, fields) in BASES.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    net = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
      for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))
    net.save_pretrained(folder / name)
  return folder


def peer_base(path: pathlib.Path):
  return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def peer_logits(net) -> np.ndarray:
  with torch.no_grad():
    return net(torch.from_numpy(TOKENS)).logits.numpy()


def logits(m) -> np.ndarray:
  return np.asarray(models.forward(m.spec, m.params, jnp.asarray(TOKENS)).logits)


def trained(base: pathlib.Path, fields: dict, out: pathlib.Path):
  """Makes a peft adapter with a random B and saves it."""
  torch.manual_seed(1)
  fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **fields}
  net = peft.get_peft_model(peer_base(base), peft.LoraConfig(**fields)).eval()
  with torch.no_grad():
    for name, p in net.named_parameters():
      if "lora_" in name:
        p.copy_(0.2 * torch.randn_like(p))
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    net.save_pretrained(out)
  return net


def randomized(found):
  """Gives every adapter random factors of its own."""
  out = {}
  for i, (address, low) in enumerate(found.items()):
    a, b = jax.random.split(jax.random.key(i))
    out[address] = type(low)(
      0.2 * jax.random.normal(a, low.a.shape), 0.2 * jax.random.normal(b, low.b.shape), low.scale
    )
  return out


def reload_in_peft(base: pathlib.Path, adapter: pathlib.Path):
  return peft.PeftModel.from_pretrained(peer_base(base), adapter).eval()


@pytest.mark.parametrize("name", CASES)
def test_a_peft_adapter_gives_the_same_logits_here(name, root, tmp_path):
  base, fields = CASES[name]
  net = trained(root / base, fields, tmp_path / "theirs")
  m = io.load(root / base)
  found = ours.load(tmp_path / "theirs", m)
  tuned = adapters.attach(m, found)
  expected = peer_logits(net)
  assert np.abs(expected - logits(m)).max() > 1e-2
  np.testing.assert_allclose(logits(tuned), expected, atol=TOL, rtol=TOL)

  # Merged here as merged there.
  (merge,) = adapt.merge()
  merged = merge.apply(tuned, {}, jax.random.key(0))
  assert not adapters.extract(merged)
  np.testing.assert_allclose(logits(merged), expected, atol=TOL, rtol=TOL)
  net.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "merged")
  theirs = io.load(tmp_path / "merged")
  for address in theirs.addresses():
    np.testing.assert_allclose(merged.leaf(address), theirs.leaf(address), atol=1e-6, rtol=1e-6)

  # Written again: the same tensors byte for byte, and the same network in peft.
  ours.save(tmp_path / "again", found, m.spec, rslora=fields.get("use_rslora", False))
  old, new = (safetensors.numpy.load_file(tmp_path / d / ours.WEIGHTS) for d in ("theirs", "again"))
  old = {k: v for k, v in old.items() if "base_layer" not in k}
  assert set(old) == set(new)
  for key in old:
    assert old[key].tobytes() == new[key].tobytes() and old[key].shape == new[key].shape
  again = reload_in_peft(root / base, tmp_path / "again")
  np.testing.assert_allclose(peer_logits(again), expected, atol=TOL, rtol=TOL)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_our_adapter_gives_the_same_logits_in_peft(base, rslora, root, tmp_path):
  m = io.load(root / base)
  # q, k and v are drawn apart, so fused modules need the block form.
  transform = adapt.lora(rank=3, alpha=5.0, rslora=rslora, select="layers/0/.*|layers/1/mlp/.*")
  for step in transform + adapt.lora(rank=2, rslora=rslora, select="layers/1/attn/o/.*"):
    m = step.apply(m, {}, jax.random.key(3))
  found = randomized(adapters.extract(m))
  tuned = adapters.attach(adapters.strip(m), found)
  out = tmp_path / "ours"
  ours.save(out, found, m.spec, rslora=rslora, base_model=str(root / base))
  config = json.loads((out / ours.CONFIG).read_text())
  assert config["target_modules"] == sorted(config["target_modules"])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
    net = reload_in_peft(root / base, out)
  assert sum("lora_A" in n for n, _ in net.named_parameters()) == sum(
    ".lora_A." in k for k in safetensors.numpy.load_file(out / ours.WEIGHTS)
  )
  np.testing.assert_allclose(peer_logits(net), logits(tuned), atol=TOL, rtol=TOL)
  back = adapters.attach(adapters.strip(m), ours.load(out, m))
  np.testing.assert_allclose(logits(back), logits(tuned), atol=TOL, rtol=TOL)


def test_bfloat16_factors_keep_their_dtype(root, tmp_path):
  m = io.load(root / "llama")
  (step,) = adapt.lora(rank=2, dtype="bfloat16")
  found = adapters.extract(step.apply(m, {}, jax.random.key(0)))
  ours.save(tmp_path / "out", found, m.spec)
  back = ours.load(tmp_path / "out", m)
  assert {str(low.a.dtype) for low in back.values()} == {"bfloat16"}
  for address, low in found.items():
    np.testing.assert_array_equal(back[address].a, low.a)
  net = reload_in_peft(root / "llama", tmp_path / "out")
  np.testing.assert_allclose(peer_logits(net), logits(m), atol=TOL, rtol=TOL)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora=True is not supported"),
    (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias=True is not supported"),
    (
      peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
      "'pissa' adapts a chang",
    ),
    (
      peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
      "'olora' adapts a chang",
    ),
    (
      peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
      r"modules_to_save=\['lm_head'\] is not supported; supported: plain LoRA",
    ),
    (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type is 'IA3'"),
    (peft.LoHaConfig(target_modules=["q_proj"]), "peft_type is 'LOHA'; supported: plain LoRA"),
  ],
)
def test_other_adapters_are_refused_by_name(config, message, root, tmp_path):
  peft.get_peft_model(peer_base(root / "llama"), config).save_pretrained(tmp_path / "theirs")
  with pytest.raises(ValueError, match=message):
    ours.load(tmp_path / "theirs", io.load(root / "llama"))
