# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest
import tokenizers

from treesurgeon.train import corpus, tokenizer

TEXTS = ["the cat sat on the mat, the hat on the cat"] * 4
DOCUMENTS = [
  corpus.Document("a.py", "code", "train", TEXTS[0]),
  corpus.Document("b.py", "code", "validation", "zebra zebra zebra zebra"),
]


def test_spells_any_text():
  made = tokenizer.train(TEXTS, vocab_size=300)
  for text in ("the cat", "Übermaß 日本\n\t\x00", "", "  two"):
    assert made.decode(made.encode(text).ids) == text
  assert made.token_to_id(tokenizer.EOS) == 0
  assert made.get_vocab_size() <= 300


def test_training_is_deterministic_across_processes():
  program = (
    "from treesurgeon.train import tokenizer\n"
    f"print(tokenizer.train({TEXTS!r}, vocab_size=300).to_str())"
  )
  runs = [
    subprocess.run(
      [sys.executable, "-P", "-c", program],
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1",)
  ]
  assert json.loads(runs[0]) == json.loads(tokenizer.train(TEXTS, vocab_size=300).to_str())


def test_cached_trains_on_the_training_split_and_keeps_the_result(tmp_path, monkeypatch):
  made = tokenizer.cached(DOCUMENTS, vocab_size=300, where=tmp_path)
  assert not any("zeb" in token for token in made.get_vocab())
  assert len(list(tmp_path.iterdir())) == 1

  def fail(*args, **options):
    raise AssertionError("trained again")

  monkeypatch.setattr(tokenizer, "train", fail)
  again = tokenizer.cached(DOCUMENTS, vocab_size=300, where=tmp_path)
  assert again.to_str() == made.to_str()
  with pytest.raises(AssertionError, match="again"):
    tokenizer.cached(DOCUMENTS, vocab_size=301, where=tmp_path)


def test_save_writes_what_transformers_reads(tmp_path):
  made = tokenizer.train(TEXTS, vocab_size=300, special=(tokenizer.EOS, tokenizer.MASK))
  tokenizer.save(made, tmp_path / "model", context=64)
  back = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
  assert back.encode("the hat").ids == made.encode("the hat").ids
  config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert (config["eos_token"], config["mask_token"]) == (tokenizer.EOS, tokenizer.MASK)
  assert config["model_max_length"] == 64


def test_bad_input_is_named():
  with pytest.raises(ValueError, match=r"vocab_size=100 cannot hold 256 bytes.*at least 257"):
    tokenizer.train(TEXTS, vocab_size=100)
  with pytest.raises(ValueError, match="none of 1 documents is of the split 'train'"):
    tokenizer.cached(DOCUMENTS[1:])
