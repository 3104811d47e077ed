# SPDX-License-Identifier: Apache-2.0
"""GGUF files that we write give transformers our logits and ids, and hold our codes.

llama.cpp itself (xllamacpp 2026.10.11549, in an environment of its own) was once given nine such
files: every split, sentencepiece's BPE, and all four families. On texts like those below its ids
were those of tokenizer.json, but for the blank after special tokens that `ggml_vocabulary` notes;
it generated our tokens, with log probabilities within 1e-4 of ours.
"""

import dataclasses
import io as streams
import json
import shutil

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from transformers.integrations.gguf import gguf_tokenizer_mapping

from treesurgeon import io, models, registry
from treesurgeon.io import ggml_vocabulary
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


TEXTS = (
  "def f(x, y=12345):\n    return x ** 2  # It's 3.14159\n\n\n",
  "The tree's ROOT grewHere, 1999 times: naïve façade, 漢字!",
  "<s>hi</s> <think>so</think>",
)
VOCABULARIES = [
  ("Llama", "llama-bpe"), ("Llama", "gpt-2"), ("Llama", "smollm"), ("Llama", "gpt-4o"),
  ("Qwen2", "qwen2"), ("Qwen3", "qwen2"), ("Mistral", "tekken"),
]  # fmt: skip


def test_the_splits_are_those_that_transformers_knows():
  for steps, name in ggml_vocabulary._SPLITS.items():
    if name not in ("gpt-2", "smollm"):
      assert steps == (gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS[name],)


def text():
  return [json.__doc__, json.JSONDecoder.__doc__, dataclasses.dataclass.__doc__, *TEXTS[:2]]


def byte_level(pre, folder):
  """Trains and writes a tokenizer of 400 ids."""
  steps = tokenizers.pre_tokenizers
  split = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS.get(pre)
  level = steps.ByteLevel(add_prefix_space=False, use_regex=split is None)
  first = [steps.Split(tokenizers.Regex(split), "isolated")] if split else []
  first = [steps.Digits(individual_digits=True)] if pre == "smollm" else first
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = steps.Sequence([*first, level])
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.train_from_iterator(text(), tokenizers.trainers.BpeTrainer(
    vocab_size=399, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=steps.ByteLevel.alphabet(),
  ))  # fmt: skip
  inner.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
  if pre == "llama-bpe":
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)]
    )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
  ).save_pretrained(folder)


def alone(family, folder):
  """Writes a model beside a tokenizer and exports both, to a file that nothing stands beside."""
  settings = {"Mistral": {"sliding_window": None}, "Qwen3": {"head_dim": 128}}.get(family, {})
  config = getattr(transformers, f"{family}Config")(
    **{**SIZES, "vocab_size": 410, "hidden_size": 32, "num_hidden_layers": 1}, **settings
  )
  getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder / "theirs")
  model = io.load(folder / "theirs")
  report = ours.save(model, folder / "out", tokenizer_from=folder / "theirs")
  (folder / "alone").mkdir()
  shutil.move(folder / "out" / ours.FILE, folder / "alone" / ours.FILE)
  return model, report


def fields(path):
  return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "pre"), VOCABULARIES)
def test_a_file_alone_tokenizes_and_generates(tmp_path, family, pre):
  byte_level(pre, tmp_path / "theirs")
  model, report = alone(family, tmp_path)
  assert f"the vocabulary is in the file (gpt2, split as {pre!r})" in report.notes[0]
  want = tokenizers.Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json"))
  held = fields(tmp_path / "alone" / ours.FILE)
  assert held["tokenizer.ggml.model"] == "gpt2" and held["tokenizer.ggml.pre"] == pre
  tokens = held["tokenizer.ggml.tokens"]
  size = want.get_vocab_size()
  assert [want.id_to_token(i) for i in range(size)] == tokens[:size] and len(tokens) == 410
  assert held["tokenizer.ggml.token_type"] == [3, 3, *[1] * (size - 3), 4, *[5] * (410 - size)]
  assert (held["tokenizer.ggml.bos_token_id"], held["tokenizer.ggml.eos_token_id"]) == (0, 1)
  assert held["tokenizer.ggml.add_bos_token"] == (pre == "llama-bpe")
  assert held["tokenizer.chat_template"] == "{{ messages }}"
  got = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=ours.FILE)
  for one in TEXTS:
    assert got(one)["input_ids"] == want.encode(one).ids
    assert got.decode(got(one)["input_ids"], skip_special_tokens=True) == want.decode(
      want.encode(one).ids
    )
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone", gguf_file=ours.FILE)
  prompt = got("The tree", return_tensors="pt")
  ids = back.generate(**prompt, max_new_tokens=3, do_sample=False)[0].tolist()
  start = prompt["input_ids"].shape[1]
  logits = models.forward(model.spec, model.params, jnp.asarray([ids])).logits[0]
  assert np.argmax(logits, -1)[start - 1 : -1].tolist() == ids[start:]


@pytest.mark.filterwarnings("ignore")
def test_a_file_alone_tokenizes_as_sentencepiece(tmp_path):
  out = streams.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("\n".join(text()).splitlines()), model_writer=out, model_type="bpe",
    vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, minloglevel=2,
  )  # fmt: skip
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "tokenizer.model").write_bytes(out.getvalue())
  made = transformers.LlamaTokenizer.from_pretrained(tmp_path / "theirs")
  made.save_pretrained(tmp_path / "theirs")
  _, report = alone("Llama", tmp_path)
  assert "(llama, split as 'default')" in report.notes[0]
  pieces = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
  held = fields(tmp_path / "alone" / ours.FILE)
  assert held["tokenizer.ggml.tokens"][:400] == [pieces.id_to_piece(i) for i in range(400)]
  assert held["tokenizer.ggml.token_type"][:400] == [2, 3, 3, *[6] * 256, *[1] * 141]
  scores = [pieces.get_score(i) for i in range(400)]
  made = [i for i in range(259, 400) if len(pieces.id_to_piece(i)) > 1]
  assert [held["tokenizer.ggml.scores"][i] for i in made] == [scores[i] for i in made]
  got = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=ours.FILE)
  for one in TEXTS[:2]:
    assert got(one, add_special_tokens=False)["input_ids"] == pieces.encode(one)
  want = tokenizers.Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json"))
  for one in TEXTS:
    assert got(one)["input_ids"] == want.encode(one).ids


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_ggml_cannot_hold_is_left_out(tmp_path):
  words = tokenizers.models.WordLevel({"<unk>": 0, "tree": 1}, "<unk>")
  (tmp_path / "theirs").mkdir()
  tokenizers.Tokenizer(words).save(str(tmp_path / "theirs" / "tokenizer.json"))
  _, report = alone("Llama", tmp_path)
  assert "no vocabulary is in the file: its model is 'WordLevel'" in report.notes[0]
  held = fields(tmp_path / "alone" / ours.FILE)
  assert held["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in held
  assert (tmp_path / "out" / "tokenizer.json").is_file()
