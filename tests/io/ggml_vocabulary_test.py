# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of a tokenizer, merged the way ggml does it, gives the tokenizer's ids."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from treesurgeon.io import ggml_vocabulary

TEXT = [json.__doc__]
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
RAW = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern, behavior="isolated"):
  step = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior)
  return pre_tokenizers.Sequence([step, RAW])


def level(pre=LEVEL):
  """Trains byte-level BPE: 300 ids, two special tokens before them and a plain one after."""
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  inner.train_from_iterator(TEXT, trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False,
  ))  # fmt: skip
  inner.add_tokens([tokenizers.AddedToken("<think>", special=False)])
  return inner


def characters(pre=None, keep=lambda pair: True, **settings):
  """Makes what sentencepiece is in a tokenizer.json: every pair that makes a token merges."""
  pieces = ["he", "▁t", "the", "▁the", "er", "▁▁", "th", "ther"]
  letters = sorted(set("▁there"))
  words = ["<unk>", "<s>", "</s>", *sorted(ggml_vocabulary._FALLBACK), *letters, *pieces]
  vocab = {word: i for i, word in enumerate(words)}
  merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p))]
  merges = [pair for pair in merges if set(pair) <= set(vocab) and keep(pair)]
  settings = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", **settings}
  inner = tokenizers.Tokenizer(models.BPE(vocab, merges, **settings))
  if pre is None:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(steps)
  else:
    inner.pre_tokenizer = pre
  inner.add_special_tokens(["<unk>", "<s>", "</s>"])
  return inner


def read(tmp_path, inner, rows=310, **config):
  inner.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  return ggml_vocabulary.read(tmp_path, rows)


def by_score(vocabulary, text):
  """Merges the best neighbours, as llama.cpp does for "llama"; the leftmost of equals."""
  ids = {token: i for i, token in enumerate(vocabulary.tokens)}
  parts = list("▁" * bool(vocabulary.space_prefix) + text.replace(" ", "▁"))
  while True:
    pairs = [(ids.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
    best = max(
      ((vocabulary.scores[i], at) for i, at in pairs if i is not None), default=None
    )  # fmt: skip
    if best is None:
      break
    parts[-best[1] : 2 - best[1]] = ["".join(parts[-best[1] : 2 - best[1]])]
  out = []
  for part in parts:
    out += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
  return out


@pytest.mark.parametrize(
  ("pre", "name"),
  [
    (LEVEL, "gpt-2"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), LEVEL]), "smollm"),
    (split(LLAMA3), "llama-bpe"),
    (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
  ],
)
def test_byte_level(tmp_path, pre, name):
  inner = level(pre)
  inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  found = read(tmp_path, inner, eos_token="</s>", pad_token={"content": "<think>"})
  assert (found.model, found.pre, found.notes) == ("gpt2", name, ())
  assert [inner.token_to_id(t) for t in found.tokens[:301]] == list(range(301))
  assert found.tokens[301:] == tuple(f"[PAD{i}]" for i in range(301, 310))
  assert found.types == (3, 3, *[1] * 298, 4, *[5] * 9)
  held = json.loads(inner.to_str())["model"]["merges"]
  assert found.merges == tuple(f"{a} {b}" for a, b in held) and len(held) == 300 - 258
  assert found.special == {"bos": 0, "eos": 1, "pad": 300}
  assert (found.add_bos, found.add_eos, found.space_prefix) == (True, False, None)
  assert found.template == "{{ messages }}" and found.scores == ()


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_characters_merge_by_score_as_by_merges(tmp_path, scheme):
  inner = characters(scheme and pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
  found = read(tmp_path, inner, bos_token="<s>", unk_token="<unk>")
  assert (found.model, found.space_prefix) == ("llama", scheme != "never")
  assert any("after special tokens too" in note for note in found.notes) == (scheme == "first")
  assert found.types[:4] == (2, 3, 3, 6) and found.special == {"eos": 2, "bos": 1, "unk": 0}
  for text in ("the there  her", "there   the Ü", "ethererthehe"):
    assert by_score(found, text) == inner.encode(text).ids


def test_what_ggml_does_otherwise_is_noted(tmp_path):
  inner = level()
  inner.normalizer = normalizers.NFC()
  inner.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
  notes = read(tmp_path, inner, eos_token="</s>").notes
  assert "NFC" in notes[0] and "blanks beside '<mask>'" in notes[1] and len(notes) == 2
  plain = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
  plain.pre_tokenizer = LEVEL
  (note,) = read(tmp_path, plain).notes
  assert "no token is known to end a text" in note
  inner = level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), LEVEL]))
  table = json.loads(inner.to_str())
  table["model"]["vocab"]["12"] = 301
  table["model"]["merges"].append(["1", "2"])
  (note,) = read(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(table))).notes
  assert "does not split 'smollm'" in note


def test_special_ids_come_from_the_config_where_they_are_special(tmp_path):
  inner = tokenizers.Tokenizer(models.BPE({"a": 0, "<end>": 1}, []))
  inner.pre_tokenizer = LEVEL
  inner.add_special_tokens(["<end>"])
  (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 0], "bos_token_id": 0}))
  assert read(tmp_path, inner).special == {"eos": 1}


def whole(ignore, pre):
  """Makes a tokenizer whose token "abc" no merge makes."""
  vocab = {t: i for i, t in enumerate(["a", "b", "c", "ab", "abc"])}
  inner = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=ignore))
  inner.pre_tokenizer = pre
  return inner


def test_words_that_are_tokens(tmp_path):
  notes = read(tmp_path, whole(True, split(LLAMA3))).notes
  assert any("transformers takes 1 tokens, 'abc' the first, in parts" in note for note in notes)
  with pytest.raises(ValueError, match="under 'gpt-2' ggml takes a word such as 'abc' by merges"):
    read(tmp_path, whole(True, LEVEL))
  with pytest.raises(ValueError, match="under 'llama-bpe' ggml takes a word such as 'abc' as it"):
    read(tmp_path, whole(False, split(LLAMA3)))


def changed(inner, **parts):
  for name, part in parts.items():
    setattr(inner, name, part)
  return inner


TWO = processors.TemplateProcessing(
  single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
)  # fmt: skip
SPACE = pre_tokenizers.Metaspace(split=False)


@pytest.mark.parametrize(
  ("make", "rows", "message"),
  [
    (lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")), 9, "model is 'WordLevel'"),
    (lambda: level(split(r"\w+")), 310, r"split text, \\w\+, is none of gpt-2, smollm"),
    (lambda: level(split(LLAMA3, "removed")), 310, "is none of"),
    (lambda: level(pre_tokenizers.ByteLevel()), 310, '"add_prefix_space": true'),
    (lambda: changed(level(), normalizer=normalizers.Lowercase()), 310, "such as Lowercase"),
    (level, 300, "it has 301 tokens and the model 300 rows"),
    (lambda: changed(level(), post_processor=TWO), 310, r"puts \[0, 1\] before a text"),
    (lambda: characters(byte_fallback=False), 310, "needs byte_fallback"),
    (lambda: characters(end_of_word_suffix="_"), 310, "no end_of_word_suffix='_'"),
    (lambda: characters(SPACE, lambda pair: pair != ("th", "er")), 310, "'th' and 'er' do not"),
    (lambda: characters(pre_tokenizers.Whitespace()), 310, "before its merges comes Whitespace"),
    (lambda: changed(characters(), normalizer=None), 310, "before its merges comes nothing"),
  ],
)
def test_what_ggml_cannot_hold_is_refused(tmp_path, make, rows, message):
  with pytest.raises(ValueError, match=message):
    read(tmp_path, make(), rows)


def test_merges_of_a_token_must_be_neighbours(tmp_path):
  table = json.loads(characters().to_str())
  merges = table["model"]["merges"]
  merges.append(merges.pop(next(i for i, pair in enumerate(merges) if pair == ["▁t", "he"])))
  with pytest.raises(ValueError, match="the merges that make .* are apart"):
    read(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(table)))


def test_without_a_tokenizer(tmp_path):
  with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
    ggml_vocabulary.read(tmp_path, 9)
