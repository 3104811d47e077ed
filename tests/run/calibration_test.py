# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.io import chat_templates, tokenizer
from treesurgeon.run import calibration

HOW = {"length": 4, "samples": 8, "batch": 3, "vocab_size": 257}


def cut(text, **how):
  return calibration.batches(text, tokenizer.ByteTokenizer(), **{**HOW, **how})


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 200), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5))
def test_rows_are_disjoint_runs_of_the_text(size, length, samples, batch):
  length = min(length, size)
  text = "".join(chr(97 + i % 26) for i in range(size))
  found = cut(text, length=length, samples=samples, batch=batch)
  rows = np.concatenate(found)
  assert rows.dtype == np.int32
  assert len(rows) == min(samples, size // length)
  assert [len(b) for b in found[:-1]] == [batch] * (len(found) - 1)
  all_rows = np.frombuffer(text.encode(), np.uint8)[: size // length * length].reshape(-1, length)
  assert all(any((r == a).all() for a in all_rows) for r in rows)
  assert (rows[0] == all_rows[0]).all()
  if len(rows) > 1:
    assert (rows[-1] == all_rows[-1]).all()


def test_a_text_shorter_than_a_sequence_is_refused():
  with pytest.raises(ValueError, match=r"x.txt has 3 tokens, fewer than one sequence of 4; give"):
    cut("abc", source="x.txt")
  with pytest.raises(ValueError, match="the calibration text has 0 tokens"):
    cut("")


def test_a_token_outside_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match=r"has the token 122, the model's vocabulary ends at 99"):
    cut("zzzz", vocab_size=100)
  with pytest.raises(ValueError, match=r"a.npy has the token -1, the model's vocabulary ends at"):
    cut(np.array([1, 2, -1, 4]), source="a.npy")


def write(path, *lines):
  path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
  return path


def test_documents_are_packed_with_the_end_of_text_between_them():
  found = np.concatenate(cut(["ab", "cdefg", "h"], length=4))
  assert found.tolist() == [[97, 98, 256, 99], [100, 101, 102, 103]]
  assert cut(["abcd"])[0].tolist() == [[97, 98, 99, 100]]


def test_of_many_documents_only_as_many_as_needed_are_read_spread_evenly():
  read = []

  class Counting(tokenizer.ByteTokenizer):
    def encode(self, text):
      read.append(int(text[:3]))
      return super().encode(text)

  documents = [f"{i:03}." for i in range(100)]
  rows = calibration.batches(documents, Counting(), **{**HOW, "length": 5, "samples": 8})
  assert len(np.concatenate(rows)) == 8 and len(read) == 8
  assert max(np.diff(sorted(read))) < 2 * 100 / 8
  starts = [tokenizer.ByteTokenizer().decode(r)[:3] for r in np.concatenate(rows)]
  assert starts == sorted(starts) == [f"{i:03}" for i in sorted(read)]


def test_a_document_a_row_is_padded_and_masked():
  found = cut(["ab", "", "cdefg", "h"], rows="documents", length=4, batch=2)
  assert [b["tokens"].shape for b in found] == [(2, 4), (1, 4)]
  assert found[0]["tokens"].tolist() == [[97, 98, 256, 256], [99, 100, 101, 102]]
  assert found[0]["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
  assert found[1]["mask"].tolist() == [[1, 0, 0, 0]]
  with pytest.raises(ValueError, match="has 0 tokens"):
    cut(["", ""], rows="documents")
  with pytest.raises(ValueError, match="rows='padded': valid are pack, documents"):
    cut("abcd", rows="padded")
  with pytest.raises(ValueError, match="holds tokens, which come in rows already"):
    cut(np.arange(9), rows="documents")


def test_token_files_hold_a_stream_or_rows(tmp_path):
  np.save(tmp_path / "a.npy", np.arange(11, dtype=np.uint16))
  np.savez(tmp_path / "b.npz", tokens=np.arange(12).reshape(2, 6), mask=np.ones(3))
  stream, rows = (calibration.read(tmp_path / n) for n in ("a.npy", "b.npz"))
  assert np.concatenate(cut(stream)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert np.concatenate(cut(rows)).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
  assert cut(rows, length=99)[0].shape == (2, 6)


def test_json_lines_hold_texts_or_messages(tmp_path):
  chat = [{"role": "user", "content": "hi"}]
  path = write(tmp_path / "a.jsonl", {"text": "one"}, "", {"messages": chat, "id": 3})
  assert calibration.read(path, render=lambda m: m[0]["content"] + "!") == ["one", "hi!"]
  path = write(tmp_path / "b.jsonl", {"text": "one", "body": "two\u2028three"})
  assert calibration.read(path, field="body") == ["two\u2028three"]
  assert calibration.read(write(tmp_path / "c.txt", "one", "two")) == ["one\ntwo\n"]


@pytest.mark.parametrize(
  ("line", "field", "message"),
  [
    ("{", None, r"a.jsonl:2: not JSON: Expecting"),
    ("[1]", None, r"a.jsonl:2: '\[1\]' is not a JSON object"),
    ('{"id": 1}', None, r"a.jsonl:2: no field 'text' or 'messages'; it has id"),
    ("{}", "body", r"a.jsonl:2: no field 'body'; it has none"),
    ('{"text": 3}', None, r"a.jsonl:2: 'text' is neither a text nor a list of messages"),
    (
      '{"messages": [{}]}',
      None,
      r"a.jsonl:2: 'messages' holds messages, and the model has no chat",
    ),
  ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, field, message):
  with pytest.raises(ValueError, match=message):
    first = {"text": "a", "body": "a"}
    calibration.read(write(tmp_path / "a.jsonl", first, line), field=field)


def test_files_that_hold_no_calibration_data_are_named(tmp_path):
  def read(name):
    return calibration.read(tmp_path / name)

  with pytest.raises(ValueError, match=r"a.jsonl holds no document"):
    calibration.read(write(tmp_path / "a.jsonl", "", " "))
  np.save(tmp_path / "f.npy", np.ones(3))
  np.save(tmp_path / "d.npy", np.ones((1, 2, 3), int))
  np.save(tmp_path / "e.npy", np.ones(0, int))
  np.savez(tmp_path / "x.npz", a=np.ones(3, int), b=np.ones(3, int))
  (tmp_path / "p.npy").write_bytes(b"no array")
  (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
  for name, message in (
    ("f.npy", "holds float64 of shape .3,.; valid are integers"),
    ("d.npy", r"holds int64 of shape .1, 2, 3.; valid are integers"),
    ("e.npy", "holds no token"),
    ("x.npz", "holds a, b; token ids go by the name of tokens or input_ids"),
    ("p.npy", "is not a numpy file of token ids"),
    ("t.txt", "is not UTF-8 text"),
    ("nowhere.txt", "is not a file"),
  ):
    with pytest.raises(ValueError, match=f"{name} {message}"):
      read(name)


def test_a_chat_template_that_refuses_names_the_line(tmp_path):
  template = chat_templates.resolve("mistral")
  turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  path = write(tmp_path / "a.jsonl", {"messages": turns}, {"messages": turns[1:]})

  def render(messages):
    return chat_templates.render(template, messages, bos_token="<s>", eos_token="</s>")

  assert render(turns) == "<s> [INST] a [/INST] b</s>"
  with pytest.raises(ValueError, match=r"a.jsonl:2: the chat template refuses .* must alternate"):
    calibration.read(path, render=render)
  with pytest.raises(ValueError, match="the chat template refuses the messages: "):
    chat_templates.render("{% for %}", turns)
