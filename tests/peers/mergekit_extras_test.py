# SPDX-License-Identifier: Apache-2.0
"""What surrounds a merge equals mergekit's and peft's: vocabularies, adapters, mixtures.

Models are tiny, random and float32.
"""

import importlib.resources
import pathlib

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
import yaml
from click import testing
from mergekit import config as mk_config
from mergekit import graph as mk_graph
from mergekit import merge as mk_merge
from mergekit import options as mk_options
from mergekit._data import chat_templates as mk_templates
from mergekit.moe import config as mk_moe_config
from mergekit.scripts import extract_lora as mk_extract
from mergekit.scripts import merge_raw_pytorch as mk_raw
from mergekit.scripts import moe as mk_moe
from safetensors import numpy as safetensors_numpy
from transformers.utils import chat_template_utils

from treesurgeon import registry
from treesurgeon.adapt import extract
from treesurgeon.io import chat_templates, raw, remapped, safetensors, vocabulary, with_lora
from treesurgeon.merge import mergekit, moe, moe_config
from treesurgeon.run import merging

transformers.logging.set_verbosity_error()

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = {
  "base": "hello world, the cat sat on the mat ",
  "other": "the theory of everything and their thoughts ",
  "third": "a world of other words, whether the weather ",
}
SIZES = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}


def fast(text, extra=()):
  """Trains a byte-level tokenizer."""
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  alphabet = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()))[:120]
  inner.train_from_iterator(
    [text] * 3,
    tokenizers.trainers.BpeTrainer(
      vocab_size=140, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    ),
  )
  out = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
  )
  out.add_tokens(list(extra))
  return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Writes three models of different vocabularies; the base has rows that no token uses."""
  root = tmp_path_factory.mktemp("models")
  torch.manual_seed(0)
  extras = {
    "base": ["<base>"],
    "other": [tokenizers.AddedToken("<other>", special=True), "<shared>"],
    "third": ["<shared>"],
  }
  for name, text in TEXTS.items():
    words = fast(text, extras[name])
    words.chat_template = "{{ messages[0]['content'] }}" + ("" if name == "base" else " ")
    rows = len(words) + (3 if name == "base" else 0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=rows, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    words.save_pretrained(root / name)
  return root


def theirs(config: dict, out: pathlib.Path) -> pathlib.Path:
  """Runs mergekit."""
  mk_merge.run_merge(
    mk_config.MergeConfiguration.model_validate(config),
    str(out),
    mk_options.MergeOptions(copy_tokenizer=True, write_model_card=False, quiet=True),
  )
  return out


CASES = {
  "union": {"source": "union"},
  "base": {"source": "base"},
  "model": {"source": "third"},
  "padded": {"source": "union", "pad_to_multiple_of": 16},
  "tokens": {
    "source": "union",
    "tokens": {
      "<shared>": {"source": "third", "force": True},
      "<other>": {"source": {"kind": "zero"}},
      "<new>": {"source": {"kind": "model_token", "model": "base", "token": "the"}},
      "<id>": {"source": {"kind": "model_token", "model": "other", "token_id": 7}},
    },
  },
}


# Without a base, mergekit's "base" is any of the models, in the order of a hash table.
@pytest.mark.parametrize(
  ("name", "based"), [(n, b) for n in CASES for b in (True, False) if b or n != "base"]
)
def test_rows_of_a_merged_vocabulary(models, tmp_path, name, based):
  given = {**CASES[name]}
  weights = {"base": 0.5, "other": 0.3, "third": 0.9}
  place = {n: str(models / n) for n in weights}
  if given["source"] in place:
    given["source"] = place[given["source"]]
  tokens = {}
  for word, value in given.get("tokens", {}).items():
    source = value["source"]
    if isinstance(source, str):
      source = place[source]
    elif "model" in source:
      source = {**source, "model": place[source["model"]]}
    tokens[word] = {**value, "source": source}
  if tokens:
    given["tokens"] = tokens
  config = {
    "merge_method": "task_arithmetic" if based else "linear",
    "models": [{"model": place[n], "parameters": {"weight": w}} for n, w in weights.items()],
    "dtype": "float32",
    "tokenizer": given,
  }
  base = place["base"] if based else None
  config |= {"base_model": base} if based else {"parameters": {"normalize": False}}
  out = theirs(config, tmp_path / "out")
  words = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
  plan = vocabulary.plan({d: d for d in place.values()}, base=base, **given)
  assert set(plan.ids) == set(words)
  got = raw.Directory(out)
  assert got.config["vocab_size"] == plan.size
  sources = {d: raw.Directory(d) for d in place.values()}
  views = remapped.remap(plan, sources, base=base)
  mine = np.asarray([i for w, i in plan.ids.items()])
  theirs_at = np.asarray([words[w] for w in plan.ids])
  for tensor in (EMBED, HEAD):
    leaves = {n: views[d].leaf(tensor) for n, d in place.items()}
    if based:
      want = leaves["base"] + sum(
        w * (leaves[n] - leaves["base"]) for n, w in weights.items() if n != "base"
      )
    else:
      want = sum(w * leaves[n] for n, w in weights.items())
    assert got.leaf(tensor).shape == want.shape
    np.testing.assert_allclose(got.leaf(tensor)[theirs_at], want[mine], atol=1e-6)
    np.testing.assert_allclose(got.leaf(tensor)[len(words) :], want[len(words) :], atol=1e-6)


def test_a_joined_tokenizer_splits_as_theirs(models, tmp_path):
  place = {n: str(models / n) for n in ("base", "other")}
  config = {
    "merge_method": "task_arithmetic",
    "base_model": place["base"],
    "models": [{"model": place["other"], "parameters": {"weight": 1.0}}],
    "tokenizer_source": "union",
  }
  reference = transformers.AutoTokenizer.from_pretrained(theirs(config, tmp_path / "theirs"))
  plan = vocabulary.plan({d: d for d in place.values()})
  (tmp_path / "ours").mkdir()
  for name, text in plan.files.items():
    (tmp_path / "ours" / name).write_text(text)
  joined = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
  for text in (*TEXTS.values(), "the <other> theory <shared><base> </s>"):
    assert joined.tokenize(text) == reference.tokenize(text)
    assert joined.decode(joined(text)["input_ids"]) == reference.decode(
      reference(text)["input_ids"]
    )
  assert joined.all_special_tokens == reference.all_special_tokens
  assert joined.chat_template == reference.chat_template


ROLES = (
  "user", "user assistant", "system user", "system user assistant user", "user assistant user",
  "user user_context assistant user", "user user", "assistant",
)  # fmt: skip


@pytest.mark.parametrize("name", chat_templates.TEMPLATES)
def test_named_templates_render_as_theirs(name):
  reference = importlib.resources.files(mk_templates).joinpath(f"{name}.jinja").read_text()
  for roles in ROLES:
    chat = [{"role": r, "content": f" text {i} \n"} for i, r in enumerate(roles.split())]
    for prompt in (False, True):
      assert render(chat_templates.resolve(name), chat, prompt) == render(reference, chat, prompt)


def render(template, chat, prompt):
  try:
    texts, _ = chat_template_utils.render_jinja_template(
      [chat],
      chat_template=template,
      add_generation_prompt=prompt,
      bos_token="<s>",
      eos_token="</s>",
    )
  except Exception as error:  # templates refuse chats by raising
    return type(error).__name__
  return texts[0]


ADAPTERS = {
  "plain": {"target_modules": ["q_proj", "up_proj"]},
  "patterns": {
    "target_modules": ["q_proj", "down_proj", "o_proj"],
    "rank_pattern": {"down_proj": 3},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
    "use_rslora": True,
  },
  "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
  "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
  "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
  "bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
  "lora bias": {"target_modules": ["q_proj"], "lora_bias": True},
  "conv": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
  "conv dora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_folded_in_as_peft_merges_them(tmp_path, name):
  torch.manual_seed(1)
  if "conv" in name:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
  else:
    config = transformers.LlamaConfig(
      **SIZES, vocab_size=40, tie_word_embeddings=False, attention_bias="bias" in name
    )
    model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(tmp_path / "base")
  wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **ADAPTERS[name]))
  with torch.no_grad():
    for parameter in wrapped.parameters():
      if parameter.requires_grad:
        parameter.add_(0.1 * torch.randn_like(parameter))
  wrapped.save_pretrained(tmp_path / "adapter")
  fresh = type(model).from_pretrained(tmp_path / "base")
  merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
  want = {k: v.numpy() for k, v in merged.state_dict().items()}
  base = raw.Directory(tmp_path / "base")
  folded = with_lora.WithLora(base, tmp_path / "adapter")
  changed = 0
  for tensor in folded.addresses():
    np.testing.assert_allclose(folded.leaf(tensor), want[tensor], atol=2e-6)
    changed += not np.array_equal(folded.leaf(tensor), base.leaf(tensor))
  assert changed


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """Writes a base, a fine-tune of everything, and one of rank 2 in two kinds of weights."""
  root = tmp_path_factory.mktemp("tuned")
  torch.manual_seed(2)
  config = transformers.LlamaConfig(**SIZES, vocab_size=40, tie_word_embeddings=False)
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(root / "base")
  state = {k: v.clone() for k, v in model.state_dict().items()}
  model.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in state.items()})
  model.save_pretrained(root / "all")
  planted = {k: v.clone() for k, v in state.items()}
  for name, w in planted.items():
    if "q_proj" in name or "down_proj" in name:
      w += 0.1 * torch.randn(w.shape[0], 2) @ torch.randn(2, w.shape[1])
  model.load_state_dict(planted)
  model.save_pretrained(root / "planted")
  return root


def logits(model):
  with torch.no_grad():
    return model(torch.arange(20).reshape(2, 10)).logits.numpy()


def adapted(root, adapter):
  """Loads the base and an adapter with peft, which must use every tensor of the file."""
  fresh = transformers.LlamaForCausalLM.from_pretrained(root / "base")
  model = peft.PeftModel.from_pretrained(fresh, adapter)
  held = peft.get_peft_model_state_dict(model)
  stored = safetensors.open_file(adapter / with_lora.WEIGHTS)
  absent = [n for n in stored if n not in held and ".bias" not in n]
  assert not absent, absent
  return model


def test_extracted_adapters_approach_the_fine_tune_in_peft(tuned, tmp_path):
  base, full = raw.Directory(tuned / "base"), raw.Directory(tuned / "all")
  want = logits(transformers.LlamaForCausalLM.from_pretrained(tuned / "all"))
  distances = []
  for rank in (1, 6, 16):
    extract.extract(base, full, tmp_path / str(rank), max_rank=rank)
    distances.append(np.abs(logits(adapted(tuned, tmp_path / str(rank))) - want).max())
  assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-5


FAMILIES = {
  "tied": (transformers.LlamaConfig(**SIZES, vocab_size=40, tie_word_embeddings=True)),
  "biases": (transformers.Qwen2Config(**SIZES, vocab_size=40, tie_word_embeddings=False)),
  "conv": transformers.GPT2Config(
    vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
  ),
  "neox": transformers.GPTNeoXConfig(
    **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, vocab_size=40
  ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_full_rank_is_the_fine_tune_in_peft(tmp_path, name):
  torch.manual_seed(3)
  model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
  model.save_pretrained(tmp_path / "base")
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path / "tuned")
  extract.extract(
    raw.Directory(tmp_path / "base"),
    raw.Directory(tmp_path / "tuned"),
    tmp_path / "adapter",
    max_rank=64,
    model_type=FAMILIES[name].model_type,
  )
  fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
  np.testing.assert_allclose(logits(adapted), logits(model.eval()), atol=2e-5)


def test_a_planted_rank_is_recovered_in_peft(tuned, tmp_path):
  base, planted = raw.Directory(tuned / "base"), raw.Directory(tuned / "planted")
  done = extract.extract(base, planted, tmp_path / "out", max_rank=8, epsilon=1e-4)
  assert set(done.ranks.values()) == {2} and len(done.ranks) == 4 and not done.saved
  merged = adapted(tuned, tmp_path / "out").merge_and_unload().state_dict()
  for name in planted.addresses():
    np.testing.assert_allclose(merged[name], planted.leaf(name), atol=1e-5)


def test_factors_are_those_of_mergekit(tuned, tmp_path):
  arguments = [
    "--model", str(tuned / "all"), "--base-model", str(tuned / "base"),
    "--out-path", str(tmp_path / "theirs"), "--max-rank", "5",
  ]  # fmt: skip
  result = testing.CliRunner().invoke(mk_extract.main, arguments, catch_exceptions=False)
  assert result.exit_code == 0, result.output
  extract.extract(
    raw.Directory(tuned / "base"), raw.Directory(tuned / "all"), tmp_path / "ours", max_rank=5
  )
  mine, other = (
    safetensors.open_file(tmp_path / n / with_lora.WEIGHTS) for n in ("ours", "theirs")
  )
  assert set(mine) == set(other)
  for name in mine:
    if "lora_A" in name:
      second = name.replace("lora_A", "lora_B")
      got, want = (x[second] @ x[name] for x in (mine, other))
      # Singular vectors are unique up to sign.
      np.testing.assert_allclose(np.abs(mine[name]), np.abs(other[name]), atol=1e-4)
    elif "lora_B" in name:
      continue
    else:
      got, want = mine[name], other[name]
    np.testing.assert_allclose(got, want, atol=1e-5)


KINDS = {
  "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
  "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {}),
  "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """Writes three models of every kind, with one tokenizer."""
  root = tmp_path_factory.mktemp("dense")
  words = fast(TEXTS["base"])
  for kind, (config, model, more) in KINDS.items():
    for seed, name in enumerate(("base", "x", "y")):
      torch.manual_seed(seed)
      made = model(config(**SIZES, **more, vocab_size=len(words), tie_word_embeddings=False))
      with torch.no_grad():
        for parameter in made.parameters():  # biases and norms begin as constants
          parameter.add_(0.05 * torch.randn_like(parameter))
      made.save_pretrained(root / kind / name)
      words.save_pretrained(root / kind / name)
  return root


def mixture(root, experts, mode, **given):
  prompts = (["the cat sat", "hello"], ["world mat on the mat"])
  return {
    "base_model": str(root / "base"),
    "gate_mode": mode,
    "experts": [
      {"source_model": str(root / n), "positive_prompts": prompts[i], "negative_prompts": ["on"]}
      for i, n in enumerate(experts)
    ],
    "dtype": "float32",
    **given,
  }


def shared(root, **given):
  return [{"source_model": str(root / "base"), "positive_prompts": ["sat on"], **given}]


MIXTURES = {
  "mixtral of llama": ("llama", False),
  "mixtral of mistral": ("mistral", False),
  "qwen of llama": ("llama", True),
  "qwen of qwen2": ("qwen2", True),
  "qwen3": ("qwen3", False),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_mixtures_are_those_of_mergekit(dense, tmp_path, name, mode):
  kind, is_shared = MIXTURES[name]
  document = mixture(dense / kind, ("x", "y"), mode)
  if is_shared:
    document |= {"shared_experts": shared(dense / kind), "architecture": "qwen"}
  mk_moe.build(
    mk_moe_config.MoEMergeConfig.model_validate(document),
    str(tmp_path / "theirs"),
    mk_options.MergeOptions(quiet=True),
    device="cpu",
  )
  moe.build(moe_config.parse(document), tmp_path / "ours")
  made, reference = (
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="float32")
    for n in ("ours", "theirs")
  )
  assert type(made) is type(reference)
  # Settings of the dense model that mean nothing to the mixture may stay in theirs.
  for key in set(type(reference.config)().to_dict()) - {"_name_or_path", "transformers_version"}:
    assert getattr(made.config, key) == getattr(reference.config, key), key
  want = reference.state_dict()
  assert set(want) == set(made.state_dict())
  for tensor, x in made.state_dict().items():
    # mergekit finds hidden states in bfloat16.
    near = 0.01 if mode == "hidden" and "gate.weight" in tensor else 1e-6
    np.testing.assert_allclose(x.numpy(), want[tensor].numpy(), atol=near)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_equal_to_the_base_give_its_logits(dense, tmp_path, name):
  kind, is_shared = MIXTURES[name]
  document = mixture(dense / kind, ("base", "base"), "hidden")
  if is_shared:  # it adds to the experts: scaled to nothing, it is out of the way
    document |= {"shared_experts": shared(dense / kind, residual_scale=0.0)}
    document["architecture"] = "qwen"
  moe.build(moe_config.parse(document, allow_same=True), tmp_path / "out")
  made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
  plain = transformers.AutoModelForCausalLM.from_pretrained(dense / kind / "base", dtype="float32")
  np.testing.assert_allclose(logits(made), logits(plain), atol=1e-5)
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert words("the cat")["input_ids"]


def ours(document: dict, folder: pathlib.Path) -> raw.Directory:
  """Runs our own merge of a configuration."""
  folder.mkdir(exist_ok=True)
  file = folder / "merge.yml"
  file.write_text(yaml.safe_dump(document))
  return raw.Directory(merging.merge(mergekit.read(file), folder / "out", lookup=registry.load))


def test_a_merge_of_different_vocabularies_end_to_end(models, tmp_path):
  place = {n: str(models / n) for n in TEXTS}
  parameters = {"weight": 0.5, "density": 0.6}
  document = {
    "merge_method": "ties",
    "base_model": place["base"],
    "models": [{"model": place[n], "parameters": parameters} for n in ("other", "third")],
    "dtype": "float32",
    "chat_template": "auto",
    "tokenizer": {
      "source": "union",
      "pad_to_multiple_of": 16,
      "tokens": {"<shared>": {"source": place["third"], "force": True}},
    },
  }
  out, reference = ours(document, tmp_path), raw.Directory(theirs(document, tmp_path / "theirs"))
  words, their_words = (
    transformers.AutoTokenizer.from_pretrained(d.directory) for d in (out, reference)
  )
  mine, other = words.get_vocab(), their_words.get_vocab()
  assert set(mine) == set(other) and words.chat_template == their_words.chat_template
  assert out.config["vocab_size"] == reference.config["vocab_size"]
  assert set(out.addresses()) == set(reference.addresses())
  for tensor in out.addresses():
    got, want = out.leaf(tensor), reference.leaf(tensor)
    if tensor in (EMBED, HEAD):
      got, want = got[[mine[w] for w in mine]], want[[other[w] for w in mine]]
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_a_chat_template_alone(models, tmp_path):
  document = {
    "merge_method": "passthrough",
    "models": [{"model": str(models / "base")}],
    "chat_template": "chatml",
  }
  out = ours(document, tmp_path)
  words = transformers.AutoTokenizer.from_pretrained(out.directory)
  reference = transformers.AutoTokenizer.from_pretrained(theirs(document, tmp_path / "theirs"))
  chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
  assert words.apply_chat_template(chat, tokenize=False) == reference.apply_chat_template(
    chat, tokenize=False
  )
  assert words.get_vocab() == reference.get_vocab()


def test_models_with_adapters_end_to_end(tuned, tmp_path):
  base = raw.Directory(tuned / "base")
  for name, rank in (("all", 4), ("planted", 2)):
    extract.extract(base, raw.Directory(tuned / name), tmp_path / name, max_rank=rank)
  document = {
    "merge_method": "task_arithmetic",
    "base_model": str(tuned / "base"),
    "dtype": "float32",
    "models": [
      {"model": f"{tuned / 'base'}+{tmp_path / n}", "parameters": {"weight": w}}
      for n, w in (("all", 0.5), ("planted", 0.8))
    ],
  }
  mk_merge.run_merge(
    mk_config.MergeConfiguration.model_validate(document),
    str(tmp_path / "theirs"),
    mk_options.MergeOptions(
      copy_tokenizer=False, write_model_card=False, quiet=True, lora_merge_cache=str(tmp_path / "c")
    ),
  )
  out, reference = ours(document, tmp_path / "ours"), raw.Directory(tmp_path / "theirs")
  assert set(out.addresses()) == set(reference.addresses())
  for tensor in out.addresses():
    np.testing.assert_allclose(out.leaf(tensor), reference.leaf(tensor), atol=1e-6)


def test_tensors_without_an_architecture(tmp_path):
  rng = np.random.default_rng(0)
  place = {}
  for name in "abc":
    place[name] = str(tmp_path / f"{name}.safetensors")
    tensors = {"unet.conv.weight": (4, 3, 2, 2), "unet.blocks.0.w": (8, 5), "scale": (7,)}
    drawn = {k: rng.normal(size=s).astype(np.float32) for k, s in tensors.items()}
    safetensors_numpy.save_file(drawn, place[name])
  for method, parameters in (
    ("linear", {"weight": 0.4}),
    ("ties", {"weight": 0.7, "density": 0.5}),
    ("task_arithmetic", {"weight": 0.3}),
  ):
    document = {
      "merge_method": method,
      "models": [{"model": place[n], "parameters": parameters} for n in "bc"],
      "dtype": "float32",
    }
    if method != "linear":
      document["base_model"] = place["a"]
    config = mk_raw.RawPyTorchMergeConfig.model_validate(document)
    out = str(tmp_path / f"theirs {method}")
    mk_graph.Executor(
      mk_raw.plan_flat_merge(config, out, False, False, mk_options.MergeOptions(quiet=True))
    ).execute()
    got, want = ours(document, tmp_path / method), raw.Directory(out)
    assert set(got.addresses()) == set(want.addresses())
    for tensor in got.addresses():
      np.testing.assert_allclose(got.leaf(tensor), want.leaf(tensor), atol=3e-7)
    assert not (got.directory / "config.json").exists()
