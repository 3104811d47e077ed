# SPDX-License-Identifier: Apache-2.0
import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from treesurgeon.io import tokenizer


def directory(tmp_path, eos="</s>", config=None):
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "cat": 2, eos: 3}, unk_token="<unk>")
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.save(str(tmp_path / "tokenizer.json"))
  if config is not None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  return tmp_path


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
  one = tokenizer.ByteTokenizer()
  ids = one.encode(text)
  assert ids.dtype == np.int32 and one.decode(np.append(ids, one.eos_id)) == text


def test_bytes_without_a_file(tmp_path):
  one = tokenizer.load(tmp_path)
  assert isinstance(one, tokenizer.ByteTokenizer)
  one.save(tmp_path)
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(ValueError, match="token id 300 at position 1 .* valid are 0 to 256"):
    one.decode([1, 300])


@pytest.mark.parametrize(
  ("eos", "config"),
  [("</s>", None), ("[E]", {"eos_token": "[E]"}), ("[E]", {"eos_token": {"content": "[E]"}})],
)
def test_json(tmp_path, eos, config):
  one = tokenizer.load(directory(tmp_path, eos, config))
  assert (one.vocab_size, one.eos_id) == (4, 3)
  ids = one.encode("a cat dog")
  assert ids.dtype == np.int32 and ids.tolist() == [1, 2, 0]
  assert one.decode(ids[:2]) == "a cat"
  (tmp_path / "copy").mkdir()
  one.save(tmp_path / "copy")
  assert tokenizer.load(tmp_path / "copy").encode("cat").tolist() == [2]
  with pytest.raises(ValueError, match="token id 4 at position 0"):
    one.decode([4])


def test_without_an_end(tmp_path):
  assert tokenizer.load(directory(tmp_path, "z")).eos_id is None


def test_mistakes(tmp_path):
  with pytest.raises(ValueError, match="end-of-text token 'x' is not in the vocabulary"):
    tokenizer.load(directory(tmp_path, config={"eos_token": "x"}))
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer.json"):
    tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  (tmp_path / "tokenizer.model").write_text("")
  with pytest.raises(ValueError, match="tokenizer.model but no tokenizer.json"):
    tokenizer.load(tmp_path)
  with pytest.raises(ValueError, match="does not exist"):
    tokenizer.load(tmp_path / "no")


def test_out_of_vocabulary():
  tokenizer.check_ids(np.zeros((2, 0), np.int32), 3)
  message = r"batch: token id 5 at position 2 is out of vocabulary; valid are 0 to 4 \(2 of 4"
  with pytest.raises(ValueError, match=message):
    tokenizer.check_ids(np.array([[0, 4], [5, -1]]), 5, "batch")
