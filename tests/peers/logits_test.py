# SPDX-License-Identifier: Apache-2.0
"""Every architecture gives the logits that transformers gives, and is written back bit for bit.

The checkpoints are tiny, random and float32, written by `save_pretrained`; norm weights and biases
are randomized, so that a scale or bias read from the wrong place shows.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from treesurgeon import models
from treesurgeon.core import paths
from treesurgeon.models import encoder, hf

transformers.logging.set_verbosity_error()

TOL = 1e-4
SMALL = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
}
GQA = {**SMALL, "num_key_value_heads": 2}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CASES = {
  "llama2": ("Llama", SMALL),
  "llama3": ("Llama", {**GQA, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
  "llama_linear": (
    "Llama",
    {**GQA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
  ),
  "llama_biases": ("Llama", {**GQA, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
  "mistral": ("Mistral", {**GQA, "sliding_window": 5}),
  "mistral_unlimited": ("Mistral", {**GQA, "sliding_window": None}),
  "mixtral": ("Mixtral", {**GQA, "num_local_experts": 5, "num_experts_per_tok": 2}),
  "qwen2": ("Qwen2", GQA),
  "qwen2_windows": (
    "Qwen2",
    {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
  ),
  "qwen3": ("Qwen3", {**GQA, "head_dim": 16}),
  "qwen3_moe": ("Qwen3Moe", {**GQA, **MOE, "norm_topk_prob": False}),
  "qwen3_moe_normed": ("Qwen3Moe", {**GQA, **MOE, "norm_topk_prob": True, "head_dim": 16}),
  "olmo2": ("Olmo2", GQA),
  "gemma": ("Gemma", {**GQA, "head_dim": 16, **PAD}),
  "gemma2": (
    "Gemma2",
    {
      **GQA,
      "head_dim": 16,
      "sliding_window": 4,
      "query_pre_attn_scalar": 24,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 1.5,
      **PAD,
    },
  ),
  "gemma3": (
    "Gemma3",
    {
      **GQA,
      "num_hidden_layers": 4,
      "head_dim": 16,
      "sliding_window": 4,
      "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL],
      "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        GLOBAL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
      },
      **PAD,
    },
  ),
  "gpt2": ("GPT2", GPT),
  "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
  "neox": ("GPTNeoX", SMALL),
  "neox_sequential": (
    "GPTNeoX",
    {**SMALL, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5},
  ),
  "opt": ("OPT", {**{k: v for k, v in SMALL.items() if k[0] != "i"}, "ffn_dim": 48, **PAD}),
  "opt_post_norm": (
    "OPT",
    {
      **{k: v for k, v in SMALL.items() if k[0] != "i"},
      "ffn_dim": 48,
      "do_layer_norm_before": False,
      **PAD,
    },
  ),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


@pytest.mark.parametrize("name", CASES)
def test_decoder_gives_the_same_logits(name: str, tmp_path: pathlib.Path):
  family, fields = CASES[name]
  config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**fields)
  config._attn_implementation = "eager"
  peer = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
  save(peer, tmp_path)
  spec, params = load(tmp_path)
  tokens = sample_tokens()
  with torch.no_grad():
    expected = peer(torch.from_numpy(tokens)).logits.numpy()
  out = models.forward(spec, params, jnp.asarray(tokens))
  assert np.ptp(expected) > 0.5
  np.testing.assert_allclose(np.asarray(out.logits), expected, atol=TOL, rtol=TOL)
  check_written_back(spec, params, tmp_path, type(peer))


@pytest.mark.parametrize("name", ["llama3", "mistral", "opt", "gemma3", "gpt2"])
def test_left_padding_gives_the_same_logits(name: str, tmp_path: pathlib.Path):
  family, fields = CASES[name]
  config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**fields)
  config._attn_implementation = "eager"
  peer = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
  save(peer, tmp_path)
  spec, params = load(tmp_path)
  tokens = sample_tokens()
  mask = np.ones_like(tokens)
  mask[0, :3] = 0
  with torch.no_grad():
    expected = peer(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits
  out = models.forward(spec, params, jnp.asarray(tokens), mask=jnp.asarray(mask))
  real = mask.astype(bool)
  np.testing.assert_allclose(np.asarray(out.logits)[real], expected.numpy()[real], atol=TOL)


@pytest.mark.parametrize(
  "name", ["llama3", "gemma2", "gemma3", "gpt2", "gptj", "mistral", "mixtral"]
)
def test_greedy_generation_gives_the_same_tokens(name: str, tmp_path: pathlib.Path):
  family, fields = CASES[name]
  config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**fields)
  config._attn_implementation = "eager"
  peer = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
  save(peer, tmp_path)
  spec, params = load(tmp_path)
  prompt = sample_tokens()[:, :7]
  expected = torch.from_numpy(prompt)
  with torch.no_grad():
    for _ in range(8):
      nxt = peer(expected).logits[:, -1].argmax(-1, keepdim=True)
      expected = torch.cat([expected, nxt], dim=1)
  out = models.generate(spec, params, jnp.asarray(prompt), max_new_tokens=8)
  np.testing.assert_array_equal(np.asarray(out), expected.numpy())


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_encoder_gives_the_same_states(cls: str, tmp_path: pathlib.Path):
  config = transformers.BertConfig(**SMALL)
  config._attn_implementation = "eager"
  peer = getattr(transformers, cls)(config)
  save(peer, tmp_path)
  spec, params = load(tmp_path)
  tokens = sample_tokens()
  types = (np.arange(tokens.shape[1])[None] > 5).astype(np.int64).repeat(2, 0)
  mask = np.ones_like(tokens)
  mask[1, 9:] = 0
  with torch.no_grad():
    expected = peer(
      torch.from_numpy(tokens),
      attention_mask=torch.from_numpy(mask),
      token_type_ids=torch.from_numpy(types),
      output_hidden_states=True,
    )
  out = models.forward(
    spec,
    params,
    jnp.asarray(tokens),
    types=jnp.asarray(types),
    mask=jnp.asarray(mask),
    observe=lambda name, x: x if name in ("in", "embed/out") else None,
  )
  real = mask.astype(bool)
  states = [*out.observed["in"], out.hidden]
  for ours, theirs in zip(states, expected.hidden_states, strict=True):
    np.testing.assert_allclose(np.asarray(ours)[real], theirs.numpy()[real], atol=TOL)
  if cls == "BertModel":
    pooled = encoder.pool(spec, params, out.hidden)
    np.testing.assert_allclose(np.asarray(pooled), expected.pooler_output.numpy(), atol=TOL)
    assert out.logits is None
  else:
    np.testing.assert_allclose(
      np.asarray(out.logits)[real], expected.logits.numpy()[real], atol=TOL
    )
  check_written_back(spec, params, tmp_path, type(peer))


def test_openelm_gives_the_same_logits(tmp_path: pathlib.Path):
  config = {
    "architectures": ["OpenELMForCausalLM"],
    "model_type": "openelm",
    "vocab_size": 61,
    "model_dim": 32,
    "head_dim": 8,
    "num_transformer_layers": 4,
    "num_query_heads": [2, 2, 4, 4],
    "num_kv_heads": [1, 1, 2, 2],
    "num_gqa_groups": 2,
    "ffn_multipliers": [0.5, 1.0, 1.0, 2.5],
    "ffn_dim_divisor": 8,
    "ffn_with_glu": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_freq_constant": 10000,
    "rope_max_length": 128,
    "max_context_length": 64,
    "initializer_range": 0.02,
  }
  torch.manual_seed(0)
  peer = OpenElm(config)
  randomize(peer)
  tensors = {k: v.contiguous().numpy() for k, v in peer.state_dict().items()}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(config))
  spec, params = load(tmp_path)
  assert spec.d_ff == (16, 32, 32, 80)
  assert spec.segments() == ((0, 1), (1, 2), (2, 3), (3, 4))
  tokens = sample_tokens()
  with torch.no_grad():
    expected = peer(torch.from_numpy(tokens)).numpy()
  out = models.forward(spec, params, jnp.asarray(tokens))
  np.testing.assert_allclose(np.asarray(out.logits), expected, atol=TOL)
  check_written_back(spec, params, tmp_path, None)


class OpenElm(torch.nn.Module):
  """OpenELM after its paper (arXiv:2404.14619) and apple/corenet's definition."""

  def __init__(self, config: dict):
    super().__init__()
    dim, layers = config["model_dim"], config["num_transformer_layers"]
    self.transformer = torch.nn.Module()
    self.transformer.token_embeddings = torch.nn.Embedding(config["vocab_size"], dim)
    self.transformer.layers = torch.nn.ModuleList(OpenElmLayer(config, i) for i in range(layers))
    self.transformer.norm = torch.nn.RMSNorm(dim, eps=1e-6)

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    h = self.transformer.token_embeddings(tokens)
    for layer in self.transformer.layers:
      h = layer(h)
    return self.transformer.norm(h) @ self.transformer.token_embeddings.weight.T


class OpenElmLayer(torch.nn.Module):
  """One layer: grouped queries with normalized heads, fused gated feed-forward."""

  def __init__(self, config: dict, index: int):
    super().__init__()
    dim, width = config["model_dim"], config["head_dim"]
    self.heads = config["num_query_heads"][index]
    self.kv_heads = config["num_kv_heads"][index]
    self.width = width
    divisor, wanted = config["ffn_dim_divisor"], config["ffn_multipliers"][index] * dim
    hidden = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    self.attn, self.ffn = torch.nn.Module(), torch.nn.Module()
    total = (self.heads + 2 * self.kv_heads) * width
    self.attn.qkv_proj = torch.nn.Linear(dim, total, bias=False)
    self.attn.out_proj = torch.nn.Linear(self.heads * width, dim, bias=False)
    self.attn.q_norm = torch.nn.RMSNorm(width, eps=1e-6)
    self.attn.k_norm = torch.nn.RMSNorm(width, eps=1e-6)
    self.ffn.proj_1 = torch.nn.Linear(dim, 2 * hidden, bias=False)
    self.ffn.proj_2 = torch.nn.Linear(hidden, dim, bias=False)
    self.attn_norm = torch.nn.RMSNorm(dim, eps=1e-6)
    self.ffn_norm = torch.nn.RMSNorm(dim, eps=1e-6)

  def forward(self, h: torch.Tensor) -> torch.Tensor:
    batch, length, _ = h.shape
    qkv = self.attn.qkv_proj(self.attn_norm(h))
    qkv = qkv.view(batch, length, -1, self.width).transpose(1, 2)
    q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
    q, k = turn(self.attn.q_norm(q)), turn(self.attn.k_norm(k))
    repeat = self.heads // self.kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    h = h + self.attn.out_proj(y.transpose(1, 2).reshape(batch, length, -1))
    gate, up = self.ffn.proj_1(self.ffn_norm(h)).chunk(2, dim=-1)
    return h + self.ffn.proj_2(torch.nn.functional.silu(gate) * up)


def turn(x: torch.Tensor) -> torch.Tensor:
  """Rotates [batch, heads, length, width] by position, halves against each other."""
  width = x.shape[-1]
  freq = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
  angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float32), freq)
  angle = torch.cat([angle, angle], dim=-1)
  a, b = x.chunk(2, dim=-1)
  return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()


def sample_tokens() -> np.ndarray:
  """Returns a batch of two sequences that hold no padding token."""
  return np.random.default_rng(1).integers(3, 61, (2, 13))


def randomize(peer: torch.nn.Module) -> None:
  """Gives every parameter, norms and biases included, a value of its own."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in peer.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_((0.2 if parameter.ndim > 1 else 0.3) * noise)
      if parameter.ndim == 1:
        parameter.add_(0.5)


def save(peer: torch.nn.Module, folder: pathlib.Path) -> None:
  torch.manual_seed(0)
  randomize(peer)
  peer.eval()
  peer.save_pretrained(folder)


def load(folder: pathlib.Path) -> tuple[models.Spec, dict]:
  """Reads a directory with the name map alone, without lib/io."""
  config = json.loads((folder / "config.json").read_text())
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  spec = hf.refine(hf.from_config(config), tensors)
  flat = {}
  for entry in hf.entries(spec, tensors):
    flat.update(hf.to_leaves(spec, entry, tensors[entry.name]))
  assert set(flat) == set(models.addresses(spec))
  used = {e.name for e in hf.entries(spec, tensors)}
  assert {n for n in tensors if not hf.ignored(n)} == used
  return spec, paths.unflatten({k: jnp.asarray(v) for k, v in flat.items()})


def check_written_back(spec: models.Spec, params: dict, folder: pathlib.Path, cls: type | None):
  """Config and tensors come back bit for bit, and the peer loads the directory we write."""
  config = json.loads((folder / "config.json").read_text())
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  assert hf.to_config(spec) == config
  assert hf.unsupported(spec) == ()
  flat = {k: np.asarray(v) for k, v in paths.flatten(params).items()}
  written = {}
  for entry in hf.entries(spec, tensors):
    written[entry.name] = np.ascontiguousarray(hf.to_tensor(spec, entry, flat))
    assert written[entry.name].shape == hf.shape(spec, entry)
    np.testing.assert_array_equal(written[entry.name], tensors[entry.name], strict=True)
  assert set(written) == {n for n in tensors if not hf.ignored(n)}
  if cls is None:
    return
  out = folder / "out"
  out.mkdir()
  # A fresh config, made from the spec alone, describes the same network to the peer.
  bare = hf.to_config(models.Spec(**{**vars(spec), "extra": ()}))
  assert hf.from_config(bare) == spec
  (out / "config.json").write_text(json.dumps(bare))
  safetensors.numpy.save_file(written, out / "model.safetensors", metadata={"format": "pt"})
  _, report = cls.from_pretrained(out, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  tokens = torch.from_numpy(sample_tokens())
  with torch.no_grad():
    first = cls.from_pretrained(folder, attn_implementation="eager").eval()(tokens)[0]
    second = cls.from_pretrained(out, attn_implementation="eager").eval()(tokens)[0]
  torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
